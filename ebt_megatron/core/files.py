"""Files that are there whole or not at all, and their checksums."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file grew too large"}


def said_of(error: OSError) -> str:
    """What an error of a file system says, in words."""
    return FULL.get(error.errno or 0) or error.strerror or str(error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which gets its own at the end.

    A full disk, an error or an end in between leaves the old file.

    Raises:
        OSError: of the disk; it names the file also where writing to an open one does not.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno in FULL and not error.filename:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file as by `replacing`; text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One SHA-256 of several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def sha256_of_model(paths: Iterable[Path]) -> str:
    """Hash large files as sha256_of_all does; read them again only if one has another size or time of change."""
    return _sha256_as_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@functools.cache
def _sha256_as_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    return sha256_of_all(path for path, _, _ in files)
