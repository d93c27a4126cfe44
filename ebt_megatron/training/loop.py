"""The training loop."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ebt_megatron import cli
from ebt_megatron.config import Recipe, RecipeError, check, to_yaml
from ebt_megatron.data.loader import Loader, identity
from ebt_megatron.evaluation.perplexity import validate
from ebt_megatron.model.build import SampleShape
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.training.checkpoint import Checkpoints
from ebt_megatron.training.faults import BadSteps, SpikeDetector, StopSignal, Watchdog
from ebt_megatron.training.flops import training_flops
from ebt_megatron.training.history import move_earlier_run
from ebt_megatron.training.lock import RunLock
from ebt_megatron.training.metrics import Clock, MetricsWriter, console_line, last_step, peak_memory_bytes
from ebt_megatron.training.optimizer import schedule_change, schedule_of
from ebt_megatron.training.trainer import StepResult, Trainer

_MANY_EPOCHS = 4  # repeating data up to about so often is nearly as good as new data (Muennighoff et al., 2305.16264)


class StoppedRun(RuntimeError):
    """Training cannot go on, or what it made is not saved; the message says why and what there is to go on from."""


class Run:
    """A recipe from its first or last saved step to its end.

    Args:
        recipe: resolved and checked.

    Raises:
        RecipeError, DataError: if layout, data or output folder do not do.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.training.output_dir)
        state = initialize(recipe.parallel, recipe.training.seed)
        check(recipe, state.world_size)
        self.is_main = state.rank == 0
        self._on_main(partial(_check_writable, self.folder))
        self.train_data = Loader(recipe, "train", state.data_rank, state.data_size)
        self.vocab_size = self.train_data.sources[0].manifest.vocab_size
        self.validation_data = None
        if recipe.training.validation_interval:
            self.validation_data = Loader(recipe, "validation", state.data_rank, state.data_size)
        self._look_at_amounts()
        self.trainer = Trainer(recipe, SampleShape(vocab_size=self.vocab_size))
        self.state, self.timers = self.trainer.state, self.trainer.timers
        self.step = 0
        self.tokens = 0
        self.bad = BadSteps(recipe.training.max_bad_steps)
        self.unwritten: dict[str, Any] | None = None  # the row of the step that was resumed from
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            recipe.training.keep_checkpoints,
            fingerprint(recipe, self.train_data.sources[0].manifest.tokenizer["sha256"]),
            recipe.training.async_save,
            self.warn,
        )

    def say(self, text: str, style: str = "") -> None:
        """Print on rank 0."""
        if self.is_main:
            cli.say(text, style)

    def warn(self, text: str) -> None:
        """Print on rank 0, to be seen."""
        self.say(text, "yellow")

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, or raises there, on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (RecipeError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _look_at_amounts(self) -> None:
        options = self.recipe.training
        turns, source = self.train_data.most_repeated(options.steps * options.global_batch_size)
        if turns > _MANY_EPOCHS:
            self.warn(f"training.steps={options.steps} goes {turns:.3g} times through {source}: past about "
                      f"{_MANY_EPOCHS} epochs repeated data teaches little: prepare more, or train less")  # fmt: skip
        if self.validation_data is not None and self.validation_data.validation_samples < options.validation_samples:
            self.say(f"validation is on all {self.validation_data.validation_samples} samples of data.validation: "
                     f"training.validation_samples={options.validation_samples} are not there")  # fmt: skip

    def restore(self, newest: Path) -> None:
        """Go back to a checkpoint."""
        t = self.trainer
        self.step, extra, rank_states = self.checkpoints.load(newest, t.model, t.optimizer, t.scheduler)
        self.tokens = extra["tokens"]
        self.train_data.load_state_dict(extra["data"])
        t.objective.load_rank_states(rank_states)
        # What follows is not in older checkpoints.
        self.bad.in_a_row = extra.get("bad_in_a_row", 0)
        self.unwritten = extra.get("row")
        if change := schedule_change(self.recipe, extra.get("schedule", {}), self.step):
            self.warn(change)
        if extra.get("validation", self._validation_identity()) != self._validation_identity():
            self.warn("data.validation or training.validation_samples changed: validation losses before and after "
                      f"step {self.step} are of other samples")  # fmt: skip

    def _validation_identity(self) -> list[Any] | None:
        data = self.validation_data
        return None if data is None else [data.validation_samples, *(identity(s.manifest) for s in data.sources)]

    def _write_checkpoint(self, row: dict[str, Any] | None) -> str | None:
        extra = {
            "tokens": self.tokens, "data": self.train_data.state_dict(), "schedule": schedule_of(self.recipe),
            "validation": self._validation_identity(), "bad_in_a_row": self.bad.in_a_row, "row": row,
        }  # fmt: skip
        t, good = self.trainer, not self.bad.in_a_row
        with self.timers.phase("save"):
            return self.checkpoints.save(
                self.step, t.model, t.optimizer, t.scheduler, extra, t.objective.rank_state(), prune=good
            )

    def save(self, row: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; a failure is shown and training goes on."""
        self._report_unsaved(self._write_checkpoint(row))

    def _save_last(self, row: dict[str, Any] | None) -> str | None:
        """Write a checkpoint to its end; returns why it is not there, if it failed."""
        self._report_unsaved(self.checkpoints.wait())
        if self.bad.in_a_row:
            self.warn(f"the last {self.bad.in_a_row} steps were not finite: step {self.step} is saved with the weights "
                      f"of step {self.step - self.bad.in_a_row}, and no older checkpoint goes")  # fmt: skip
        error = self._write_checkpoint(row)
        return self.checkpoints.wait() or error

    def _report_unsaved(self, error: str | None) -> None:
        if error:
            self.say(f"checkpoint not saved: {error}; training goes on", "red")

    def _micro_batches(self, stream: Iterator[Any]) -> list[Any]:
        options = self.recipe.training
        count = options.global_batch_size // (options.micro_batch_size * self.state.data_size)
        with self.timers.phase("data"):
            return list(itertools.islice(stream, count))

    def _validate(self, row: dict[str, Any]) -> None:
        """Add to a row the loss after the trained number of steps, and at one step (None for a feed-forward model)."""
        assert self.validation_data is not None
        thinks = self.recipe.model.architecture == "ebt"
        steps = self.recipe.thinking.max_steps if thinks else 1
        with self.timers.phase("validation"):
            groups = self.state.data_group, self.state.pipeline_group
            losses = validate(self.trainer.objective, self.validation_data, steps, 0, *groups).losses
        row["validation_loss"] = losses[-1].item()
        row["validation_loss_one_step"] = losses[0].item() if thinks else None
        self.say(f"step {self.step}: validation loss {row['validation_loss']:.4f}")

    def _validates(self) -> bool:
        interval = self.recipe.training.validation_interval
        return interval > 0 and (self.step % interval == 0 or self.step == self.recipe.training.steps)

    def run(self) -> None:
        """Train to the end. The folder is this run's alone meanwhile.

        Raises:
            StoppedRun: after too many steps in a row that were not finite, or if the last step could not be saved.
            RecipeError, DataError: if another run has the folder, or its checkpoints do not fit this one.
        """
        lock = RunLock(self.folder)
        try:
            self._on_main(lock.acquire)
            self._begin()
            self._train()
        finally:
            lock.release()

    def _begin(self) -> None:
        """Go on from the newest checkpoint, or begin anew."""
        if not self.recipe.training.resume and (moved := self._on_main(partial(move_earlier_run, self.folder))):
            self.warn(f"training.resume=false: what an earlier run left in {self.folder} is moved to {moved}")
        newest = self.checkpoints.resume_point()
        if newest:
            self.restore(newest)
            self.say(f"resumed from {newest}")
        # Only now: a run that does not fit the folder must leave it as it is.
        self.checkpoints.go_on_from(self.step)
        self._on_main(partial(_replace, self.folder / "recipe.yaml", to_yaml(self.recipe)))
        logged = self._on_main(partial(last_step, self.folder))
        if logged > self.step:
            why = "" if newest else f"no checkpoint in {self.checkpoints.folder}, starting at step 0: "
            self.warn(f"{why}metrics.jsonl goes to step {logged}; its rows after step {self.step} are kept in "
                      "metrics-replaced.jsonl")  # fmt: skip
        if logged >= self.step:
            self.unwritten = None

    def _train(self) -> None:
        options = self.recipe.training
        writer = self._on_main_writer()
        stop, bad = StopSignal(), self.bad
        spikes = SpikeDetector(options.spike_factor, options.spike_window)
        watchdog = Watchdog(self.timers, self.recipe.parallel.timeout_seconds)
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        self.say(
            f"{self.recipe.name}: {parameters / 1e6:.2f} M parameters a rank, {self.state.world_size} ranks (tensor "
            f"{self.state.tensor_size}, pipeline {self.state.pipeline_size}, data {self.state.data_size}), "
            f"steps {self.step} to {options.steps}"
        )
        stream = iter(self.train_data)
        profiler = self._profiler()
        clock = Clock(options.steps, self.step)
        waited, told, due = self.train_data.wait_seconds, self.step, False
        try:
            if self.unwritten is not None:  # the run was ended between saving a step and recording it
                if self._validates():
                    self._validate(self.unwritten)
                if writer is not None:
                    writer.write(self.unwritten)
            while self.step < options.steps:
                watchdog.step = self.step
                logged = (self.step + 1) % options.log_interval == 0 or self.step + 1 == options.steps
                self.timers.synchronize = logged
                result = self.trainer.train_step(self._micro_batches(stream), self.step)
                self.step += 1
                self.tokens += result.positions
                if profiler is not None:
                    profiler.step()
                seconds = clock.tick(self.step)
                if bad.record(result.applied):
                    self._report_unsaved(self.checkpoints.wait())
                    raise StoppedRun(
                        f"{bad.in_a_row} steps in a row were not finite (the last is step {self.step}); the last good "
                        f"checkpoint is {self.checkpoints.newest_good()}"
                    )
                if not result.applied:
                    self.warn(f"step {self.step} skipped: not finite ({bad.total} so far)")
                if spikes.is_spike(result.loss):
                    self._rewind(result.loss)
                    stream = iter(self.train_data)
                    waited, told = self.train_data.wait_seconds, self.step
                    continue
                ends, validates = self.step == options.steps, self._validates()
                row: dict[str, Any] | None = None
                if logged or validates or ends:
                    # Data comes for several steps at once: its wait is the mean of all since the last row.
                    wait = (self.train_data.wait_seconds - waited) / (self.step - told)
                    waited, told = self.train_data.wait_seconds, self.step
                    row = self._row(result, seconds, wait)
                self._report_unsaved(self.checkpoints.poll())
                due = due or (options.save_interval > 0 and self.step % options.save_interval == 0)
                # In a streak of bad steps nothing is saved, and a run told to stop takes steps until one is good.
                last = ends or (stop.agreed(self.state.device) and not bad.in_a_row)
                unsaved = None
                if last:
                    unsaved = self._save_last(row)
                elif due and not bad.in_a_row:
                    self.save(row)
                    due = False
                if row is not None and validates:
                    self._validate(row)
                if row is not None and writer is not None:
                    writer.write(row)
                    self.say(console_line(row, options.steps, clock.left(self.step)))
                if unsaved:
                    raise StoppedRun(f"step {self.step} is not saved: {unsaved}; the newest good checkpoint is "
                                     f"{self.checkpoints.newest_good()}")  # fmt: skip
                if last and not ends:
                    self.say(f"told to stop: saved step {self.step}; run the same command to go on")
                    return
        finally:
            stream.close()
            watchdog.stop()
            if profiler is not None:
                profiler.stop()
            if writer is not None:
                writer.close()

    def _on_main_writer(self) -> MetricsWriter | None:
        made: list[MetricsWriter] = []
        given = self.folder, self.step, self.warn, self.recipe.training.metrics
        self._on_main(lambda: made.append(MetricsWriter(*given)))
        return made[0] if made else None

    def _profiler(self) -> Any:
        """Traces training.profile_steps steps, after one to warm up, into OUTPUT_DIR/trace (rank 0)."""
        count = self.recipe.training.profile_steps
        if not count or not self.is_main:
            return None
        write = torch.profiler.tensorboard_trace_handler(str(self.folder / "trace"))

        def ready(trace: Any) -> None:
            try:
                write(trace)
            except (OSError, RuntimeError) as error:
                self.warn(f"trace/ not written: {error}")

        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=count, repeat=1), on_trace_ready=ready
        )
        profiler.start()
        return profiler

    def _rewind(self, loss: float) -> None:
        """Go back to the newest checkpoint, but not back in the data: what made the loss jump is skipped."""
        self._report_unsaved(self.checkpoints.wait())
        newest = self.checkpoints.newest_good()
        if newest is None:
            self.warn(f"loss spike at step {self.step} ({loss:.4f}); no checkpoint to go back to")
            return
        position, spiked_at = self.train_data.state_dict(), self.step
        self.restore(newest)
        self.checkpoints.go_on_from(self.step)
        self.train_data.load_state_dict(position)
        self.warn(f"loss spike at step {spiked_at} ({loss:.4f}): back to step {self.step}, data skipped")

    def _row(self, result: StepResult, seconds: float, wait: float) -> dict[str, Any]:
        """What metrics.jsonl records; straggler ratio and memory are gathered from all ranks."""
        phases = self.timers.take()
        mine = torch.tensor([seconds, float(peak_memory_bytes())], dtype=torch.float64, device=self.state.device)
        gathered = [torch.zeros_like(mine) for _ in range(self.state.world_size)]
        # Time in this rank's own work, without waiting for others, is what makes a straggler.
        mine[0] -= phases.get("communication", 0.0) / max(1, self.recipe.training.log_interval)
        dist.all_gather(gathered, mine)
        times, memory = torch.stack(gathered).unbind(1)
        flops = training_flops(self.recipe, self.vocab_size) / seconds
        peak = self.recipe.training.peak_tflops * 1e12 * self.state.world_size
        thinks = bool(result.energies)
        return {
            "step": self.step,
            "epoch": self.train_data.epoch,
            "loss": result.loss,
            "initial_loss": result.step_losses[0],
            "final_step_loss": result.step_losses[-1],
            "step_losses": result.step_losses,
            "step_energies": result.energies,
            "energy_first": result.energies[0] if thinks else None,
            "energy_last": result.energies[-1] if thinks else None,
            "alpha": result.alpha if thinks else None,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": self.tokens,
            "tokens_per_second": result.positions / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": wait,
            "peak_memory_bytes": int(memory.max()),
            "memory_bytes_per_rank": {str(i): int(m) for i, m in enumerate(memory)},
            "straggler_ratio": float(times.max() / times.mean()),
            "model_flops_per_second": flops,
            "model_flops_utilisation": flops / peak if peak else None,
            "bad_steps": self.bad.total,
            "phase_seconds": {k: round(v, 6) for k, v in phases.items()},
        }


def _check_writable(folder: Path) -> None:
    """Raise RecipeError if no files can be made in `folder`, which need not be there yet."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise RecipeError(f"training.output_dir={folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"training.output_dir={folder}: {there} cannot be written")


def _replace(path: Path, text: str) -> None:
    """Write a file so that a full disk leaves the old one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def fingerprint(recipe: Recipe, tokenizer: str) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it."""
    model = asdict(recipe.model)
    for key in ("size", "kernels", "recompute_layers", "initialization"):
        del model[key]
    out = {f"model.{key}": value for key, value in model.items()}
    out["tokenizer"] = tokenizer
    if recipe.model.architecture == "ebt":
        out["thinking.max_steps"] = recipe.thinking.max_steps
        out["thinking.step_rule"] = recipe.thinking.step_rule
    return out
