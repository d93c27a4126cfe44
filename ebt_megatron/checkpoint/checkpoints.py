"""Checkpoints: megatron-core's distributed format, published atomically and verified on load.

`history.py` names, verifies and removes them. Weights are stored as whole tensors cut into
shards, so another layout can load them. If the newest checkpoint is damaged, loading says so
and takes the one before it.

megatron-core plans what each rank writes; the writing itself happens here, in a thread
(megatron-core forks processes and starts a manager, which hangs without a __main__ guard),
and every rank learns of any rank's error before the next collective.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

from ebt_megatron.checkpoint.average import WeightAverage, renamed
from ebt_megatron.checkpoint.history import CheckpointError, History, located, verify
from ebt_megatron.checkpoint.history import digest as _digest
from ebt_megatron.checkpoint.history import write as _write
from ebt_megatron.checkpoint.optimizer_state import OptimizerState
from ebt_megatron.config import Recipe, RecipeError

logger = logging.getLogger(__name__)
_FULL = 1 << 20  # bytes left on a disk that is called full


class _Writer(filesystem_async.FileSystemWriterAsync):
    """megatron-core's writer, in the calling thread instead of forked processes."""

    @staticmethod
    def write_preloaded_data_multiproc(  # type: ignore[override]
        transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
    ) -> None:
        """Write this rank's files and put {file number: results}, or the exception, into `results`."""
        written: Any = {}
        for number, bucket in enumerate(buckets):
            answer: queue.Queue[Any] = queue.Queue()
            started: queue.Queue[int] = queue.Queue()
            started.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, answer, started, use_fsync=True
            )
            _, outcome = answer.get()
            if isinstance(outcome, Exception):
                raise outcome
            written[number] = outcome
        results.put(written)


# The strategy and the writer look these names up in their own modules.
torch_strategy.FileSystemWriterAsync = _Writer
filesystem_async._get_write_results_queue = queue.Queue


class _Strategy(torch_strategy.TorchDistSaveShardedStrategy):
    """Plans a save, and leaves writing and finishing to the caller."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: tuple[Any, ...]) -> Any:
        return writer, planned[1]


def _why(folder: Path, reason: Exception) -> str:
    """One line on what the storage raised; writers of other libraries do not say that the disk is full."""
    text = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
    full = getattr(reason, "errno", None) == errno.ENOSPC
    with contextlib.suppress(OSError):
        full = full or shutil.disk_usage(folder.parent).free < _FULL
    return f"{text} (the disk is full)" if full else text


def _agree(error: str | None) -> str | None:
    """The first error any rank has, on every rank."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((e for e in errors if e), None)


@dataclass
class _Pending:
    """A save whose files are being written.

    Attributes:
        folder: where it is written.
        writer, metadata: megatron-core's writer, and (on rank 0) what its index will say.
        digests: resolves to the checksums of this rank's files, or raises what the storage raised.
        prune: whether older checkpoints go.
    """

    folder: Path
    writer: Any
    metadata: Any
    digests: Future[dict[str, str]]
    prune: bool


def _serialized(state: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together.

    Args:
        folder: holds one folder for each checkpoint.
        keep: how many of the newest stay; 0: all.
        fingerprint: what must be equal for a checkpoint to fit the model.
        asynchronous: `save` returns once the state is copied; call `poll` every step.
        report: told, on rank 0, of checkpoints that are damaged or set aside.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        fingerprint: dict[str, Any],
        asynchronous: bool = False,
        report: Callable[[str], None] = logger.warning,
    ):
        self.folder, self.fingerprint, self.asynchronous, self.report = folder, fingerprint, asynchronous, report
        self.history = History(folder, keep)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    def published(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return self.history.published()

    def save(
        self,
        step: int,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        extra: dict[str, Any],
        rank_state: dict[str, Any] | None = None,
        prune: bool = True,
        average: WeightAverage | None = None,
    ) -> str | None:
        """Write and publish a checkpoint.

        Args:
            step: optimizer steps done.
            model, optimizer, scheduler: what to save (the model unwrapped).
            extra: small, equal on every rank.
            rank_state: this rank's own tensors (its part of the replay buffer), stored beside.
            prune: older checkpoints than the newest `keep` go once this one is there.
            average: of the weights, where one is kept.

        Returns:
            None, or why nothing was published (a full disk, say); earlier checkpoints are untouched.
            Asynchronous: the same about the save before this one, if it was still under way.
        """
        earlier = self.wait()
        partial = self.folder / f"step-{step:08d}.partial"
        error: str | None = None
        if dist.get_rank() == 0:
            try:
                self.history.start_partial(step)
            except OSError as reason:
                error = f"{partial}: {_why(partial, reason)}"
        if error := _agree(error):
            return error
        model_state = model.sharded_state_dict(prefix="model.")
        optimizer_state = OptimizerState(optimizer, model_state, loading=False)
        whole = {"model": model_state, "optimizer": optimizer_state.tensors}
        if average is not None:
            whole["average"] = average.sharded(model_state)
        sharded, _ = save_preprocess(whole, validate_access_integrity=True)
        writer, metadata = _Strategy().async_save(sharded, partial)
        function, to_cpu, arguments = writer.get_save_function_and_args()
        if function is not None:
            buckets = to_cpu()
            if self.asynchronous:  # training goes on changing what is being written
                buckets = [
                    (*where, (objects, [(i, t.clone()) for i, t in tensors])) for *where, (objects, tensors) in buckets
                ]
            arguments[1] = buckets
        own_files = {}
        if rank_state:
            own_files[f"rank-{dist.get_rank():05d}.pt"] = _serialized(rank_state)
        if dist.get_rank() == 0:
            own_files["common.pt"] = _serialized(
                {
                    "step": step,
                    "extra": extra,
                    "fingerprint": self.fingerprint,
                    "schedule_steps": scheduler.num_steps,
                    "optimizer_steps": optimizer_state.step,
                    "averaged": average is not None,
                }
            )

        def write() -> dict[str, str]:
            if function is not None:
                function(*arguments)
            for name, data in own_files.items():
                _write(partial / name, data)
            names = [storage_key for _, storage_key, _ in arguments[1]] if function is not None else []
            return {name: _digest(partial / name) for name in [*names, *own_files]}

        self._pending = _Pending(partial, writer, metadata, self._thread.submit(write), prune)
        return earlier if self.asynchronous else self.wait()

    def poll(self) -> str | None:
        """Publish the save under way if every rank has written its part; returns why not, if it failed."""
        if self._pending is None:
            return None
        done = torch.tensor([int(self._pending.digests.done())])
        dist.all_reduce(done, dist.ReduceOp.MIN)
        return self.wait() if done.item() else None

    def wait(self) -> str | None:
        """Finish the save under way, if there is one; returns why it was not published, if it failed."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        error, digests, results = None, {}, None
        try:
            digests = pending.digests.result()
            results = pending.writer.retrieve_write_results()
        except Exception as reason:  # whatever the storage raised: training goes on
            error = f"{pending.folder} (rank {dist.get_rank()}): {_why(pending.folder, reason)}"
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (error, digests, results))
        error = next((e for e, _, _ in gathered if e), None)
        if dist.get_rank() == 0:
            try:
                if error is None:
                    pending.writer.finish(pending.metadata, [r for _, _, r in gathered])
                    save_config(CheckpointingConfig("torch_dist", 1), str(pending.folder))
                    sums = {name: digest for _, part, _ in gathered for name, digest in part.items()}
                    sums |= {name: _digest(pending.folder / name) for name in (".metadata", "metadata.json")}
                    self.history.publish(pending.folder, sums, pending.prune, self.report)
            except Exception as reason:
                error = f"{pending.folder}: {_why(pending.folder, reason)}"
            if error:
                shutil.rmtree(pending.folder, ignore_errors=True)
        return _agree(error)

    def newest_good(self, report: Callable[[str], None] | None = None) -> Path | None:
        """The newest checkpoint whose checksums hold, the same on every rank; reports those that do not."""
        chosen: list[Any] = [None]
        if dist.get_rank() == 0:
            chosen = [self.history.newest_good(report or self.report)]
        dist.broadcast_object_list(chosen, src=0)
        return chosen[0]

    def resume_point(self) -> Path | None:
        """The newest good checkpoint; None if there are none at all.

        Raises:
            RecipeError: if there are checkpoints and all are damaged: to begin anew must be asked for.
        """
        newest = self.newest_good()
        none: list[bool] = [not self.published()]
        dist.broadcast_object_list(none, src=0)
        if newest is None and not none[0]:
            raise RecipeError(
                f"every checkpoint in {self.folder} is damaged: put a good one there, or set "
                "training.resume=false to begin anew (they are moved, not deleted)"
            )
        return newest

    def go_on_from(self, step: int) -> None:
        """Make `step` the newest of the history: later checkpoints are set aside.

        Raises:
            OSError: on every rank, if they cannot be moved.
        """
        error = None
        if dist.get_rank() == 0:
            try:
                self.history.set_aside_after(step, self.report)
            except OSError as reason:
                error = f"{self.folder}: {reason}"
        if error := _agree(error):
            raise OSError(None, error, str(self.folder))

    def load(
        self,
        folder: Path,
        model: Any,
        optimizer: Any | None = None,
        scheduler: Any | None = None,
        average: WeightAverage | None = None,
    ) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Load a checkpoint, whatever layout wrote it.

        Args:
            folder: from `newest_good`.
            model: unwrapped.
            optimizer, scheduler: None to load weights only: their average, where the checkpoint has one.
            average: of the weights, where one is kept; begins with the weights of a checkpoint that has none.

        Returns:
            The step, the `extra` saved with it, and every writing rank's `rank_state`.

        Raises:
            RecipeError: if it belongs to another model.
        """
        common = dist_checkpointing.load_common_state_dict(str(folder))
        for key, value in self.fingerprint.items():
            saved = common["fingerprint"].get(key, value)  # older checkpoints do not know every key
            if saved != value:
                raise RecipeError(
                    f"{folder} was written with {key}={saved}, this run has {key}={value}: resume with the same "
                    "model, or set another training.output_dir"
                )
        model_state = model.sharded_state_dict(prefix="model.")
        averaged = common.get("averaged", False)  # older checkpoints have no average
        wanted: dict[str, Any] = {"model": model_state}
        if averaged and optimizer is None:
            wanted["model"] = {k: renamed(v) if isinstance(v, ShardedTensor) else v for k, v in model_state.items()}
        elif averaged and average is not None:
            wanted["average"] = average.sharded(model_state)
        optimizer_state = None
        if optimizer is not None:
            optimizer_state = OptimizerState(optimizer, model_state, loading=True)
            wanted["optimizer"] = dict(optimizer_state.tensors)
        loaded = dist_checkpointing.load(wanted, str(folder))
        model.load_state_dict(loaded["model"])
        if average is not None:
            average.reset()
            average.weights.update(loaded.get("average", {}))
        if optimizer_state is not None:
            optimizer_state.restore(loaded["optimizer"], common["optimizer_steps"])
        if scheduler is not None:
            scheduler.num_steps = common["schedule_steps"]
            scheduler.step(0)
        rank_states = [torch.load(p, weights_only=True) for p in sorted(folder.glob("rank-*.pt"))]
        return common["step"], common["extra"], rank_states


def chosen(source: Path) -> Path:
    """The checkpoint that a path means, verified: see `history.located`; of a run its newest good one.

    Raises:
        RecipeError: if it is damaged, or a run holds no good one.
    """
    run, folder = located(source)
    if folder is None:
        folder = Checkpoints(run / "checkpoints", 1, {}).newest_good()
        if folder is None:
            raise RecipeError(f"{run} holds no good checkpoint: train it first")
        return folder
    try:
        verify(folder)
    except CheckpointError as error:
        raise RecipeError(f"damaged checkpoint: {error}") from None
    return folder


def fingerprint(recipe: Recipe, identity: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it.

    Args:
        recipe: the run.
        identity: its task's.
    """
    model = asdict(recipe.model)
    for key in ("size", "kernels", "recompute_layers", "initialization"):
        del model[key]
    if model["architecture"] == "baseline":
        model["architecture"] = "transformer"  # as checkpoints of every version say
    out = {f"model.{key}": value for key, value in model.items()} | identity
    if recipe.model.architecture == "ebt":
        key = "max_steps" if recipe.thinking.landscapes is None else "landscapes"
        out[f"thinking.{key}"] = recipe.thinking.num_landscapes
        out["thinking.step_rule"] = recipe.thinking.step_rule
    return out
