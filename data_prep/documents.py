"""Documents from files: text, HTML, JSON lines and Parquet, plain or compressed."""

from __future__ import annotations

import ast
import glob
import gzip
import html.parser
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

from ebt_megatron.data import DataError

_SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".jsonl", ".parquet")
_BLOCKS = ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre")


class _Text(html.parser.HTMLParser):
    """The visible text of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style")
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def strip_html(page: str) -> str:
    """The visible text of a page, blank lines collapsed."""
    parser = _Text()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


def _open(path: Path) -> tuple[str, io.BufferedIOBase]:
    """The suffix beneath any compression, and the decompressed bytes."""
    if path.suffix == ".gz":
        return Path(path.stem).suffix, gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return Path(path.stem).suffix, io.BufferedReader(zstandard.open(path, "rb"))  # type: ignore[type-var]
    return path.suffix, path.open("rb")


def read_file(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents of one file: one for a text file or page, one a line or row for JSONL and Parquet.

    Bytes that are not UTF-8 become U+FFFD.

    Raises:
        DataError: naming the file and line of broken JSON, or of a missing text column.
    """
    suffix, stream = _open(path)
    with stream:
        if suffix == ".jsonl":
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    yield str(json.loads(line)[text_key])
                except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}, line {number}: no JSON object with a '{text_key}' ({error}); fix the "
                                    "line, or name the key with --text-key") from None  # fmt: skip
        elif suffix == ".parquet":
            import pyarrow.parquet as parquet

            for batch in parquet.ParquetFile(stream).iter_batches(columns=[text_key]):
                yield from map(str, batch.column(0).to_pylist())
        else:
            text = stream.read().decode("utf-8", errors="replace")
            yield strip_html(text) if suffix in (".html", ".htm") else text


def find_files(patterns: list[str]) -> list[Path]:
    """Files matching the globs, sorted; folders are searched for the suffixes we read.

    Raises:
        DataError: if a pattern matches nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = [Path(p) for p in glob.glob(pattern, recursive=True)]
        files = [p for p in paths if p.is_file()]
        for folder in (p for p in paths if p.is_dir()):
            files += [p for p in folder.rglob("*") if p.is_file() and p.name.removesuffix(".gz").removesuffix(
                ".zst").endswith(_SUFFIXES)]  # fmt: skip
        if not files:
            raise DataError(f"--input {pattern} matches no file: give globs or folders of {', '.join(_SUFFIXES)} "
                            "(also .gz, .zst)")  # fmt: skip
        found.update(files)
    return sorted(found)


# Prose that Debian packages bring, used when it is there: (name, files).
_DEBIAN = (
    ("An Anarchist FAQ (package anarchism, GPL-2)", "/usr/share/doc/anarchism/**/*.html"),
    ("Python documentation (package python3.11-doc, PSF)", "/usr/share/doc/python3.11/html/**/*.rst.txt"),
)


def _docstrings(source: str) -> str:
    """The prose of a Python file: its docstrings."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    nodes = (
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return "\n\n".join(filter(None, (ast.get_docstring(n) for n in nodes)))


def quickstart_documents() -> tuple[str, Iterator[tuple[str, str]]]:
    """English text that this machine already has: (what it is, iterator of (source, document)).

    Debian's prose packages where installed; else docstrings of the Python standard library and
    of the installed packages, and the standard library's source.
    """
    names = [(name, sorted(glob.glob(pattern, recursive=True))) for name, pattern in _DEBIAN]
    present = [(name, paths) for name, paths in names if paths]
    if present:
        pages = ((str(p), d) for _, paths in present for p in map(Path, paths) for d in read_file(p))
        return "; ".join(name for name, _ in present), pages

    def python() -> Iterator[tuple[str, str]]:
        stdlib, site = (Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib"))
        own = sorted(p for p in stdlib.rglob("*.py") if "site-packages" not in p.parts)
        for path in [*own, *sorted(site.rglob("*.py"))]:
            yield str(path), _docstrings(path.read_text("utf-8", errors="replace"))
        for path in own:  # reached only when the prose was too little
            yield str(path), path.read_text("utf-8", errors="replace")

    what = (
        "docstrings of the Python standard library and of the installed packages, then the standard library's "
        "source (PSF and the packages' licences)"
    )
    return what, python()
