"""Recipes found by name: `text/s1_xxs` is recipes/text/s1_xxs.yaml, from any folder and where this is installed."""

from __future__ import annotations

import difflib
import itertools
import re
import textwrap
from pathlib import Path

from ebt_megatron.core.errors import RecipeError

RECIPES = Path(__file__).parents[1] / "recipes"  # in a checkout a link to the folder beside the package


def recipe_names() -> dict[str, Path]:
    """The file of every recipe that comes with this project, by its name."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.yaml"))}


def find_recipe(given: str | Path) -> Path:
    """The file that is meant by a path, or by a name with or without `recipes/` and `.yaml`.

    Raises:
        RecipeError: with one line that names recipes like it.
    """
    if Path(given).is_file():
        return Path(given)
    names = recipe_names()
    name = Path(given).as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in names:
        return names[name]
    last = name.rpartition("/")[2]
    shorts = difflib.get_close_matches(last, sorted({full.rpartition("/")[2] for full in names}), n=3)
    near = (
        difflib.get_close_matches(name, names, n=3)
        or [full for short in shorts for full in names if full.rpartition("/")[2] == short][:3]
    )
    hint = f"; did you mean {' or '.join(near)}?" if near else "; ebt-train --list shows those that come with it"
    raise RecipeError(f"no recipe at {given}{hint}")


def describe_recipes(columns: int | None = None) -> str:
    """Every recipe's name and the first sentence of its comment, and where they are.

    Args:
        columns: of a terminal, in which sentences go on under themselves; None: one line for each recipe.
    """
    names = recipe_names()
    width = max(map(len, names), default=0) + 2
    lines = []
    for name, path in names.items():
        said = _first_sentence(path.read_text())
        parts = [said] if columns is None else textwrap.wrap(said, max(columns - width, 30), break_on_hyphens=False)
        lines += [f"{head:<{width}}{part}" for head, part in zip([name, *[""] * len(parts)], parts, strict=False)]
    return "\n".join([*lines, f"\nin {RECIPES}; a path works as well as a name"])


def _first_sentence(text: str) -> str:
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.strip("# ") for line in comment))[0]
