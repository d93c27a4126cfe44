"""What a run says about itself: phase timers, metrics.jsonl, TensorBoard and one console line."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.records import rows_of, to_json

PAUSE_SECONDS = 60.0  # before a writer that failed is made anew


def peak_memory_bytes() -> int:
    """The most memory this process has used: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last_step(folder: Path) -> int:
    """The last step that a run directory's metrics.jsonl has a row of; 0 without one."""
    return max((step for step, _ in _recorded(folder / "metrics.jsonl")), default=0)


def _recorded(path: Path) -> Iterator[tuple[int, str]]:
    """The steps and lines of a metrics.jsonl, but those that a killed run or a machine that stopped left half."""
    for row, line in rows_of(path) if path.exists() else ():
        if row is not None and isinstance(row.get("step"), int):
            yield row["step"], line + "\n"


class Writer(Protocol):
    """One record of a run."""

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's numbers: `step`, numbers by name, lists and dictionaries of numbers."""

    def close(self) -> None:
        """Flush everything."""


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers but its step; those of nested dictionaries are called a/b."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, int | float) and key != "step":
            flat[key] = value
    return flat


class JsonlWriter:
    """metrics.jsonl: a row in each line. A row that cannot be written is tried again with the next one.

    Args:
        folder: the run directory.
        first_step: rows of later steps, left by a run that was resumed before them, go to metrics-replaced.jsonl.
    """

    def __init__(self, folder: Path, first_step: int):
        path = folder / "metrics.jsonl"
        kept: list[str] = []
        replaced: list[str] = []
        for step, line in _recorded(path):
            (kept if step <= first_step else replaced).append(line)
        if replaced:
            with path.with_name("metrics-replaced.jsonl").open("a") as stream:
                stream.writelines(replaced)
        write_whole(path, "".join(kept))
        self.stream = path.open("ab", buffering=0)
        self.pending = b""

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        self.pending += to_json(row).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        size = os.fstat(self.stream.fileno()).st_size
        done = self.stream.write(self.pending)
        if done < len(self.pending):  # no half rows
            os.ftruncate(self.stream.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        self.pending = b""

    def close(self) -> None:
        """See `Writer`."""
        try:
            self._flush()
        finally:
            self.stream.close()


def _but_tensorboards(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread; what ends TensorBoard's is raised again where a row is written."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


class TensorBoardWriter:
    """tensorboard/: curves of every number."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _but_tensorboards
        self.board = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        for name, number in scalars(row).items():
            self.board.add_scalar(name, number, row["step"])

    def close(self) -> None:
        """See `Writer`."""
        self.board.close()


class WandbWriter:
    """Weights & Biases: one run there for a run's folder, however often it is resumed.

    Its environment variables say where to: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.

    Raises:
        RecipeError: if it cannot start, for want of a key or a network.
    """

    def __init__(self, folder: Path, first_step: int):
        import wandb

        known = folder / "wandb-id"
        if not known.exists():
            write_whole(known, uuid.uuid4().hex[:12])
        recipe: Any = OmegaConf.to_container(OmegaConf.load(folder / "recipe.yaml"))
        identity = {"id": known.read_text(), "resume": "allow", "name": recipe["name"]}
        try:
            self.run = wandb.init(dir=folder, config=recipe, **identity)
        except Exception as error:  # its own errors, and those of the network
            raise RecipeError(
                f"training.metrics: wandb cannot start ({' '.join(str(error).split())}): set "
                "WANDB_MODE=offline, or leave it out"
            ) from None
        self.run.define_metric("*", step_metric="step")  # a step that is repeated after a kill is logged again

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        self.run.log({"step": row["step"], **scalars(row)})

    def close(self) -> None:
        """See `Writer`."""
        self.run.finish()


class Lenient:
    """A writer whose failures (a disk that others filled) are said once and counted; training goes on.

    Args:
        name: of what is written.
        make: makes the writer that goes on from a step; called again after one that failed, and a pause.
        first_step: the first one.
        say: prints a line.
    """

    def __init__(self, name: str, make: Callable[[int], Writer], first_step: int, say: Callable[[str], None]):
        self.name, self.make, self.say = name, make, say
        self.writer: Writer | None = make(first_step)
        self.failures = 0
        self.again = 0.0  # when a writer may be made

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # every writer has errors of its own
            if not self.failures:
                self.say(f"{self.name} not written: {' '.join(str(error).split())}; training goes on without")
            self.failures += 1

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        self._attempt(lambda: self._write(row))

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is None and time.monotonic() < self.again:
            self.failures += 1
            return
        try:
            self.writer = self.writer or self.make(row["step"] - 1)
            self.writer.write(row)
        except Exception:
            if not getattr(self.writer, "pending", None):  # one that holds nothing back is broken
                self.writer, self.again = None, time.monotonic() + PAUSE_SECONDS
            raise

    def close(self) -> None:
        """See `Writer`."""
        if self.writer is not None:
            self._attempt(self.writer.close)
        if self.failures:
            self.say(f"{self.name}: writing failed {self.failures} times")


# by the names of `training.metrics`: what they write, and the writer
WRITERS: dict[str, tuple[str, Callable[[Path, int], Writer]]] = {
    "jsonl": ("metrics.jsonl", JsonlWriter),
    "tensorboard": ("tensorboard/", TensorBoardWriter),
    "wandb": ("Weights & Biases", WandbWriter),
}


def require_writers(kinds: Sequence[str]) -> None:
    """Raise RecipeError if a writer of `training.metrics` needs a package that is not installed."""
    if "wandb" in kinds and importlib.util.find_spec("wandb") is None:
        raise RecipeError("training.metrics has wandb, which is not installed: pip install wandb, or leave it out")


class MetricsWriter:
    """Rank 0's record of a run, by every writer that was asked for.

    Args:
        folder: the run directory, with recipe.yaml.
        first_step: the step that the run goes on from.
        say: told once of what cannot be written.
        kinds: names of WRITERS.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None], kinds: Sequence[str]):
        chosen = [WRITERS[kind] for kind in kinds]
        self.writers = [Lenient(name, partial(make, folder), first_step, say) for name, make in chosen]

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        for writer in self.writers:
            writer.write(row)

    def close(self) -> None:
        """See `Writer`."""
        for writer in self.writers:
            writer.close()


class Clock:
    """Step times and what is left, from a running mean."""

    def __init__(self, steps: int, first: int):
        self.steps, self.previous, self.mean = steps, time.perf_counter(), 0.0
        self.first = first

    def tick(self, step: int) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self.previous = now - self.previous, now
        self.mean = seconds if step <= self.first + 2 else 0.95 * self.mean + 0.05 * seconds
        return seconds

    def left(self, step: int) -> float:
        """Seconds to the end at the present pace."""
        return (self.steps - step) * self.mean


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def console_line(row: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    """One line a person can read."""
    parts = [
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
    ]
    if row.get("energy_first") is not None:
        parts.append(f"final step {row['final_step_loss']:.4f}")
        parts.append(f"energy {row['energy_first']:.3f} -> {row['energy_last']:.3f}")
        parts.append(f"alpha {row['alpha']:.4g}")
    parts += [
        f"grad {row['grad_norm']:.3g}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"{clock(seconds_left)} left",
    ]
    return " | ".join(parts)
