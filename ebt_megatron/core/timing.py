"""Timers say where time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timers:
    """Seconds spent in each phase since the last `take`; a phase inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current: str | None = None  # what this rank is doing now, and how many phases it
        self.entered = 0  # has entered: for the watchdog
        self.synchronize = False  # wait for the GPU at phase borders: exact, and slower
        self._since = 0.0

    def _now(self) -> float:
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside to `name`."""
        outer, now = self.current, self._now()
        if outer is not None:
            self.seconds[outer] = self.seconds.get(outer, 0.0) + now - self._since
        self.current, self._since = name, now
        self.entered += 1
        try:
            yield
        finally:
            now = self._now()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.current, self._since = outer, now

    def take(self) -> dict[str, float]:
        """The seconds so far, and start again."""
        taken, self.seconds = self.seconds, {}
        return taken
