"""What a run says about itself: phase timers, metrics.jsonl, TensorBoard and one console line."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter


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


def peak_memory_bytes() -> int:
    """The most memory this process has used: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """Rank 0's record of a run.

    Args:
        folder: the run directory; gets metrics.jsonl and tensorboard/.
        first_step: entries of this step and later, left by a run that was resumed before them, go.
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run
                if row["step"] <= first_step:
                    kept.append(line)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, self.path)
        self.stream = self.path.open("a")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's numbers; nested dictionaries become a/b in TensorBoard."""
        self.stream.write(json.dumps(row) + "\n")
        self.stream.flush()
        step = row["step"]
        for key, value in row.items():
            if isinstance(value, dict):
                for name, number in value.items():
                    self.board.add_scalar(f"{key}/{name}", number, step)
            elif isinstance(value, int | float) and key != "step":
                self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush everything."""
        self.stream.close()
        self.board.close()


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def console_line(row: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    """One line a person can read."""
    parts = [f"step {row['step']:>{len(str(total_steps))}}/{total_steps}", f"loss {row['loss']:.4f}"]
    if row.get("energy_first") is not None:
        parts.append(f"final step {row['final_step_loss']:.4f}")
        parts.append(f"energy {row['energy_first']:.3f} -> {row['energy_last']:.3f}")
        parts.append(f"alpha {row['alpha']:.4g}")
    parts += [f"grad {row['grad_norm']:.3g}", f"lr {row['lr']:.2e}", f"{row['tokens_per_second']:,.0f} tok/s",
              f"{clock(seconds_left)} left"]  # fmt: skip
    return " | ".join(parts)
