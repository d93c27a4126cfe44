"""Documents from files: text, HTML, JSON lines and Parquet, plain or compressed."""

from __future__ import annotations

import functools
import html.parser
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.lines import encodable
from ebt_megatron.data_prep.files import DAMAGED, InputFile, content_of, open_content, open_file, plain_name

_PAGES, _LINES = (".html", ".htm"), (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".md", ".rst", *_PAGES)
SUFFIXES = (*_TEXT, ".jsonl", ".ndjson", ".json.gz", ".json.zst", ".parquet")  # plain .json beside data is about it
_BLOCKS = ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre")
_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")  # marks that files begin with
_PARQUET = b"PAR1"
_AT_ONCE = 16  # files looked into
_HEAD = 8192  # bytes that tell text from what is none
_NAMED = 100  # skipped lines and files of a piece of work that are named, not only counted
_ROWS = 1024  # of Parquet, at once


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
        self.hidden = max(0, self.hidden - (tag in ("script", "style")))  # there may be one that nothing began
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


_PIECES = 64  # of work that an input is cut into, about


def strip_html(page: str) -> str:
    """The visible text of a page, blank lines collapsed."""
    parser = _Text()
    parser.feed(page)
    parser.close()  # gives out what might have been half a tag or entity
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


@dataclass
class Tally:
    """What was not taken as it stood.

    Attributes:
        skip: leave out lines and files that cannot be read; else they raise DataError.
        nulls: lines or rows without a text.
        replaced: characters that became U+FFFD.
        skipped: lines and files left out.
        named: the first of them, and why.
    """

    skip: bool = False
    nulls: int = 0
    replaced: int = 0
    skipped: int = 0
    named: list[str] = field(default_factory=list)

    def broken(self, why: str) -> None:
        """Note what is left out.

        Raises:
            DataError: if nothing may be.
        """
        if not self.skip:
            raise DataError(why)
        self.skipped += 1
        if len(self.named) < _NAMED:
            self.named.append(why)

    def decode(self, data: bytes) -> str:
        """UTF-8; other bytes become U+FFFD."""
        text = data.decode("utf-8", errors="replace")
        self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
        return text

    def text_of(self, value: object, where: Callable[[], str]) -> Iterator[str]:
        """The document of a JSON or Parquet value: none of a null, lone surrogates replaced.

        Raises:
            DataError: if it is no text.
        """
        if value is None:
            self.nulls += 1
        elif isinstance(value, bytes):
            yield self.decode(value)
        elif isinstance(value, str):
            text, count = encodable(value)
            self.replaced += count
            yield text
        else:
            self.broken(
                f"{where()}: the text is of type {type(value).__name__}, no string; name the right key with "
                "--text-key, or pass --skip-broken"
            )

    def counts(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return {k: v for k, v in asdict(self).items() if k != "skip"}


class Part(NamedTuple):
    """A file that holds documents, or a range of its bytes.

    Attributes:
        path: or URL.
        begin, end: of the bytes (of a plain file of JSON lines); 0: to the end.
        version: tells the file from what is at its path after a change.
    """

    path: str
    begin: int = 0
    end: int = 0
    version: str = ""


def _suffix(path: str) -> str:
    return os.path.splitext(plain_name(path)[0])[1]


def holds_one_document(path: str) -> bool:
    """Whether a file is a text or a page, rather than lines or rows of them."""
    return _suffix(path) not in (*_LINES, ".parquet")


def unit_bytes_for(files: list[InputFile]) -> int:
    """Bytes of a piece of work, so that every worker has some: a 64th of the input, from 64 KiB to 16 MiB.

    A power of two, so that an input that grows a little is cut where it was.
    """
    total = sum(file.bytes for file in files)
    return min(max(1 << (total // _PIECES).bit_length(), 1 << 16), 1 << 24)


def split_files(files: list[InputFile], unit_bytes: int) -> list[list[Part]]:
    """Files in order, in pieces of work of about unit_bytes; big plain files of JSON lines are cut at line ends."""
    units: list[list[Part]] = []
    size = unit_bytes
    for file in files:
        version = f"{file.bytes} {file.changed}"
        ranges = [(0, 0)]
        if _suffix(file.path) in _LINES and not plain_name(file.path)[1]:  # bytes of an archive are no bytes of text
            ranges = [(b, min(b + unit_bytes, file.bytes)) for b in range(0, max(file.bytes, 1), unit_bytes)]
        for begin, end in ranges:
            if size >= unit_bytes:
                units.append([])
                size = 0
            units[-1].append(Part(file.path, begin, end, version))
            size += end - begin or file.bytes
    return units


def _no_text(head: bytes, suffix: str) -> bool:
    """Whether a file that begins like this is no text in UTF-8.

    Of one with a suffix of text only a zero byte and the marks of UTF-16 say so.
    """
    if b"\0" in head or head.startswith(_UTF16):
        return True
    if suffix in (*_TEXT, *_LINES):
        return False
    text = head.decode("utf-8", errors="surrogateescape")  # U+FFFD is a character that may be there
    odd = sum("\udc80" <= c <= "\udcff" or (c < " " and c not in "\t\n\r\f") for c in text)
    return odd > 0.3 * len(text)


def _refusal(path: str) -> str:
    kinds = ", ".join(SUFFIXES)
    return f"{path} is no text in UTF-8: leave it out of --input, or convert it (read are {kinds}, also .gz and .zst)"


def check_kinds(files: list[InputFile]) -> None:
    """Look at the first bytes of every file, before work starts.

    Raises:
        DataError: naming one that is no text in UTF-8 (UTF-16, an archive, a picture, a program), no Parquet, or
            that cannot be read; or that there is no pyarrow for a Parquet file.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:  # those of a URL take a while to open
        for problem in threads.map(_problem, (file.path for file in files)):
            if problem:
                threads.shutdown(cancel_futures=True)
                raise DataError(problem)


def _problem(path: str) -> str:
    """What a file's first bytes say against it, or ""."""
    head, suffix = content_of(path, _HEAD), _suffix(path)
    if suffix == ".parquet":
        _pyarrow()
        return (
            "" if head.startswith(_PARQUET) else f"{path} is no Parquet file: leave it out of --input, or copy it again"
        )
    return _refusal(path) if _no_text(head, suffix) else ""


@functools.lru_cache(16)
def _lines_before(part: Part) -> int:
    with open_file(part.path) as stream:
        count, left = 0, part.begin
        while left and (block := stream.read(min(left, 1 << 20))):
            count, left = count + block.count(b"\n"), left - len(block)
        return count


def _json_lines(stream: io.BufferedIOBase, part: Part, text_key: str, tally: Tally) -> Iterator[str]:
    number, position = 0, part.begin
    if part.begin:
        stream.seek(part.begin - 1)
        rest = stream.readline()  # of a line that the range before this one has read
        number, position = int(rest != b"\n"), part.begin - 1 + len(rest)

    def where() -> str:
        return f"{part.path}, line {_lines_before(part) + number}"

    while (not part.end or position < part.end) and (line := stream.readline()):
        text = line if position else line.removeprefix(_BOM)
        number, position = number + 1, position + len(line)
        if not text.strip():
            continue
        try:
            value = json.loads(tally.decode(text))[text_key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            tally.broken(
                f"{where()}: no JSON object with a '{text_key}' ({error}); fix the line, or name the key with "
                "--text-key, or pass --skip-broken"
            )
        else:
            yield from tally.text_of(value, where)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading Parquet needs pyarrow ({error}): pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _parquet_rows(stream: io.BufferedIOBase, part: Part, text_key: str, tally: Tally) -> Iterator[str]:
    pyarrow, parquet = _pyarrow()
    source: Any = io.BytesIO(stream.read()) if plain_name(part.path)[1] else stream  # it is read from its end
    number, types = 0, pyarrow.types

    def where() -> str:
        return f"{part.path}, row {number}"

    try:
        for batch in parquet.ParquetFile(source).iter_batches(_ROWS, columns=[text_key]):
            column = batch.column(0)
            if types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if types.is_string(column.type) or types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())  # strings of a file may be no UTF-8
            for value in column.to_pylist():
                number += 1
                yield from tally.text_of(value, where)
    except (pyarrow.ArrowException, IndexError) as error:
        tally.broken(
            f"{part.path}: no Parquet file with a column '{text_key}' ({' '.join(str(error).split())}); name "
            "the column with --text-key"
        )


def read_part(part: Part, text_key: str = "text", tally: Tally | None = None) -> Iterator[str]:
    """The documents of a part: one for a text file or page, one a line or row for JSON lines and Parquet.

    Bytes that are not UTF-8 and lone surrogates become U+FFFD, nulls are dropped; `tally` counts them.

    Raises:
        DataError: naming the file, and the line or row of what is no text; a damaged archive, or a file that is
            no text. Where `tally` lets it, the line or the rest of the file is left out instead.
    """
    tally, suffix = tally or Tally(), _suffix(part.path)
    try:
        opened = open_content(part.path)
    except DataError as error:
        tally.broken(str(error))
        return
    try:
        with opened as stream:
            if suffix in _LINES:
                yield from _json_lines(stream, part, text_key, tally)
            elif suffix == ".parquet":
                yield from _parquet_rows(stream, part, text_key, tally)
            elif _no_text((data := stream.read())[:_HEAD], suffix):
                tally.broken(_refusal(part.path))
            else:
                text = tally.decode(data.removeprefix(_BOM))
                del data
                yield strip_html(text) if suffix in _PAGES else text
    except DAMAGED as error:
        tally.broken(f"{part.path} cannot be read ({error}): copy it again")
