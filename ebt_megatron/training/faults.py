"""What can go wrong while training, and what is done about it."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from ebt_megatron.core.errors import PeerError


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 (what schedulers send before the end) and Ctrl-C until the step is done.

    torchrun passes Ctrl-C on, so that a rank may get it twice.
    """

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has been told to stop; the same on all ranks."""
        flag = torch.tensor([float(self.received)], device=device)
        dist.all_reduce(flag)
        return bool(flag.item())


class BrokenOff(Exception):
    """Raised on all ranks together where one of them cannot go on.

    Attributes:
        error: what this rank raises in the end: its own, or a PeerError.
    """

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def agree(error: Exception | None, device: torch.device) -> None:
    """Meet the other ranks, with what went wrong on this one.

    Raises:
        BrokenOff: on every rank, if anything did on any.
    """
    flag = torch.tensor([float(error is not None)], device=device)
    dist.all_reduce(flag)
    if not flag.item():
        return
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    rank, said = next((rank, said) for rank, said in enumerate(errors) if said)
    raise BrokenOff(error or PeerError(f"rank {rank}: {said}"))


class BadSteps:
    """Counts steps in a row that changed nothing because something was not finite.

    Args:
        limit: that many in a row end the run.
    """

    def __init__(self, limit: int):
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def record(self, applied: bool) -> bool:
        """Count a step; True when the run should end."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied
        return self.in_a_row >= self.limit


class SpikeDetector:
    """Finds losses far above their recent mean.

    Args:
        factor: a loss above factor times the mean of the window is a spike; 0: never.
        window: losses remembered; nothing is a spike before it is full.
    """

    def __init__(self, factor: float, window: int):
        self.factor, self.recent = factor, deque[float](maxlen=window)

    def is_spike(self, loss: float) -> bool:
        """Judge a loss, and remember it unless it is one."""
        full = len(self.recent) == self.recent.maxlen
        if self.factor > 0 and full and loss > self.factor * sum(self.recent) / len(self.recent):
            self.recent.clear()
            return True
        if math.isfinite(loss):
            self.recent.append(loss)
        return False


class Watchdog:
    """Ends the process when the run stands still, naming the rank and phase that hold it up.

    Every rank reports how far it is to the store the ranks met at. When a rank has not
    advanced for `timeout` seconds it reads everyone's report: ranks that wait in a
    collective have gone further than the one they wait for.

    Args:
        timers: their `current` phase and `entered` count are what is reported.
        timeout: seconds.
    """

    def __init__(self, timers: Any, timeout: float):
        self.timers, self.timeout = timers, timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store()
        self.step = 0
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.thread.start()

    def stop(self) -> None:
        """The run is over: wait for the thread, which must not outlive the process group."""
        self._stop.set()
        self.thread.join(self.timeout)

    def _report(self) -> None:
        report = {"entered": self.timers.entered, "phase": self.timers.current or "between phases", "step": self.step}
        self.store.set(f"watchdog/{self.rank}", json.dumps(report))

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        interval = min(5.0, self.timeout / 4)
        while not self._stop.wait(interval):
            if self.timers.entered != seen:
                seen, since = self.timers.entered, time.monotonic()
            self._report()
            if time.monotonic() - since > self.timeout:
                self._give_up()

    def _give_up(self) -> None:
        time.sleep(min(5.0, self.timeout / 2))  # let everyone's last report arrive
        reports = {}
        for rank in range(self.size):
            key = f"watchdog/{rank}"
            if self.store.check([key]):
                reports[rank] = json.loads(self.store.get(key))
        behind = min(r["entered"] for r in reports.values())
        culprits = [
            f"rank {rank} in phase '{r['phase']}' of step {r['step']}"
            for rank, r in reports.items()
            if r["entered"] == behind
        ]
        if self.store.add("watchdog/said", 1) == 1:
            print(
                f"[rank {self.rank}] no progress for {self.timeout:.0f} s: held up by {', '.join(culprits)}; exiting",
                file=sys.stderr,
                flush=True,
            )
        os._exit(75)
