"""The training loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from ebt_megatron.config import Recipe, check, to_yaml
from ebt_megatron.data.loader import Loader
from ebt_megatron.evaluation.perplexity import validate
from ebt_megatron.model.build import SampleShape, build_model
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.training.checkpoint import Checkpoints
from ebt_megatron.training.faults import BadSteps, SpikeDetector, StopSignal, Watchdog
from ebt_megatron.training.flops import training_flops
from ebt_megatron.training.metrics import MetricsWriter, Timers, console_line, peak_memory_bytes, require_writers
from ebt_megatron.training.objective import Totals, build_objective
from ebt_megatron.training.optimizer import (
    apply_gradients,
    build_optimizer,
    build_scheduler,
    wrap,
    zero_gradients,
)


@dataclass
class StepResult:
    """What one optimizer step did; equal on every rank.

    Attributes:
        loss: what is minimised; step_losses: after each thinking step; energies: before each.
        applied: whether the weights changed (no: something was not finite).
    """

    loss: float
    step_losses: list[float]
    energies: list[float]
    alpha: float
    grad_norm: float
    lr: float
    positions: int
    applied: bool


class Trainer:
    """Everything one optimizer step needs, and the step itself.

    Args:
        recipe: the run.
        shape: facts of the data that fix the model's sizes.
    """

    def __init__(self, recipe: Recipe, shape: SampleShape):
        self.recipe = recipe
        self.state = initialize(recipe.parallel, recipe.training.seed)
        check(recipe, self.state.world_size)
        self.timers = Timers()
        self.model = build_model(recipe, shape).to(self.state.device)
        self.objective = build_objective(self.model, recipe, self.state, self.timers)
        self.chunks = wrap([self.model], recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)
        self.scheduler = build_scheduler(self.optimizer, recipe)

    def train_step(self, micro_batches: Sequence[Any], iteration: int) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch.

        Args:
            micro_batches: as the loader gives them.
            iteration: counts optimizer steps from 0; fixes every random draw of the step.
        """
        zero_gradients(self.chunks, self.optimizer)
        totals = self.objective.train_batch(list(micro_batches), iteration)
        with self.timers.phase("communication"):
            loss, step_losses, energies, alpha = self._reduce(totals)
        finite = all(map(torch.isfinite, [loss, *step_losses, *energies]))
        with self.timers.phase("optimizer"):
            update = apply_gradients(self.chunks, self.optimizer, self.scheduler, skip=not finite)
        return StepResult(
            loss.item(), step_losses.tolist(), energies.tolist(), alpha.item(), update.grad_norm, update.lr,
            totals.positions, update.applied,
        )  # fmt: skip

    def _reduce(self, totals: Totals) -> tuple[torch.Tensor, ...]:
        """Sum every rank's share: losses live on the first stage, energies on the last."""
        alpha = getattr(self.model, "step_size", torch.zeros(1)).detach().double().view(1)
        parts = [
            totals.loss.view(1),
            totals.losses,
            totals.energies,
            alpha.to(totals.loss) / self.state.data_size,
        ]
        packed = torch.cat(parts)
        dist.all_reduce(packed, group=self.state.data_group)
        dist.all_reduce(packed, group=self.state.pipeline_group)
        loss, losses, energies, alpha = packed.split([len(p) for p in parts])
        return loss[0], losses, energies, alpha[0]


class StoppedRun(RuntimeError):
    """Training cannot go on; the message says why and from where it can be resumed."""


class Run:
    """A recipe from its first or last saved step to its end.

    Args:
        recipe: resolved and checked.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.training.output_dir)
        require_writers(recipe.training.metrics)
        state = initialize(recipe.parallel, recipe.training.seed)
        check(recipe, state.world_size)
        self.train_data = Loader(recipe, "train", state.data_rank, state.data_size)
        self.vocab_size = self.train_data.sources[0].manifest.vocab_size
        self.validation_data = Loader(recipe, "validation", state.data_rank, state.data_size)
        self.trainer = Trainer(recipe, SampleShape(vocab_size=self.vocab_size))
        self.state, self.timers = self.trainer.state, self.trainer.timers
        self.is_main = self.state.rank == 0
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.step = 0
        self.tokens = 0
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            recipe.training.keep_checkpoints,
            fingerprint(recipe, self.train_data.sources[0].manifest.tokenizer["sha256"]),
            recipe.training.async_save,
        )

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            self.console.print(text)

    def restore(self, newest: Path) -> None:
        """Go back to a checkpoint."""
        t = self.trainer
        self.step, extra, rank_states = self.checkpoints.load(newest, t.model, t.optimizer, t.scheduler)
        self.tokens = extra["tokens"]
        self.train_data.load_state_dict(extra["data"])
        t.objective.load_rank_states(rank_states)

    def save(self) -> None:
        """Write a checkpoint; a failure is shown and training goes on."""
        extra = {"tokens": self.tokens, "data": self.train_data.state_dict()}
        t = self.trainer
        with self.timers.phase("save"):
            error = self.checkpoints.save(self.step, t.model, t.optimizer, t.scheduler, extra, t.objective.rank_state())
        self._report_unsaved(error)

    def _report_unsaved(self, error: str | None) -> None:
        if error:
            self.say(f"[red]checkpoint not saved:[/red] {error}; training goes on")

    def _micro_batches(self, stream: Iterator[Any]) -> list[Any]:
        options = self.recipe.training
        count = options.global_batch_size // (options.micro_batch_size * self.state.data_size)
        with self.timers.phase("data"):
            return list(itertools.islice(stream, count))

    def validation_loss(self) -> tuple[float, float | None]:
        """Loss after the trained number of steps, and at one step (None for a feed-forward model)."""
        thinks = self.recipe.model.architecture == "ebt"
        steps = self.recipe.thinking.max_steps if thinks else 1
        with self.timers.phase("validation"):
            groups = self.state.data_group, self.state.pipeline_group
            result = validate(self.trainer.objective, self.validation_data, steps, 0, *groups)
        return result.losses[-1].item(), result.losses[0].item() if thinks else None

    def run(self) -> None:
        """Train to the end.

        Raises:
            StoppedRun: after too many steps in a row that were not finite.
        """
        options = self.recipe.training
        newest = self.checkpoints.newest_good(self.say) if options.resume else None
        if newest:
            self.restore(newest)
            self.say(f"resumed from {newest}")
        if self.is_main:  # only now: a run that does not fit the folder must leave it as it is
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.yaml").write_text(to_yaml(self.recipe))
        writer = MetricsWriter(self.folder, self.step, options.metrics) if self.is_main else None
        stop, bad = StopSignal(), BadSteps(options.max_bad_steps)
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
        waited, told = self.train_data.wait_seconds, self.step
        try:
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
                        f"checkpoint is {self.checkpoints.newest_good(self.say)}"
                    )
                if not result.applied:
                    self.say(f"[yellow]step {self.step} skipped: not finite ({bad.total} so far)[/yellow]")
                if spikes.is_spike(result.loss):
                    self._rewind(result.loss)
                    stream = iter(self.train_data)
                    waited, told = self.train_data.wait_seconds, self.step
                    continue
                validates = options.validation_interval and self.step % options.validation_interval == 0
                ends = self.step == options.steps
                row: dict[str, Any] | None = None
                if logged or validates or ends:
                    # Data comes for several steps at once: its wait is the mean of all since the last row.
                    wait = (self.train_data.wait_seconds - waited) / (self.step - told)
                    waited, told = self.train_data.wait_seconds, self.step
                    row = self._row(result, seconds, wait, bad.total)
                if row is not None and (validates or ends):
                    row["validation_loss"], row["validation_loss_one_step"] = self.validation_loss()
                    self.say(f"step {self.step}: validation loss {row['validation_loss']:.4f}")
                if row is not None and writer is not None:
                    writer.write(row)
                    self.console.print(console_line(row, options.steps, clock.left(self.step)))
                self._report_unsaved(self.checkpoints.poll())
                stopping = stop.agreed(self.state.device)
                if ends or stopping or (options.save_interval and self.step % options.save_interval == 0):
                    self.save()
                if ends or stopping:
                    self._report_unsaved(self.checkpoints.wait())
                if stopping and not ends:
                    self.say(f"told to stop: saved step {self.step}; run the same command to go on")
                    return
        finally:
            stream.close()
            watchdog.stop()
            if profiler is not None:
                profiler.stop()
            if writer is not None:
                writer.close()

    def _profiler(self) -> Any:
        """Traces training.profile_steps steps, after one to warm up, into OUTPUT_DIR/trace (rank 0)."""
        count = self.recipe.training.profile_steps
        if not count or not self.is_main:
            return None
        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=count, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self.folder / "trace")),
        )
        profiler.start()
        return profiler

    def _rewind(self, loss: float) -> None:
        """Go back to the newest checkpoint, but not back in the data: what made the loss jump is skipped."""
        newest = self.checkpoints.newest_good(self.say)
        if newest is None:
            self.say(f"[yellow]loss spike at step {self.step} ({loss:.4f}); no checkpoint to go back to[/yellow]")
            return
        position, spiked_at = self.train_data.state_dict(), self.step
        self.restore(newest)
        self.train_data.load_state_dict(position)
        self.say(
            f"[yellow]loss spike at step {spiked_at} ({loss:.4f}): back to step {self.step}, data skipped[/yellow]"
        )

    def _row(self, result: StepResult, seconds: float, wait: float, bad: int) -> dict[str, Any]:
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
            "loss": result.loss,
            "initial_loss": result.step_losses[0],
            "final_step_loss": result.step_losses[-1],
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
            "bad_steps": bad,
            "phase_seconds": {k: round(v, 6) for k, v in phases.items()},
        }


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


def fingerprint(recipe: Recipe, tokenizer: str) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it."""
    model = asdict(recipe.model)
    for key in ("size", "kernels", "recompute_layers"):
        del model[key]
    out = {f"model.{key}": value for key, value in model.items()}
    out["tokenizer"] = tokenizer
    if recipe.model.architecture == "ebt":
        out["thinking.max_steps"] = recipe.thinking.max_steps
    return out
