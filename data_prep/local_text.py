"""English text that this machine already has, for a start without a download.

    python -m ebt_megatron.data_prep.local_text --output data/quickstart/raw.jsonl --max-bytes 16000000

Debian's prose packages where installed; else docstrings of the Python standard library and of the
installed packages, then the standard library's source.
"""

from __future__ import annotations

import ast
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing
from ebt_megatron.data_prep import options
from ebt_megatron.data_prep.documents import Part, read_part
from ebt_megatron.data_prep.job import naming_shared_memory

# (name, files)
_DEBIAN = (
    ("An Anarchist FAQ (package anarchism, GPL-2)", "/usr/share/doc/anarchism/**/*.html"),
    ("Python documentation (package python3.11-doc, PSF)", "/usr/share/doc/python3.11/html/**/*.rst.txt"),
)


def docstrings(path: str) -> str:
    """The prose of a Python file."""
    try:
        tree = ast.parse(Path(path).read_text("utf-8", errors="replace"))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return ""
    nodes = (
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return "\n\n".join(filter(None, (ast.get_docstring(n) for n in nodes)))


def local_documents(pool: ProcessPoolExecutor) -> tuple[str, Iterator[str]]:
    """What the text is, and its documents."""
    names = [(name, sorted(glob.glob(pattern, recursive=True))) for name, pattern in _DEBIAN]
    present = [(name, paths) for name, paths in names if paths]
    if present:
        prose = (d for _, paths in present for p in paths for d in read_part(Part(p)))
        return "; ".join(name for name, _ in present), prose
    stdlib, site = (Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib"))
    own = sorted(str(p) for p in stdlib.rglob("*.py") if "site-packages" not in p.parts)
    programs = [*own, *sorted(map(str, site.rglob("*.py")))]

    def python() -> Iterator[str]:
        for first in range(0, len(programs), 512):  # in pieces: map would hand out all of them at once
            yield from pool.map(docstrings, programs[first : first + 512], chunksize=16)
        for path in own:  # reached only when the prose was too little
            yield Path(path).read_text("utf-8", errors="replace")

    what = (
        "docstrings of the Python standard library and of the installed packages, then the standard library's "
        "source (PSF and the packages' licences)"
    )
    return what, python()


def main(
    output: Path = typer.Option(..., parser=options.path, help="JSONL file to write, with a 'text' in each line."),
    max_bytes: int = typer.Option(16_000_000, min=1, help="Stop after this many bytes of text."),
    workers: int = typer.Option(os.cpu_count() or 1, min=1, help="Processes that parse."),
    dry_run: bool = options.DRY_RUN,
) -> None:
    """Collect text that this machine already has."""

    def work() -> None:
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,.1f} MB"), TimeElapsedColumn())
        with naming_shared_memory():
            made = ProcessPoolExecutor(workers)
        with made as pool, Progress(*columns, console=console) as bar:
            what, documents = local_documents(pool)
            console.print(f"reading {what}")
            if dry_run:
                console.print(f"would write {output}")
                return
            output.parent.mkdir(parents=True, exist_ok=True)
            size, task = 0, bar.add_task("collecting", total=None)
            with replacing(output) as partial, partial.open("w", encoding="utf-8") as stream:
                for document in documents:
                    if size >= max_bytes:
                        break
                    if document.strip():
                        stream.write(json.dumps({"text": document, "source": what}) + "\n")
                        size += len(document.encode("utf-8", "replace"))
                        bar.update(task, completed=size / 1e6)
                if not size:
                    raise DataError("this machine has no text to start with: use ebt-prepare text with --input")

    options.command(work)


if __name__ == "__main__":
    typer.run(main)
