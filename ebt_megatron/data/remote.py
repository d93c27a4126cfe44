"""Shards behind a URL: streamed through webdataset into memory, or kept in a folder of bounded size."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock
from webdataset.gopen import gopen, gopen_schemes
from webdataset.tariterators import tar_file_iterator

from ebt_megatron.core.files import FULL

T = TypeVar("T")
ATTEMPTS = 6
_CHUNK = 1 << 20  # bytes read at a time
_KEY = 16  # letters of the name of a remote folder in a cache
PAUSE_SECONDS = 0.5  # before the second attempt; each later pause is twice as long


class RemoteError(OSError):
    """A URL that cannot be read, or what came from it is not what was put there."""


class UnknownScheme(RemoteError):
    """No program here opens such URLs."""


def open_url(url: str) -> Any:
    """Open for reading (a context manager): with fsspec, or where it lacks the scheme or its package, webdataset.

    Webdataset opens http(s), gs, hf, ais, sftp and others with their command-line tools.

    Raises:
        UnknownScheme: if neither can.
    """
    try:
        return fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        if url.split("://")[0] in gopen_schemes:
            return gopen(url)
        raise UnknownScheme(f"{url}: {error}") from None


def retry(url: str, work: Callable[[], T]) -> T:
    """Do `work`, which reads a URL, again after an error of any kind, with pauses that double.

    Raises:
        RemoteError: of the last attempt.
        OSError: where what was read has no room on this machine's disk; at once.
    """
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except UnknownScheme:
            raise
        except FileNotFoundError:
            raise RemoteError(f"{url} is missing: copy it there again") from None
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if attempt == ATTEMPTS - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RemoteError(f"{url} cannot be read ({reason}) after {ATTEMPTS} tries") from None
        time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


class _Verified(io.RawIOBase):
    """A stream that counts and hashes what is read from it."""

    def __init__(self, stream: Any):
        self.stream, self.bytes, self.hash = stream, 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.bytes += len(data)
        self.hash.update(data)
        return len(data)

    def expect(self, size: int, sha256: str) -> None:
        """Read what is left, and compare.

        Raises:
            RemoteError: if size or checksum differ.
        """
        while self.read(_CHUNK):
            pass
        if self.bytes != size:
            state = "truncated" if self.bytes < size else "too long"
            raise RemoteError(f"it is {state}: {self.bytes} bytes, the manifest says {size}")
        if self.hash.hexdigest() != sha256:
            raise RemoteError("it does not match its checksum in manifest.json")


def stream_tar(url: str, size: int, sha256: str) -> list[tuple[str, bytes]]:
    """Names and contents of the members of a tar, through webdataset, once all of it is verified.

    Raises:
        RemoteError: if it cannot be read, or is not the one of this size and checksum.
    """

    def work() -> list[tuple[str, bytes]]:
        with open_url(url) as raw:
            stream = _Verified(raw)
            try:
                members = [(m["fname"], m["data"]) for m in tar_file_iterator(io.BufferedReader(stream, _CHUNK))]
            except OSError:
                raise
            except Exception as error:  # bytes that are no tar: size and checksum say more
                stream.expect(size, sha256)
                raise RemoteError(f"it is no tar ({error})") from None
            stream.expect(size, sha256)
            return members

    return retry(url, work)


class Cache:
    """Files of remote folders on this machine's disk, shared by its processes.

    Args:
        folder: made when needed.
        limit_bytes: tars are removed, those wanted longest ago first, to stay below; None: never.
    """

    def __init__(self, folder: Path, limit_bytes: float | None = None):
        self.folder, self.limit_bytes = folder, limit_bytes

    def path(self, url: str) -> Path:
        """Return where the file of a URL is, or will be."""
        parent, name = url.rsplit("/", 1)
        return self.folder / hashlib.sha256(parent.encode()).hexdigest()[:_KEY] / name

    def want(self, url: str) -> None:
        """Note that the file is in use, if it is here."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(url))

    def fetch(self, url: str, size: int | None, sha256: str) -> Path:
        """The local file; read from the URL, verified, and renamed into place if it is not there.

        Args:
            url: of the file.
            size: in bytes, if it is known.
            sha256: of the content.

        Raises:
            RemoteError: if it cannot be read, or is another.
            OSError: naming the file here, where the disk has no room for it.
        """
        path = self.path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):  # one process of the machine reads it
            if path.exists():
                return path
            partial = path.with_name(f"{path.name}.partial")

            def work() -> None:
                with open_url(url) as raw, partial.open("wb") as target:
                    stream = _Verified(raw)
                    while chunk := stream.read(_CHUNK):
                        target.write(chunk)
                    stream.expect(stream.bytes if size is None else size, sha256)

            try:
                retry(url, work)
                os.replace(partial, path)
            except OSError as error:
                if error.errno in FULL and not error.filename:
                    error.filename = str(path)
                raise
            finally:
                partial.unlink(missing_ok=True)
        if path.suffix == ".tar":
            self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        if self.limit_bytes is None:
            return
        found = []
        for path in self.folder.glob(f"{'[0-9a-f]' * _KEY}/*.tar"):  # other folders are not the cache's
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def in_background(work: Callable[[], T], slots: threading.Semaphore) -> Future[T]:
    """Do `work` in a thread that does not keep the process alive, as soon as there is a slot."""
    future: Future[T] = Future()

    def run() -> None:
        with slots:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # handed to whoever asks for the result
                    future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="shard").start()
    return future


def is_remote(folder: str) -> bool:
    """Whether it is a URL rather than a path."""
    return "://" in folder


def content_of(path: str) -> bytes:
    """All bytes of a file (a path or a URL)."""
    if not is_remote(path):
        return Path(path).read_bytes()

    def work() -> bytes:
        with open_url(path) as stream:
            return bytes(stream.read())

    return retry(path, work)
