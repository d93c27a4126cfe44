"""What a training step computes for each architecture: one interface for the loop and for evaluation.

An objective turns the micro-batches of one optimizer step into gradients and totals. All
totals are already divided by the number of positions in the global batch, so that summing
over micro-batches and data-parallel ranks gives means, and no layout changes the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.thinking import double_backward
from ebt_megatron.thinking.dual_stream import Context, Descent, Plan, Thinker, Thought, step_sizes
from ebt_megatron.thinking.replay import Entry, ReplayBuffer, stack_start


@dataclass
class Totals:
    """Per-step means over the global batch, as this rank's share of them.

    Attributes:
        losses: [n] after each thinking step (n = 1 for a feed-forward model).
        energies: [n] before each step; empty for a feed-forward model.
        loss: what is minimised.
        positions: predictions made, over all ranks.
    """

    losses: Tensor
    energies: Tensor
    loss: Tensor
    positions: int

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that must be summed over data-parallel ranks."""
        return [self.losses, self.energies, self.loss.view(1)]


@dataclass
class Sample:
    """A micro-batch as the model sees it, before and after the split into context and target."""

    observed: Tensor
    targets: Tensor
    sample_ids: Tensor
    segments: Tensor | None
    start: Tensor | None = None
    replayed: list[Entry] = field(default_factory=list)


def split(micro_batch: Any, device: torch.device) -> Sample:
    """What is observed [B, S, ...], and what follows it [B, S, ...], on `device`."""
    sequence = micro_batch.tokens if micro_batch.tokens is not None else micro_batch.frames
    documents = micro_batch.documents
    return Sample(
        observed=sequence[:, :-1].to(device),
        targets=sequence[:, 1:].to(device),
        sample_ids=micro_batch.sample_ids.to(device),
        segments=None if documents is None else documents[:, :-1].to(device=device, dtype=torch.int32),
    )


class EnergyObjective:
    """An EBT on one pipeline stage.

    Args:
        model: the EnergyTransformer (unwrapped).
        recipe: the run.
        state: the layout.
        timers: has `phase(name)`, a context manager.
    """

    def __init__(self, model: Any, recipe: Recipe, state: ParallelState, timers: Any):
        self.model, self.recipe, self.state, self.timers = model, recipe, state, timers
        options = recipe.thinking
        self.replay = ReplayBuffer(options.replay.capacity, recipe.training.seed) if options.replay.enabled else None

    def _slots(self, index: int, count: int) -> list[int]:
        """The global batch's slots that micro-batch `index` of this rank holds (Megatron's order)."""
        size = self.recipe.training.micro_batch_size
        first = (index * self.state.data_size + self.state.data_rank) * size
        return list(range(first, first + count))

    def _with_replay(self, sample: Sample, index: int, iteration: int) -> Sample:
        """The fresh samples and, behind them, those the replay buffer gives."""
        if self.replay is None:
            return sample
        slots = (ReplayBuffer.slot_of(s) for s in self._slots(index, len(sample.observed)))
        drawn = [self.replay.draw(s, iteration) for s in slots if s is not None]
        entries = [e for e in drawn if e is not None]
        if not entries:
            return sample
        ids = torch.tensor([ReplayBuffer.replay_id(e) for e in entries], device=sample.sample_ids.device)
        return Sample(
            torch.cat([sample.observed, torch.stack([e.observed for e in entries])]),
            torch.cat([sample.targets, torch.stack([e.targets for e in entries])]),
            torch.cat([sample.sample_ids, ids]),
            None,
            stack_start(len(sample.observed), entries),
            entries,
        )

    def _keep(self, sample: Sample, index: int, prediction: Tensor) -> None:
        """Give the replay buffer the predictions this micro-batch ended with, [S, B, ...]."""
        if self.replay is None:
            return
        fresh = len(sample.observed) - len(sample.replayed)
        for i, entry in enumerate(sample.replayed):
            self.replay.update(entry, prediction[:, fresh + i])
        for i, slot in enumerate(map(ReplayBuffer.slot_of, self._slots(index, fresh))):
            if slot is not None:
                self.replay.add(slot, int(sample.sample_ids[i]), sample.observed[i], sample.targets[i],
                                prediction[:, i])  # fmt: skip

    def _replayed_in_batch(self) -> int:
        """Replayed samples in the global batch: none until the buffer holds something."""
        if self.replay is None or not self.replay.slots:
            return 0
        return (self.recipe.training.global_batch_size + 1) // 2

    def _descent(self, sample: Sample, plan: Plan | None, positions: int) -> Descent:
        model, options, seed = self.model, self.recipe.thinking, self.recipe.training.seed
        prediction = model.modality.prediction(sample.targets, sample.sample_ids, options, seed, sample.start)
        alpha, slope = step_sizes(model.step_size, options, sample.sample_ids, sample.observed.shape[1], seed,
                                  random=plan is not None)  # fmt: skip
        return Descent(prediction, model.step_size, alpha, slope, plan, torch.full_like(alpha, 1 / positions))

    def _context(self, sample: Sample, learn: bool) -> Context:
        embed = lambda: self.model.modality.context(sample.observed)  # noqa: E731
        return Context(self.model, embed, sample.observed.shape[1], sample.segments, learn)

    def train_batch(self, micro_batches: list[Any], iteration: int) -> Totals:
        """Add the gradients of this rank's micro-batches of one optimizer step."""
        plan = Plan.draw(self.recipe.thinking, self.recipe.training.seed, iteration)
        samples = self.recipe.training.global_batch_size + self._replayed_in_batch()
        positions = samples * self.recipe.data.sequence_length
        thoughts = []
        for index, micro_batch in enumerate(micro_batches):
            sample = self._with_replay(split(micro_batch, self.state.device), index, iteration)
            descent = self._descent(sample, plan, positions)
            if self.recipe.thinking.engine == "double_backward":
                context = self.model.modality.context(sample.observed)
                thoughts.append(double_backward.train(self.model, context, sample.segments, descent))
            else:
                context_stream = self._context(sample, learn=True)
                thoughts.append(Thinker(self.model, context_stream, descent, self.timers.phase).train())
            self._keep(sample, index, descent.prediction.final)
        return self._totals(thoughts, plan, positions)

    @torch.no_grad()
    def evaluate(self, micro_batch: Any, steps: int) -> Thought:
        """Per-position losses and energies [steps, S, B] of a micro-batch; nothing is learned."""
        sample = split(micro_batch, self.state.device)
        descent = self._descent(sample, None, 1)
        return Thinker(self.model, self._context(sample, learn=False), descent, self.timers.phase).think(steps)

    @staticmethod
    def _totals(thoughts: list[Thought], plan: Plan, positions: int) -> Totals:
        losses = sum(t.losses.double().sum((1, 2)) for t in thoughts) / positions
        energies = sum(t.energies.double().sum((1, 2)) for t in thoughts) / positions
        loss = (losses * losses.new_tensor(plan.step_weights)).sum()
        return Totals(losses, energies, loss, positions)


class FeedForwardObjective:
    """Transformer++: one forward and one backward pass."""

    replay = None

    def __init__(self, model: Any, recipe: Recipe, state: ParallelState, timers: Any):
        self.model, self.recipe, self.state, self.timers = model, recipe, state, timers

    def _loss(self, micro_batch: Any) -> Tensor:
        sample = split(micro_batch, self.state.device)
        return self.model(sample.observed, sample.targets, sample.segments)

    def train_batch(self, micro_batches: list[Any], iteration: int) -> Totals:
        """As EnergyObjective.train_batch."""
        positions = self.recipe.training.global_batch_size * self.recipe.data.sequence_length
        total = torch.zeros((), dtype=torch.float64, device=self.state.device)
        for micro_batch in micro_batches:
            with self.timers.phase("context"):
                loss = self._loss(micro_batch).sum() / positions
                loss.backward()
            total += loss.detach().double()
        return Totals(total.view(1), total.new_zeros(0), total, positions)

    @torch.no_grad()
    def evaluate(self, micro_batch: Any, steps: int) -> Thought:
        """Per-position losses [1, S, B]; a feed-forward model has one step and no energy."""
        loss = self._loss(micro_batch)[None]
        return Thought(loss, loss.new_zeros(0, *loss.shape[1:]))
