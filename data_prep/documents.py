"""Documents from files: text, HTML, JSON lines and Parquet, plain or compressed."""

from __future__ import annotations

import gzip
import html.parser
import io
import json
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from ebt_megatron.data.shards import DataError

from .files import InputFile, open_file

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
        stream = io.BufferedReader(zstandard.open(open_file(path), "rb"))  # type: ignore[type-var, arg-type]
        return os.path.splitext(inner)[1], stream
    return suffix, open_file(path)


class Part(NamedTuple):
    """A file that holds documents, or a range of its bytes."""

    path: str
    begin: int = 0
    end: int = 0  # 0: to the end


def split_files(files: list[InputFile], unit_bytes: int) -> list[list[Part]]:
    """Files in order, in pieces of work of about unit_bytes; big plain JSONL files are cut at line ends."""
    units: list[list[Part]] = []
    size = unit_bytes
    for file in files:
        cut = unit_bytes if file.path.endswith(".jsonl") else file.bytes
        for begin in range(0, max(file.bytes, 1), max(cut, 1)):
            if size >= unit_bytes:
                units.append([])
                size = 0
            end = min(begin + cut, file.bytes)
            units[-1].append(Part(file.path, begin, end))
            size += end - begin
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
            if suffix == ".jsonl":
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
