"""What is done beside training: faults, saving, validation, metrics, a trace."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ebt_megatron.checkpoint.history import step_of
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.objectives.validation import validate
from ebt_megatron.training.best import KeepingBest
from ebt_megatron.training.faults import SpikeDetector, StopSignal, Watchdog
from ebt_megatron.training.lock import RunLock
from ebt_megatron.training.loop import Hook, Moment, train
from ebt_megatron.training.metrics import MetricsWriter, console_line, peak_memory_bytes
from ebt_megatron.training.run import Run, StoppedRun


def train_to_end(run: Run) -> None:
    """Train a run as its recipe says. Its folder is this run's alone meanwhile.

    Raises:
        StoppedRun: after too many steps in a row that were not finite, or if the last step could not be saved.
        RecipeError, DataError: if another run has the folder, or its checkpoints do not fit this one.
    """
    lock = RunLock(run.folder)
    try:
        run.on_main(lock.acquire)
        run.begin()
        # In this order: what went wrong is not saved; what is saved knows what will be recorded of its step; saving
        # does not wait for validation, but for what validation says is best.
        kinds = (Supervision, Trace, BadLosses, Recording, Saving, Validating, KeepingBest, Writing)
        train(run, [kind(run) for kind in kinds])
    finally:
        lock.release()


class Supervision(Hook):
    """A run that stands still is ended."""

    watchdog: Watchdog | None = None

    def begin(self) -> None:
        """See `Hook`."""
        self.watchdog = Watchdog(self.run.timers, self.run.recipe.parallel.timeout_seconds)
        self.watchdog.step = self.run.step

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        if self.watchdog is not None:
            self.watchdog.step = self.run.step

    def close(self) -> None:
        """See `Hook`."""
        if self.watchdog is not None:
            self.watchdog.stop()


class Trace(Hook):
    """Traces training.profile_steps steps, after one to warm up, into OUTPUT_DIR/trace (rank 0)."""

    profiler: Any = None

    def begin(self) -> None:
        """See `Hook`."""
        count = self.run.recipe.training.profile_steps
        if not count or not self.run.is_main:
            return
        write = torch.profiler.tensorboard_trace_handler(str(self.run.folder / "trace"))

        def ready(trace: Any) -> None:
            try:
                write(trace)
            except (OSError, RuntimeError) as error:
                self.run.warn(f"trace/ not written: {error}")

        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=count, repeat=1), on_trace_ready=ready
        )
        self.profiler.start()

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        if self.profiler is not None:
            self.profiler.step()

    def close(self) -> None:
        """See `Hook`."""
        if self.profiler is not None:
            self.profiler.stop()


class BadLosses(Hook):
    """Steps that were not finite end the run after too many; losses that jump send it back."""

    def begin(self) -> None:
        """See `Hook`."""
        options = self.run.recipe.training
        self.spikes = SpikeDetector(options.spike_factor, options.spike_window)

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        run, bad = self.run, self.run.bad
        if bad.record(moment.result.applied):
            run.report_unsaved(run.checkpoints.wait())
            raise StoppedRun(
                f"{bad.in_a_row} steps in a row were not finite (the last is step {run.step}); the last "
                f"good checkpoint is {run.checkpoints.newest_good()}"
            )
        if not moment.result.applied:
            run.warn(f"step {run.step} skipped: not finite ({bad.total} so far)")
        if self.spikes.is_spike(moment.result.loss):
            self._rewind(moment)

    def _rewind(self, moment: Moment) -> None:
        """Go back to the newest checkpoint, but not back in the data: what made the loss jump is skipped."""
        run, moment.rewound = self.run, True
        run.report_unsaved(run.checkpoints.wait())
        newest, spike = run.checkpoints.newest_good(), f"step {run.step} ({moment.result.loss:.4f})"
        if newest is None:
            run.warn(f"loss spike at {spike}; no checkpoint to go back to")
            return
        run.rewind(newest)
        run.warn(f"loss spike at {spike}: back to step {run.step}, data skipped")


class Recording(Hook):
    """Makes the row of numbers of a step that is logged, validated after, or the last."""

    def begin(self) -> None:
        """See `Hook`."""
        run = self.run
        self.waited, self.steps = run.train_data.wait_seconds, 0
        self.flops = training_flops(run.recipe, run.session.task.cost())
        parameters = sum(p.numel() for p in run.trainer.model.parameters())
        run.say(
            f"{run.recipe.name}: {parameters / 1e6:.2f} M parameters a rank, {run.state.world_size} ranks (tensor "
            f"{run.state.tensor_size}, pipeline {run.state.pipeline_size}, data {run.state.data_size}), "
            f"steps {run.step} to {run.recipe.training.steps}"
        )

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        self.steps += 1
        if moment.logged or moment.ends or validates(self.run):
            # Data comes for several steps at once: its wait is the mean of all since the last row.
            waited = self.run.train_data.wait_seconds
            moment.row = self._row(moment, (waited - self.waited) / self.steps)
            self.waited, self.steps = waited, 0

    def _row(self, moment: Moment, wait: float) -> dict[str, Any]:
        """What metrics.jsonl records; straggler ratio and memory are gathered from all ranks."""
        run, result, seconds = self.run, moment.result, moment.seconds
        state, options = run.state, run.recipe.training
        phases = run.timers.take()
        mine = torch.tensor([seconds, float(peak_memory_bytes())], dtype=torch.float64, device=state.device)
        gathered = [torch.zeros_like(mine) for _ in range(state.world_size)]
        # Time in this rank's own work, without waiting for others, is what makes a straggler.
        mine[0] -= phases.get("communication", 0.0) / max(1, options.log_interval)
        dist.all_gather(gathered, mine)
        times, memory = torch.stack(gathered).unbind(1)
        peak = options.peak_tflops * 1e12 * state.world_size
        thinks = bool(result.energies)
        return {
            "step": run.step,
            "epoch": run.train_data.epoch,
            "loss": result.loss,
            **({} if result.start_loss is None else {"start_loss": result.start_loss}),
            "initial_loss": result.step_losses[0],
            "final_step_loss": result.step_losses[-1],
            "step_losses": result.step_losses,
            "step_energies": result.energies,
            "energy_first": result.energies[0] if thinks else None,
            "energy_last": result.energies[-1] if thinks else None,
            "alpha": result.alpha if thinks else None,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": run.tokens,
            "tokens_per_second": result.positions / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": wait,
            "peak_memory_bytes": int(memory.max()),
            "memory_bytes_per_rank": {str(i): int(m) for i, m in enumerate(memory)},
            "straggler_ratio": float(times.max() / times.mean()),
            "model_flops_per_second": self.flops / seconds,
            "model_flops_utilisation": self.flops / seconds / peak if peak else None,
            "bad_steps": run.bad.total,
            "phase_seconds": {k: round(v, 6) for k, v in phases.items()},
        }


class Saving(Hook):
    """Checkpoints at intervals, at the end and when told to stop."""

    def begin(self) -> None:
        """See `Hook`."""
        self.stop, self.due = StopSignal(), False
        self.row: dict[str, Any] | None = None

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        self.row = moment.row
        run, interval = self.run, self.run.recipe.training.save_interval
        run.report_unsaved(run.checkpoints.poll())
        self.due = self.due or (interval > 0 and run.step % interval == 0)
        # In a streak of bad steps nothing is saved, and a run told to stop takes steps until one is good.
        moment.stops = moment.ends or (self.stop.agreed(run.state.device) and not run.bad.in_a_row)
        if moment.stops:
            moment.unsaved = self._save_last()
        elif self.due and not run.bad.in_a_row:
            run.report_unsaved(run.write_checkpoint(moment.row))
            self.due = False

    def broken_off(self) -> None:
        """Save what was learned since the last checkpoint."""
        run = self.run
        run.report_unsaved(run.checkpoints.wait())
        newest = run.checkpoints.newest_good()
        if run.step == (step_of(newest) if newest else 0):
            return
        if error := self._save_last():
            run.say(f"step {run.step} is not saved: {error}; the newest good checkpoint is {newest}", "red")
        else:
            run.warn(f"saved step {run.step}, before the error that ends this run")

    def _save_last(self) -> str | None:
        """Write a checkpoint to its end; returns why it is not there, if it failed."""
        run = self.run
        run.report_unsaved(run.checkpoints.wait())
        if run.bad.in_a_row:
            run.warn(
                f"the last {run.bad.in_a_row} steps were not finite: step {run.step} is saved with the weights "
                f"of step {run.step - run.bad.in_a_row}, and no older checkpoint goes"
            )
        error = run.write_checkpoint(self.row)
        return run.checkpoints.wait() or error


_IDLE = 1e-4  # share of the loss that thinking changes, below which it does nothing


def validates(run: Run) -> bool:
    """Whether the run is to be validated after the step it has taken."""
    interval = run.recipe.training.validation_interval
    return interval > 0 and (run.step % interval == 0 or run.step == run.recipe.training.steps)


class Validating(Hook):
    """Adds to a row the loss after the trained number of steps, and at one step (None for a feed-forward model).

    Where thinking starts at the context's prediction, the loss of that as well.
    """

    def begin(self) -> None:
        """A run may have been ended between saving a step and recording it."""
        if self.run.unwritten is not None and validates(self.run):
            self._validate(self.run.unwritten)

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        if moment.row is not None and validates(self.run):
            self._validate(moment.row)

    def _validate(self, row: dict[str, Any]) -> None:
        run, objective = self.run, self.run.trainer.objective
        assert run.validation_data is not None
        steps = run.recipe.thinking.max_steps if objective.thinks else 1
        with run.timers.phase("validation"):
            batches = (batch for some in iter(partial(run.read, iter(run.validation_data)), []) for batch in some)
            with run.trainer.averaged():
                losses = validate(objective, batches, steps, measure=False).by_steps()
        row["validation_loss"] = losses[steps]
        row["validation_loss_one_step"] = losses[1] if objective.thinks else None
        if 0 in losses:
            row["validation_loss_no_step"] = losses[0]
            if math.isclose(losses[0], losses[steps], rel_tol=_IDLE):
                run.warn(
                    f"step {run.step}: thinking leaves the context's prediction as it is, with a step size of "
                    f"{row['alpha']:.2g}: thinking.learn_step_size=false keeps the step size where it starts"
                )
        run.say(f"step {run.step}: validation loss {row['validation_loss']:.4f}")


class Writing(Hook):
    """Records rows; and says how the run ended."""

    writer: MetricsWriter | None = None

    def begin(self) -> None:
        """See `Hook`."""
        self.run.on_main(self._open)
        if self.run.unwritten is not None and self.writer is not None:
            self.writer.write(self.run.unwritten)

    def _open(self) -> None:
        run = self.run
        self.writer = MetricsWriter(run.folder, run.step, run.warn, run.recipe.training.metrics)

    def after_step(self, moment: Moment) -> None:
        """See `Hook`."""
        run = self.run
        if moment.row is not None and self.writer is not None:
            self.writer.write(moment.row)
            run.say(console_line(moment.row, run.recipe.training.steps, run.clock.left(run.step)))
        if moment.unsaved:
            raise StoppedRun(
                f"step {run.step} is not saved: {moment.unsaved}; the newest good checkpoint is "
                f"{run.checkpoints.newest_good()}"
            )
        if moment.stops and not moment.ends:
            command = "the same command" if run.recipe.training.resume else "it with training.resume=true"
            run.say(f"told to stop: saved step {run.step}; run {command} to go on")

    def close(self) -> None:
        """See `Hook`."""
        if self.writer is not None:
            self.writer.close()
