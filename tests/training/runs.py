"""Whole training runs on a few ranks in one process tree, with something going wrong in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import torch

from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import DataError, PeerError
from tests import builders

DOCUMENTS = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(40)) for i in range(200)]
S2 = (
    "thinking.loss=last",
    "thinking.gradient=truncated",
    "thinking.langevin_noise=0.5",
    "thinking.replay.enabled=true",
    "thinking.replay.capacity=2",
)


def recipe_of(data: Path, output: Path, *overrides: str) -> Recipe:
    """A tiny EBT that logs every step."""
    return builders.small_recipe(
        f"data.train=[{data}/train]",
        f"data.validation=[{data}/validation]",
        f"training.output_dir={output}",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        "training.steps=12",
        "training.log_interval=1",
        "training.validation_interval=0",
        "training.validation_samples=4",
        "training.save_interval=3",
        "training.async_save=true",
        "optimizer.warmup_steps=2",
        "thinking.max_steps=2",
        *overrides,
    )


def rows(output: Path) -> list[dict]:
    """What metrics.jsonl says."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def digest(run) -> str:
    """Of this rank's weights, optimizer state and replay buffer."""
    hashed = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                hashed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            hashed.update(repr(value).encode())

    add(dict(run.trainer.model.named_parameters()))
    for optimizer in getattr(run.trainer.optimizer, "chained_optimizers", [run.trainer.optimizer]):
        add([optimizer.optimizer.state[p] for group in optimizer.optimizer.param_groups for p in group["params"]])
    add(run.trainer.objective.rank_state() or {})
    return hashed.hexdigest()


def train(data: Path, output: Path, overrides: tuple[str, ...] = (), trouble: str = "") -> dict:
    """Train to the end on this rank.

    Args:
        trouble: a function below that prepares what goes wrong.

    Returns:
        The final digest; the digest after each step; the samples of each step; what was said; why it stopped.
    """
    from ebt_megatron.training.hooks import train_to_end
    from ebt_megatron.training.run import Run, StoppedRun

    run = Run(recipe_of(data, output, *overrides))
    out: dict = {"after": [], "samples": [], "said": [], "stopped": ""}
    run.say = lambda text, style="": out["said"].append(text)
    if trouble:
        globals()[trouble](run)
    step = run.trainer.train_step

    def watched(micro_batches, iteration):
        out["samples"].append([i for b in micro_batches for i in b.sample_ids.tolist()])
        result = step(micro_batches, iteration)
        out["after"].append(digest(run))
        return result

    run.trainer.train_step = watched
    try:
        train_to_end(run)
    except (StoppedRun, StoppedHere) as reason:
        out["stopped"] = str(reason)
    except (OSError, DataError, PeerError) as reason:
        if trouble not in ("no_data", "no_validation_data"):
            raise
        out["stopped"] = f"{type(reason).__name__}: {reason}"
    return out | {"digest": digest(run)}


# --- trouble ---------------------------------------------------------------------------------------

BAD_STEP = 4


def _on_last_rank(run, change, iterations) -> None:
    original = run.trainer.objective.train_batch

    def broken(micro_batches, iteration):
        totals = original(micro_batches, iteration)
        if run.state.rank == run.state.world_size - 1 and iteration in iterations:
            change(totals)
        return totals

    run.trainer.objective.train_batch = broken


def nan_loss(run) -> None:
    """The loss of rank 1 is NaN, once."""
    _on_last_rank(run, lambda totals: totals.loss.fill_(float("nan")), [BAD_STEP])


def infinite_energy(run) -> None:
    """An energy of rank 1 is infinite, once."""
    _on_last_rank(run, lambda totals: totals.energies[:1].fill_(float("inf")), [BAD_STEP])


def nan_gradient(run) -> None:
    """One entry of a gradient of rank 1 is NaN, once."""
    parameter = next(p for n, p in run.trainer.model.named_parameters() if "fc2" in n)
    _on_last_rank(run, lambda totals: parameter.main_grad.view(-1)[3].fill_(float("nan")), [BAD_STEP])


def nan_for_good(run) -> None:
    """Every loss of rank 1 is NaN from a step on."""
    _on_last_rank(run, lambda totals: totals.loss.fill_(float("nan")), range(BAD_STEP, 1000))


def spike(run) -> None:
    """The loss of step 8 is a hundred times what it was, once."""
    original, seen = run.trainer.train_step, []

    def jumping(micro_batches, iteration):
        result = original(micro_batches, iteration)
        if iteration == 7 and not seen:
            seen.append(iteration)
            result.loss *= 100
        return result

    run.trainer.train_step = jumping


def full_disk(run) -> None:
    """No space is left on rank 1 from step 4 to step 8."""
    _no_space(run, range(4, 9))


def _no_space(run, steps) -> None:
    from ebt_megatron.checkpoint import checkpoints as checkpoint

    original = checkpoint._write

    def failing(path, data):
        if run.state.rank == run.state.world_size - 1 and run.step in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, data)

    checkpoint._write = failing


def full_at_the_end(run) -> None:
    """No space is left at the last step."""
    _no_space(run, [12])


def _signal(run, number, at=5) -> None:
    original = run.trainer.train_step

    def disturbed(micro_batches, iteration):
        if iteration + 1 == at:
            os.kill(os.getpid(), number)
        return original(micro_batches, iteration)

    run.trainer.train_step = disturbed


def sigterm(run) -> None:
    """Told to stop in step 5."""
    _signal(run, signal.SIGTERM)


def ctrl_c(run) -> None:
    """Ctrl-C in step 5, twice, as torchrun passes it on."""
    _signal(run, signal.SIGINT)
    _signal(run, signal.SIGINT)


def full_when_told_to_stop(run) -> None:
    """Told to stop in step 5, and no space left."""
    sigterm(run)
    _no_space(run, [5])


def bad_streak(run) -> None:
    """Steps 5, 6 and 7 are not finite."""
    _on_last_rank(run, lambda totals: totals.loss.fill_(float("nan")), range(4, 7))


def sigterm_in_a_bad_streak(run) -> None:
    """Told to stop in step 5, which is not finite, as are 6 and 7."""
    bad_streak(run)
    sigterm(run)


def bad_end(run) -> None:
    """The last two steps are not finite."""
    _on_last_rank(run, lambda totals: totals.loss.fill_(float("nan")), range(10, 12))


def killed_between_saving_and_recording(run) -> None:
    """Ends, as by a kill, when validation at step 8 begins."""

    from ebt_megatron.training.hooks import Validating

    def killed(hook, row):
        if run.step == 8:
            Validating._validate = original
            raise StoppedHere
        original(hook, row)

    original, Validating._validate = Validating._validate, killed


def no_data(run) -> None:
    """The last rank cannot read the samples of step 6."""
    original = run.train_data.read

    def failing(positions):
        if run.state.rank == run.state.world_size - 1 and max(positions) >= 5 * 4:
            raise DataError("shard-000001.tar is damaged")
        return original(positions)

    run.train_data.read = failing


def no_validation_data(run) -> None:
    """The last rank cannot read what the run is validated on."""

    def failing(positions):
        raise OSError(errno.EIO, "Input/output error", "shard-000000.tar")

    if run.state.rank == run.state.world_size - 1:
        run.validation_data.read = failing


class StoppedHere(RuntimeError):
    """Stands for a kill."""
