"""Training and evaluating a feed-forward baseline, under megatron-core's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives.counting import mean_of, weighed
from ebt_megatron.objectives.graphs import Graphs, graphs_of
from ebt_megatron.objectives.interface import BatchMetrics, RankState, Timing
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.tasks.interface import Sample, Task
from ebt_megatron.thinking.dual_stream import ThinkingOutput


def _given(sample: Sample) -> tuple[Tensor | None, ...]:
    """What a model is called with: a denoiser is given what it starts from, too."""
    start = () if sample.start is None else (sample.start,)
    return sample.observed, sample.targets, sample.segments, *start


class FeedForwardObjective:
    """Transformer++, say, with or without pipeline stages, or as CUDA graphs; an `Objective`.

    Args:
        model, recipe, task, state, timers: as EnergyObjective.
    """

    thinks = starts_at_context = False

    def __init__(self, model: Any, recipe: Recipe, task: Task, state: ParallelState, timers: Timing):
        self.model, self.recipe, self.task, self.state, self.timers = model, recipe, task, state, timers
        self.graphs = graphs_of(recipe, state)

    def rank_state(self) -> None:
        """Nothing besides weights."""

    def load_rank_states(self, states: list[RankState]) -> None:
        """Nothing to take."""

    def _losses(self, samples: list[Sample], positions: int | None) -> list[Tensor]:
        """Per-position losses [S, B] of each micro-batch (on the last stage), learning if `positions`."""

        def forward_step(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            sample = next(iterator)

            def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                weight = sample.weight
                total = output.sum() / (positions or output.numel()) if weight is None else (output * weight).sum()
                return total, torch.tensor(output.numel(), dtype=torch.int), output.detach()

            return model(*_given(sample)), loss

        run = get_forward_backward_func()
        return run(
            forward_step_func=forward_step,
            data_iterator=iter(samples),
            model=self.model,
            num_microbatches=len(samples),
            seq_length=self.task.length,
            micro_batch_size=len(samples[0].sample_ids),
            forward_only=positions is None,
        )

    def _train_recorded(self, graphs: Graphs, samples: list[Sample], positions: int) -> list[Tensor]:
        def work(weight: Tensor | None, *given: Tensor | None) -> tuple[Tensor]:
            losses = self.model(*given)
            (losses.sum() / positions if weight is None else (losses * weight).sum()).backward()
            return (losses.detach(),)

        return [graphs.run(positions, work, s.weight, *_given(s))[0] for s in samples]

    def train_batch(self, micro_batches: list[MicroBatch], iteration: int) -> BatchMetrics:
        """Add the gradients of this rank's micro-batches of one optimizer step, forward and backward once each."""
        positions = self.recipe.training.global_batch_size * self.task.length
        samples = weighed([self.task.sample(m, self.state.device) for m in micro_batches], self.state)
        if self.graphs is not None:
            with self.timers.phase("graph"):
                losses = self._train_recorded(self.graphs, samples, positions)
        else:
            with self.timers.phase("context"):
                losses = self._losses(samples, positions)
        total = torch.zeros((), dtype=torch.float64, device=self.state.device)
        for loss, sample in zip(losses, samples, strict=False):  # on the last stage
            total += mean_of([loss], [sample], positions)
        return BatchMetrics(total.view(1), total.new_zeros(0), total, positions)

    @torch.no_grad()
    def evaluate(self, sample: Sample, steps: int, observe: Callable[[Any], None] | None = None) -> ThinkingOutput:
        """Per-position losses [1, S, B]; a feed-forward model has one step and no energy.

        `observe` is called with the model's output, where that keeps what it predicted as `y` (on the last stage).
        """
        losses = self._losses([sample], None)
        output = getattr(self.model, "output", None)
        if observe is not None and losses and getattr(output, "y", None) is not None:
            observe(output)
        shape = 1, self.task.length, len(sample.sample_ids)
        loss = losses[0][None] if losses else torch.zeros(shape, device=self.state.device)
        return ThinkingOutput(loss, loss.new_zeros(0, *shape[1:]))
