"""Input files: local globs and folders, and URLs of any fsspec scheme; plain, gzip or zstd."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import zstandard

from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.core.network import require_hub

DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError)  # what reading a file or archive may raise
_PACKINGS = (".gz", ".zst")
_CHUNK = 1 << 14  # compressed bytes at a time: zstd may make ten thousand times as many of them
_ZSTD_WINDOW = 1 << 31  # of `zstd --long=31`, which public dumps are made with


class InputFile(NamedTuple):
    """A file to read: its path or URL, its bytes, and when it was changed (0 for a URL)."""

    path: str
    bytes: int
    changed: int


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs, without their passwords and queries: signatures of a day and keys are in those."""
    return re.sub(r"(\w+://)([^/@\s]*@)?([^?\s]*)(\?\S*)?", r"\1\3", text)


def recorded_names(paths: Sequence[str]) -> dict[str, str]:
    """What files are called in what is kept, by path: URLs without secrets, numbered where that leaves them alike."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for path in dict.fromkeys(paths):
        name = without_secrets(path) if "://" in path else path
        counts[name] += 1
        names[path] = name if counts[name] == 1 else f"{name}#{counts[name]}"
    return names


class Input(NamedTuple):
    """What was found.

    Attributes:
        files: to read, sorted.
        left_out: files of folders, in numbers by suffix, whose suffixes were not searched for.
    """

    files: list[InputFile]
    left_out: Counter[str]

    def __str__(self) -> str:
        return f"{len(self.files)} files, {sum(f.bytes for f in self.files) / 1e6:,.1f} MB"


def counted(left_out: Counter[str]) -> str:
    """The numbers in words: "3 .csv, 1 .xz", the most first."""
    return ", ".join(
        f"{count:,} {kind}" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    )


def plain_name(path: str) -> tuple[str, str]:
    """A path or URL in small letters without the suffix of a compression, and that suffix or ""."""
    name = (path.partition("?")[0] if "://" in path else path).lower()
    packing = next((p for p in _PACKINGS if name.endswith(p)), "")
    return name.removesuffix(packing), packing


def _matches(path: str, suffixes: tuple[str, ...]) -> bool:
    name, packing = plain_name(path)
    return name.endswith(suffixes) or (name + packing).endswith(suffixes)


def _kind(path: str) -> str:
    name, packing = plain_name(path)
    return os.path.splitext(name)[1] + packing or "without a suffix"


def _remote(pattern: str, suffixes: tuple[str, ...]) -> tuple[list[InputFile], dict[str, str]]:
    """The files of a URL, and the kinds, by path, of what a folder has besides."""
    besides: dict[str, str] = {}
    try:
        system, root = fsspec.core.url_to_fs(pattern)
        if type(system).__module__.startswith("huggingface_hub."):
            require_hub()
        if glob.has_magic(root) and not system.exists(root):
            paths = [p for p in system.glob(root) if not system.isdir(p)]
        elif system.isdir(root):
            below = system.find(root)
            paths = [p for p in below if _matches(p, suffixes)]
            besides = {p: _kind(p) for p in below if not _matches(p, suffixes)}
        else:
            paths = [root]
        return [InputFile(system.unstrip_protocol(p), system.size(p) or 0, 0) for p in paths], besides
    except ImportError as error:
        raise DataError(
            f"--input {pattern} cannot be read ({error}): the extra 'remote' (pip install 'ebt-megatron[remote]') has "
            "what s3:// and hf:// need"
        ) from None
    except (OSError, ValueError, RecipeError) as error:
        raise DataError(f"--input {pattern} cannot be read ({' '.join(str(error).split())})") from None


def _below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files of a folder and of those in it, links followed; a link to a folder that it is in leads nowhere."""
    here = folder.resolve()
    if here not in above:
        for path in folder.iterdir():
            yield from _below(path, (*above, here)) if path.is_dir() else [path]


def _folders(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A folder and those below it but hidden ones, links followed; a link to one that it is in leads nowhere."""
    here = folder.resolve()
    if here not in above:
        yield folder
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _folders(path, (*above, here))


def _glob(pattern: str) -> list[Path]:
    """The paths that a pattern matches as glob.glob's do with `recursive`, which goes round in loops of links."""
    named = Path(pattern)
    found = {Path(named.anchor)}
    parts = named.parts[1:] if named.anchor else named.parts
    for number, part in enumerate(parts):
        folders = [path for path in found if path.is_dir()]
        if part == "**":
            found = {below for path in folders for below in _folders(path)}
            if number == len(parts) - 1:  # all files: to search the folders, too, would find them again
                inside = (path for folder in found for path in folder.iterdir())
                found = {path for path in inside if not path.name.startswith(".") and not path.is_dir()}
        elif glob.has_magic(part):
            hidden = part.startswith(".")
            inside = (path for folder in folders for path in folder.iterdir())
            found = {p for p in inside if fnmatchcase(p.name, part) and hidden == p.name.startswith(".")}
        else:
            found = {path / part for path in folders if os.path.lexists(path / part)}
    return sorted(found)


def _local(pattern: str, suffixes: tuple[str, ...]) -> tuple[list[InputFile], dict[str, str]]:
    """The files of a glob, file or folder, and the kinds, by path, of what folders have besides."""
    pattern = os.path.expanduser(pattern)
    named = Path(pattern)  # also where brackets in its name look like a pattern
    paths = [named] if named.exists() else _glob(pattern)
    files, besides = [p for p in paths if not p.is_dir()], {}
    for path in (p for folder in paths if folder.is_dir() for p in _below(folder)):
        if _matches(path.name, suffixes):
            files.append(path)
        else:
            besides[str(path)] = _kind(path.name)
    besides |= {str(p): "broken links" for p in files if not p.is_file()}
    return [InputFile(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()], besides


def find_files(patterns: list[str], suffixes: tuple[str, ...]) -> Input:
    """Files matching the globs or URLs; folders are searched for the suffixes, in capital letters or small.

    Raises:
        DataError: if a pattern matches nothing, or a URL cannot be read.
    """
    found: set[InputFile] = set()
    left_out: dict[str, str] = {}
    for pattern in patterns:
        files, besides = _remote(pattern, suffixes) if "://" in pattern else _local(pattern, suffixes)
        if not files:
            there = f" (there are {counted(Counter(besides.values()))})" if besides else ""
            raise DataError(
                f"--input {pattern} matches no file{there}: give globs, folders or URLs of {', '.join(suffixes)}"
            )
        found.update(files)
        left_out |= besides
    for file in found:
        left_out.pop(file.path, None)  # another pattern has it
    return Input(sorted(found), Counter(left_out.values()))


def open_file(path: str) -> io.BufferedIOBase:
    """The bytes of a file or URL.

    Raises:
        DataError: if it cannot be opened.
    """
    try:
        stream: Any = fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    return stream


class _Zstandard(io.RawIOBase):
    """The content of all frames of a zstd stream; raises EOFError where the last one is cut."""

    def __init__(self, stream: io.BufferedIOBase):
        self.stream = stream
        self.frame: Any = None  # the one that is being read
        self.packed, self.ready = b"", memoryview(b"")  # read but not unpacked; unpacked but not given out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data, self.packed = self.packed or self.stream.read(_CHUNK), b""
            if not data and self.frame is None:
                return 0
            if not data:
                raise EOFError("it ends in the middle of a zstd frame")
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            self.ready = memoryview(self.frame.decompress(data))
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def open_content(path: str) -> io.BufferedIOBase:
    """The bytes of a file or URL, unpacked if its name ends in .gz or .zst: all members or frames of it.

    Reading raises one of DAMAGED where an archive is cut or has other bytes behind it.

    Raises:
        DataError: if it cannot be opened, or is an archive of no bytes.
    """
    stream, packing = open_file(path), plain_name(path)[1]
    if not packing:
        return stream
    if not stream.read(1):
        raise DataError(f"{path} cannot be read (it is empty, no archive): copy it again")
    stream.seek(0)
    if packing == ".gz":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    return io.BufferedReader(_Zstandard(stream), 1 << 17)


def content_of(path: str, size: int = -1) -> bytes:
    """What open_content gives: all of it, or the first `size` bytes.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with open_content(path) as stream:
            return stream.read(size)
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read ({error}): copy it again") from None
