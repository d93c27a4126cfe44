"""Text unlike the quickstart's, near to far, as shards made with a run's own tokenizer: the shifts of the suite.

    python -m examples.other_texts --tokenizer data/quickstart/train/tokenizer.json
    ebt-evaluate runs/quickstart/s2 --suite --baseline runs/quickstart/transformer --shift prose=data/other/prose

Excerpts of documents drawn at random. Packages are downloaded by apt on Debian and its relatives (no root, nothing is
installed); what cannot be had is left out, and said.
"""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from ebt_megatron.core.cli import guarded
from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing
from examples.media import unpack_debian
from examples.steps import Steps

OUTPUT = Path("data/other")
_EXCERPT = 2000  # characters of a document


def _documents(path: Path) -> Iterator[str]:
    """Give the documents of a file as preparation reads it."""
    from ebt_megatron.data_prep.documents import Part, read_part

    return iter(read_part(Part(str(path))))


def _code(path: Path) -> Iterator[str]:
    """A Python file without its docstrings and comments: those are what the quickstart is trained on."""
    try:
        tree = ast.parse(path.read_text("utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    yield ast.unparse(tree)


def _statements(path: Path) -> Iterator[str]:
    """Metamath's statements and remarks a piece at a time, without proofs (from `$=` to `$.`)."""
    text = re.sub(r"\$=.*?\$\.", "$.", path.read_text("utf-8", errors="replace"), flags=re.DOTALL)
    yield from (text[first : first + _EXCERPT] for first in range(0, len(text), _EXCERPT))


@dataclass(frozen=True)
class OtherText:
    """Documents of a package.

    Attributes:
        package: of Debian; "" for the standard library.
        pattern: of its files.
        read: a file's documents.
    """

    package: str
    pattern: str
    read: Callable[[Path], Iterator[str]] = _documents

    def files(self, work: Path) -> list[Path]:
        """The files, of the installed package or downloaded into `work`; [] if that fails."""
        if not self.package:
            return [p for p in Path(sysconfig.get_path("stdlib")).rglob(self.pattern) if "site-packages" not in p.parts]
        installed = Path("/")
        if not self._in(installed):
            try:
                unpack_debian(self.package, work)
            except (OSError, subprocess.SubprocessError):
                return []
        return self._in(installed) or self._in(work)

    def _in(self, root: Path) -> list[Path]:
        return sorted(p for p in root.glob(self.pattern) if "translations" not in p.parts)  # English only


# Near to far from documentation in English of Python programs.
TEXTS = {
    "python-documentation": OtherText("python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt"),
    "kernel-documentation": OtherText("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/html/**/*.html"),
    "prose": OtherText("anarchism", "usr/share/doc/anarchism/html/*.html"),
    "python-code": OtherText("", "*.py", _code),
    "metamath": OtherText("metamath-databases", "usr/share/metamath/databases/set.mm", _statements),
}


def excerpts(text: OtherText, files: list[Path], characters: int, seed: int = 0) -> Iterator[str]:
    """A piece of each document, files in a drawn order, until there are so many characters."""
    draw = random.Random(seed)
    files = draw.sample(files, len(files))
    for path in files:
        documents = list(text.read(path))
        for document in draw.sample(documents, len(documents)):
            first = draw.randrange(max(1, len(document) - _EXCERPT))
            if piece := document[first : first + _EXCERPT].strip():
                yield piece
                characters -= len(piece)
            if characters <= 0:
                return


def main(
    tokenizer: Path = typer.Option(..., help="The run's: tokenizer.json in its folder of training shards."),
    output: Path = typer.Option(OUTPUT, help="A folder of shards for each text goes in here."),
    sequence_length: int = typer.Option(128, min=1, help="The run's."),
    characters: int = typer.Option(600_000, min=_EXCERPT, help="Characters of each text."),
) -> None:
    """Prepare text unlike the quickstart's; what is there is left."""

    def work() -> None:
        if not tokenizer.exists():
            raise DataError(f"no {tokenizer}: give the tokenizer.json of the run's training shards")
        step, console = Steps("python -m examples.other_texts"), Console(stderr=True)
        for name, text in TEXTS.items():
            if (output / name / "train" / "manifest.json").exists():
                continue
            with tempfile.TemporaryDirectory() as folder:
                files = text.files(Path(folder))
                if not files:
                    console.print(f"left out: {name}, package {text.package} cannot be had")
                    continue
                raw = output / f"{name}.jsonl"
                raw.parent.mkdir(parents=True, exist_ok=True)
                with replacing(raw) as partial, partial.open("w", encoding="utf-8") as stream:
                    stream.writelines(json.dumps({"text": t}) + "\n" for t in excerpts(text, files, characters))
            options = f"--sequence-length {sequence_length} --validation-fraction 0 --resume".split()
            where = "--input", str(raw), "--tokenizer", str(tokenizer), "--output", str(output / name)
            step(name, name, "ebt_megatron.data_prep.text", *where, *options)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
