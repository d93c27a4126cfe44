"""Documents from files: text, HTML, JSON lines and Parquet, plain or compressed."""

from __future__ import annotations

import ast
import glob
import gzip
import html.parser
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from data_prep.files import InputFile, open_file
from ebt_megatron.data.shards import DataError

SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".jsonl", ".parquet")
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


def _open(path: str) -> tuple[str, io.BufferedIOBase]:
    """The suffix beneath any compression, and the decompressed bytes."""
    inner, suffix = os.path.splitext(path)
    if suffix == ".gz":
        return os.path.splitext(inner)[1], gzip.open(open_file(path), "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        stream = io.BufferedReader(zstandard.open(open_file(path), "rb"))  # type: ignore[type-var]
        return os.path.splitext(inner)[1], stream
    return suffix, open_file(path)


class Part(NamedTuple):
    """Something that holds documents: a file, a range of a file's bytes, or a program's docstrings."""

    path: str
    begin: int = 0
    end: int = 0  # 0: to the end
    docstrings: bool = False


def split_files(files: list[InputFile], unit_bytes: int) -> list[list[Part]]:
    """Files in order, in pieces of work of about unit_bytes; big plain JSONL files are cut at line ends."""
    parts = []
    for file in files:
        cut = unit_bytes if file.path.endswith(".jsonl") else file.bytes
        begins = range(0, max(file.bytes, 1), max(cut, 1))
        parts += [(Part(file.path, b, min(b + cut, file.bytes)), min(cut, file.bytes - b)) for b in begins]
    return group(parts, unit_bytes)


def group(parts: list[tuple[Part, int]], unit_bytes: int) -> list[list[Part]]:
    """Consecutive parts, given with their bytes, in groups that reach unit_bytes."""
    units: list[list[Part]] = []
    size = unit_bytes
    for part, count in parts:
        if size >= unit_bytes:
            units.append([])
            size = 0
        units[-1].append(part)
        size += count
    return units


def _json_lines(stream: io.BufferedIOBase, part: Part, text_key: str) -> Iterator[str]:
    if part.begin:
        stream.seek(part.begin - 1)
        stream.readline()  # the rest of a line that the range before this one has read
    while not part.end or stream.tell() < part.end:
        begin = stream.tell()
        line = stream.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)[text_key])
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            stream.seek(0)
            number = stream.read(begin).count(b"\n") + 1
            raise DataError(f"{part.path}, line {number}: no JSON object with a '{text_key}' ({error}); fix the line, "
                            "or name the key with --text-key") from None  # fmt: skip


def read_part(part: Part, text_key: str = "text") -> Iterator[str]:
    """The documents of a part: one for a text file or page, one a line or row for JSONL and Parquet.

    Bytes that are not UTF-8 become U+FFFD.

    Raises:
        DataError: naming the file, and the line of broken JSON, a damaged archive or a missing text column.
    """
    suffix, stream = _open(part.path)
    with stream:
        try:
            if part.docstrings:
                yield _docstrings(stream.read().decode("utf-8", errors="replace"))
            elif suffix == ".jsonl":
                yield from _json_lines(stream, part, text_key)
            elif suffix == ".parquet":
                import pyarrow
                import pyarrow.parquet as parquet

                try:
                    for batch in parquet.ParquetFile(stream).iter_batches(columns=[text_key]):
                        yield from map(str, batch.column(0).to_pylist())
                except (pyarrow.ArrowException, IndexError) as error:
                    raise DataError(f"{part.path}: no Parquet file with a column '{text_key}' ({error}); name the "
                                    "column with --text-key") from None  # fmt: skip
            else:
                text = stream.read().decode("utf-8", errors="replace")
                yield strip_html(text) if suffix in (".html", ".htm") else text
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{part.path} cannot be read ({error}): copy it again") from None


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


def quickstart_parts() -> tuple[str, list[tuple[Part, int]]]:
    """English text that this machine already has: (what it is, parts and their bytes).

    Debian's prose packages where installed; else docstrings of the Python standard library and
    of the installed packages, and the standard library's source.
    """
    names = [(name, sorted(glob.glob(pattern, recursive=True))) for name, pattern in _DEBIAN]
    present = [(name, paths) for name, paths in names if paths]
    if present:
        prose = [(Part(p), os.path.getsize(p)) for _, paths in present for p in paths]
        return "; ".join(name for name, _ in present), prose
    stdlib, site = (Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib"))
    own = sorted(p for p in stdlib.rglob("*.py") if "site-packages" not in p.parts)
    programs = [(str(p), p.stat().st_size) for p in [*own, *sorted(site.rglob("*.py"))]]
    docstrings = [(Part(p, docstrings=True), size) for p, size in programs]
    source = [(Part(p), size) for p, size in programs[: len(own)]]  # reached only when the prose was too little
    what = (
        "docstrings of the Python standard library and of the installed packages, then the standard library's "
        "source (PSF and the packages' licences)"
    )
    return what, docstrings + source
