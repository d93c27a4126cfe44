"""Checkpoints: megatron-core's distributed format, published atomically and verified on load.

A checkpoint is a folder `step-00000200` written under another name, its files' checksums
recorded, and renamed when complete, so a reader never sees half of one. Weights are stored
as whole tensors cut into shards, so another layout can load them. If the newest checkpoint
is damaged, loading says so and takes the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from ebt_megatron.config import RecipeError

logger = logging.getLogger(__name__)

# The distributed optimizer's state is stored so that any data-parallel size can load it.
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the message says which and why."""


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json")


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its recorded checksum.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        recorded = json.loads((folder / "checksums.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: checksums.json cannot be read ({error})") from None
    for name, digest in recorded.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{folder}: {name} is missing")
        if _digest(path) != digest:
            raise CheckpointError(f"{folder}: {name} does not match its checksum")


def _agree(error: str | None) -> str | None:
    """The first error any rank has, on every rank."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((e for e in errors if e), None)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder for each checkpoint.
        keep: how many of the newest stay.
        fingerprint: what must be equal for a checkpoint to fit the model.
    """

    def __init__(self, folder: Path, keep: int, fingerprint: dict[str, Any]):
        self.folder, self.keep, self.fingerprint = folder, keep, fingerprint
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)

    def published(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-????????") if p.is_dir())

    @staticmethod
    def _state(model: Any, optimizer: Any | None, loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"model": model.sharded_state_dict(prefix="model.")}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(
                state["model"], is_loading=loading, metadata=_OPTIMIZER_METADATA
            )
        return state

    def save(
        self, step: int, model: Any, optimizer: Any, scheduler: Any, extra: dict[str, Any],
        rank_state: dict[str, Any] | None = None,
    ) -> str | None:  # fmt: skip
        """Write and publish a checkpoint; all ranks call it together.

        Args:
            step: optimizer steps done.
            model, optimizer, scheduler: what to save (the model unwrapped).
            extra: small, equal on every rank.
            rank_state: this rank's own tensors (its part of the replay buffer), stored beside.

        Returns:
            None, or why nothing was published (a full disk, say); earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f"step-{step:08d}.partial"
        error: str | None = None
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as reason:
                error = f"{partial}: {reason}"
        if error := _agree(error):
            return error
        state = self._state(model, optimizer, loading=False)
        state |= {"scheduler": scheduler.state_dict(), "extra": extra, "step": step, "fingerprint": self.fingerprint}
        try:
            dist_checkpointing.save(
                state, str(partial), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            )
            if rank_state:
                torch.save(rank_state, partial / f"rank-{dist.get_rank():05d}.pt")
        except Exception as reason:  # whatever the storage raised: training goes on
            error = f"{partial}: {type(reason).__name__}: {reason}"
        error = _agree(error)
        if dist.get_rank() == 0:
            try:
                if error:
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    self._publish(partial, final)
            except OSError as reason:
                error = f"{final}: {reason}"
                shutil.rmtree(partial, ignore_errors=True)
        return _agree(error)

    def _publish(self, partial: Path, final: Path) -> None:
        sums = {str(p.relative_to(partial)): _digest(p) for p in _files(partial)}
        record = partial / "checksums.json"
        with record.open("w") as stream:
            json.dump(sums, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in self.published()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def newest_good(self, report: Callable[[str], None] = logger.warning) -> Path | None:
        """The newest checkpoint whose checksums hold, the same on every rank; reports those that do not."""
        chosen: list[str | None] = [None]
        if dist.get_rank() == 0:
            for folder in reversed(self.published()):
                try:
                    verify(folder)
                except CheckpointError as error:
                    report(f"damaged checkpoint skipped: {error}")
                    continue
                chosen = [str(folder)]
                break
        dist.broadcast_object_list(chosen, src=0)
        return Path(chosen[0]) if chosen[0] else None

    def load(
        self, folder: Path, model: Any, optimizer: Any | None = None, scheduler: Any | None = None
    ) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Load a checkpoint, whatever layout wrote it.

        Args:
            folder: from `newest_good`.
            model: unwrapped.
            optimizer, scheduler: None to load weights only.

        Returns:
            The step, the `extra` saved with it, and every writing rank's `rank_state`.

        Raises:
            RecipeError: if it belongs to another model.
        """
        common = dist_checkpointing.load_common_state_dict(str(folder))
        for key, value in self.fingerprint.items():
            saved = common["fingerprint"].get(key)
            if saved != value:
                raise RecipeError(
                    f"{folder} was written with {key}={saved}, this run has {key}={value}: resume with the same "
                    "model, or set another training.output_dir"
                )
        loaded = dist_checkpointing.load(self._state(model, optimizer, loading=True), str(folder))
        model.load_state_dict(loaded["model"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(common["scheduler"])
        rank_states = [torch.load(p, weights_only=True) for p in sorted(folder.glob("rank-*.pt"))]
        return common["step"], common["extra"], rank_states
