"""Input files: local globs and folders, and URLs of any fsspec scheme."""

from __future__ import annotations

import glob
import io
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from ebt_megatron.data.shards import DataError


class InputFile(NamedTuple):
    """A file to read: its path or URL, its bytes, and when it was changed (0 for a URL)."""

    path: str
    bytes: int
    changed: int


def _matches(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.removesuffix(".gz").removesuffix(".zst").lower().endswith(suffixes)


def _remote(pattern: str, suffixes: tuple[str, ...]) -> list[InputFile]:
    try:
        system, root = fsspec.core.url_to_fs(pattern)
        if glob.has_magic(root):
            paths = [p for p in system.glob(root) if not system.isdir(p)]
        elif system.isdir(root):
            paths = [p for p in system.find(root) if _matches(p, suffixes)]
        else:
            paths = [root]
        return [InputFile(system.unstrip_protocol(p), system.size(p) or 0, 0) for p in paths]
    except ImportError as error:
        raise DataError(f"--input {pattern} cannot be read ({error}): the extra 'remote' (pip install '.[remote]') has "
                        "what s3:// and hf:// need") from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise DataError(f"--input {pattern} cannot be read ({' '.join(str(error).split())})") from None


def _local(pattern: str, suffixes: tuple[str, ...]) -> list[InputFile]:
    paths = [Path(p) for p in glob.glob(pattern, recursive=True)]
    files = [p for p in paths if p.is_file()]
    for folder in (p for p in paths if p.is_dir()):
        files += [p for p in folder.rglob("*") if p.is_file() and _matches(p.name, suffixes)]
    return [InputFile(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def find_files(patterns: list[str], suffixes: tuple[str, ...]) -> list[InputFile]:
    """Files matching the globs or URLs, sorted; folders are searched for the suffixes.

    Raises:
        DataError: if a pattern matches nothing, or a URL cannot be read.
    """
    found: set[InputFile] = set()
    for pattern in patterns:
        files = _remote(pattern, suffixes) if "://" in pattern else _local(pattern, suffixes)
        if not files:
            raise DataError(f"--input {pattern} matches no file: give globs, folders or URLs of {', '.join(suffixes)}")
        found.update(files)
    return sorted(found)


def open_file(path: str) -> io.BufferedIOBase:
    """The bytes of a file or URL.

    Raises:
        DataError: if it cannot be opened.
    """
    try:
        stream: Any = fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    return stream
