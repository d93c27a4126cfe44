"""One run at a time in a folder: a lock file that says who holds it, on one machine or on a shared file system."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from ebt_megatron.core.errors import RecipeError

BEAT_SECONDS = 5.0  # the holder shows that it is alive
WATCH_SECONDS = 45.0  # a holder on another machine that shows nothing for so long is dead


def _machine() -> str:
    """What process numbers belong to: a boot of a machine, and in it a namespace of processes (a container)."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _started(pid: int) -> float | None:
    """Return when a process of this machine started; None if it is not alive."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 1)
    except psutil.Error:
        return None


class RunLock:
    """Holds a folder from `acquire` to `release`.

    The lock of a process of this machine that is dead is taken over at once, that of another machine when
    nothing has touched it for WATCH_SECONDS.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path):
        self.path = folder / "run.lock"
        self._stop = threading.Event()
        self._content = ""

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RecipeError: naming who holds it.
            OSError: if the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(" ", "seconds"),
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "started": _started(os.getpid()),
        }
        self._content = json.dumps(own)
        while not self._create(self.path):
            content = self._read()
            if content is not None and self._take_over(content):
                break
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)  # in one step, also over NFS
        except FileExistsError:
            return False
        with open(descriptor, "w") as stream:
            stream.write(self._content)
        return True

    def _take_over(self, content: str) -> bool:
        """Take a lock that says `content` if its holder is dead; raises RecipeError if it is alive."""
        try:
            holder: dict[str, Any] = json.loads(content)
        except ValueError:
            holder = {}
        if holder.get("machine") == _machine():
            alive = _started(holder["pid"]) == holder["started"]
        else:
            alive = self._beats(content)
        if alive:
            who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
            raise RecipeError(
                f"{self.path.parent} is in use by {who}: wait for its end, or set another training.output_dir"
            )
        # Of several that find it dead, one makes the successor of exactly this content, and the lock is never away.
        successor = self.path.with_name(f"run.lock.{hashlib.sha256(content.encode()).hexdigest()[:16]}")
        if not self._create(successor):
            deadline = time.monotonic() + WATCH_SECONDS
            while self._read() == content and time.monotonic() < deadline:
                time.sleep(0.05)
            if self._read() == content:  # whoever was at it died
                successor.unlink(missing_ok=True)
            return False
        try:
            if self._read() != content:
                return False
            successor.replace(self.path)
            return True
        finally:
            successor.unlink(missing_ok=True)

    def _read(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def _beats(self, content: str) -> bool:
        """Watch whether the holder touches its lock (or another takes it); no clocks are compared."""
        seen, deadline = self._touched(), time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(BEAT_SECONDS, WATCH_SECONDS) / 2)
            if self._read() != content:
                return False  # released, or taken over: look again
            if self._touched() != seen:
                return True
        return False

    def _touched(self) -> int:
        with contextlib.suppress(FileNotFoundError), self.path.open() as stream:  # opening it makes NFS ask the server
            return os.fstat(stream.fileno()).st_mtime_ns
        return 0

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the lock back; harmless if it is not held."""
        self._stop.set()
        with contextlib.suppress(OSError):
            if self._content and self._read() == self._content:
                self.path.unlink()
