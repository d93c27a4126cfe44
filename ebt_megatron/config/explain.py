"""What every key of a recipe means, from the comments of the fields: `ebt-train --explain KEY`, docs/reference.md."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebt_megatron.config.recipe import Recipe
from ebt_megatron.core.errors import RecipeError

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Explanation:
    """A key of a recipe.

    Attributes:
        key: dotted, e.g. "thinking.step_rule".
        type: as Python writes it.
        default: as YAML would; of a recipe that says nothing.
        allowed: choices or range, or "".
        meaning: the comment beside its field.
    """

    key: str
    type: str
    default: str
    allowed: str
    meaning: str


def comments_of(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass: the lines right above it, then what stands behind it."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    at = {
        t.start[0]: (t.string.lstrip("# ").rstrip(), t.line.lstrip().startswith("#"))
        for t in tokens
        if t.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    out = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in at and at[line][1]:
            above.insert(0, at[line][0])
            line -= 1
        last = node.end_lineno or node.lineno
        beside = [at[n][0] for n in range(node.lineno, last + 1) if n in at]
        out[node.target.id] = " ".join([*above, *beside])
    return out


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def explain_all(cls: type = Recipe, prefix: str = "") -> Iterator[Explanation]:
    """Every key, in the order of the recipe."""
    comments = comments_of(cls)
    for f in dataclasses.fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            yield from explain_all(type(default), f"{prefix}{f.name}.")
            continue
        choices, what = f.metadata.get("choices"), f.metadata.get("what", "")
        allowed = ", ".join(choices) if choices else what
        kind = str(f.type).replace(" | None", ", or null")
        yield Explanation(prefix + f.name, kind, _plain(default), allowed, comments[f.name])


def read_in(key: str) -> list[str]:
    """The modules that read a key, as paths in the package; by its last two names, so that a few may be missed."""
    group, _, name = f"recipe.{key}".rpartition(".")
    short = group.rpartition(".")[2]
    pattern = re.compile(rf"\b(?:{short}|options|model|self)\.{name}\b" if short != "recipe" else rf"recipe\.{name}\b")
    return sorted(
        path.relative_to(_PACKAGE).as_posix() for path in _PACKAGE.rglob("*.py") if pattern.search(path.read_text())
    )


def explain(key: str) -> str:
    """A key, or a group of keys ("thinking"), in words for the terminal.

    Raises:
        RecipeError: for what is neither, naming its like.
    """
    every = {e.key: e for e in explain_all()}
    if key not in every:
        inside = [e for e in every.values() if e.key.startswith(f"{key}.")]
        if inside or key == "all":
            return "\n".join(f"{e.key}={e.default}  {e.meaning}" for e in inside or every.values())
        near = difflib.get_close_matches(key, every, n=3, cutoff=0.5)
        ends = [k for k in every if k.endswith(f".{key}")]
        hint = f"did you mean {' or '.join(ends or near)}?" if ends or near else "--explain all lists them"
        raise RecipeError(f"--explain {key}: there is no such key; {hint}")
    found = every[key]
    lines = [f"{found.key}: {found.type}, default {found.default}", f"  {found.meaning}"]
    if found.allowed:
        lines.append(f"  {'one of' if ', ' in found.allowed else 'must be'} {found.allowed}")
    lines.append(f"  read in {', '.join(read_in(key)) or 'ebt_megatron'}")
    return "\n".join(lines)


def reference() -> str:
    """docs/reference.md."""
    lines = [
        "# Keys of a recipe",
        "",
        "Made by `ebt_megatron/config/explain.py`, from the comments in `ebt_megatron/config/`.",
        "`ebt-train --explain thinking.step_rule` says the same of one key, and where it is read.",
    ]
    group = None
    for e in explain_all():
        own = e.key.rpartition(".")[0] or "recipe"
        if own != group:
            lines += ["", f"## {own}", "", "| key | type | default | |", "| --- | --- | --- | --- |"]
            group = own
        allowed = f" ({e.allowed})" if e.allowed and e.allowed not in e.meaning else ""
        cells = f"`{e.key}`", f"`{e.type}`", f"`{e.default}`", f"{e.meaning}{allowed}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
