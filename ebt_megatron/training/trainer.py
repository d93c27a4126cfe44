"""One optimizer step, and everything it needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ebt_megatron.checkpoint.average import WeightAverage
from ebt_megatron.config import Recipe
from ebt_megatron.core.timing import Timers
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives import build_objective
from ebt_megatron.objectives.interface import BatchMetrics
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.interface import Task
from ebt_megatron.training.optimizer import apply_gradients, build_optimizer, build_scheduler, wrap, zero_gradients


@dataclass
class StepResult:
    """What one optimizer step did; equal on every rank.

    Attributes:
        loss: what is minimised; step_losses: after each thinking step; energies: before each.
        start_loss: where thinking starts, if the context says where; else None.
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
    start_loss: float | None = None


class Trainer:
    """Everything one optimizer step needs, and the step itself.

    Args:
        recipe: the run.
        task: its modality.
        state: this rank's place in its layout.
    """

    def __init__(self, recipe: Recipe, task: Task, state: ParallelState):
        self.recipe, self.state = recipe, state
        self.timers = Timers()
        self.model = build_model(recipe, task).to(self.state.device)
        self.objective = build_objective(self.model, recipe, task, self.state, self.timers)
        self.chunks = wrap([self.model], recipe)
        self.optimizer = build_optimizer(self.chunks, recipe, self.model.lr_multipliers)
        self.scheduler = build_scheduler(self.optimizer, recipe)
        decay = recipe.optimizer.ema_decay
        self.average = WeightAverage(self.model, decay) if decay else None

    def train_step(self, micro_batches: Sequence[MicroBatch], iteration: int) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch.

        Args:
            micro_batches: as the loader gives them.
            iteration: counts optimizer steps from 0; fixes every random draw of the step.
        """
        zero_gradients(self.chunks, self.optimizer)
        totals = self.objective.train_batch(list(micro_batches), iteration)
        with self.timers.phase("communication"):
            loss, step_losses, energies, alpha, start = self._reduce(totals)
        finite = all(map(torch.isfinite, [loss, *step_losses, *energies, *start]))
        with self.timers.phase("optimizer"):
            update = apply_gradients(self.chunks, self.optimizer, self.scheduler, skip=not finite)
            if self.average is not None and update.applied:
                self.average.update(iteration)
        return StepResult(
            loss.item(),
            step_losses.tolist(),
            energies.tolist(),
            alpha.item(),
            update.grad_norm,
            update.lr,
            totals.positions,
            update.applied,
            start.item() if len(start) else None,
        )

    def averaged(self) -> AbstractContextManager[None]:
        """The model has its averaged weights meanwhile, if there are any."""
        return nullcontext() if self.average is None else self.average.in_use()

    def _reduce(self, totals: BatchMetrics) -> tuple[torch.Tensor, ...]:
        """Sum every rank's share: losses live on the first stage, energies on the last."""
        alpha = getattr(self.model, "step_size", torch.zeros(1)).detach().double().view(1)
        parts = [
            totals.loss.view(1),
            totals.losses,
            totals.energies,
            alpha.to(totals.loss) / self.state.data_size,
            totals.loss.new_zeros(0) if totals.initial is None else totals.initial.view(1),
        ]
        packed = torch.cat(parts)
        dist.all_reduce(packed, group=self.state.data_group)
        dist.all_reduce(packed, group=self.state.pipeline_group)
        loss, losses, energies, alpha, start = packed.split([len(p) for p in parts])
        return loss[0], losses, energies, alpha[0], start
