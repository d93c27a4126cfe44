"""What a run says about itself: phase timers, its metrics by the writers a recipe asks for, and one console line."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf

from ebt_megatron.config import RecipeError


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


class Writer(Protocol):
    """One record of a run: made of the run's folder and the step it goes on from."""

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's numbers: `step`, numbers by name, and dictionaries of numbers."""

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
    """metrics.jsonl: a row in each line; rows after `first_step`, left by a run that was resumed before them, go."""

    def __init__(self, folder: Path, first_step: int):
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run
                if row["step"] <= first_step:
                    kept.append(line)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
        self.stream = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        self.stream.write(json.dumps(row) + "\n")
        self.stream.flush()

    def close(self) -> None:
        """See `Writer`."""
        self.stream.close()


class TensorBoardWriter:
    """tensorboard/: curves of every number."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

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
            known.write_text(uuid.uuid4().hex[:12])
        recipe = OmegaConf.to_container(OmegaConf.load(folder / "recipe.yaml"))
        assert isinstance(recipe, dict)
        identity = {"id": known.read_text(), "resume": "allow", "name": recipe["name"]}
        try:
            self.run = wandb.init(dir=folder, config=recipe, **identity)
        except Exception as error:  # its own errors, and those of the network
            raise RecipeError(f"training.metrics: wandb cannot start ({' '.join(str(error).split())}): set "
                              "WANDB_MODE=offline, or leave it out") from None  # fmt: skip
        self.run.define_metric("*", step_metric="step")  # a step that is repeated after a kill is logged again

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        self.run.log({"step": row["step"], **scalars(row)})

    def close(self) -> None:
        """See `Writer`."""
        self.run.finish()


WRITERS: dict[str, Callable[[Path, int], Writer]] = {
    "jsonl": JsonlWriter,
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


def require_writers(kinds: Sequence[str]) -> None:
    """Raise RecipeError if a writer of `training.metrics` needs a package that is not installed."""
    if "wandb" in kinds and importlib.util.find_spec("wandb") is None:
        raise RecipeError("training.metrics has wandb, which is not installed: pip install wandb, or leave it out")


class MetricsWriter:
    """Rank 0's record of a run, by every writer that was asked for.

    Args:
        folder: the run directory, with recipe.yaml.
        first_step: the step the run goes on from.
        kinds: names of WRITERS.
    """

    def __init__(self, folder: Path, first_step: int, kinds: Sequence[str]):
        self.writers = [WRITERS[kind](folder, first_step) for kind in kinds]

    def write(self, row: dict[str, Any]) -> None:
        """See `Writer`."""
        for writer in self.writers:
            writer.write(row)

    def close(self) -> None:
        """See `Writer`."""
        for writer in self.writers:
            writer.close()


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
