"""What a training step computes for each architecture: one interface for the loop and for evaluation.

An objective turns the micro-batches of one optimizer step into gradients and totals. All
totals are already divided by the number of positions in the global batch, so that summing
over micro-batches and data-parallel ranks gives means, and no layout changes the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.parallel.pipeline import Pipeline, StageBatch
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.thinking import double_backward
from ebt_megatron.thinking.dual_stream import Context, Descent, Thinker, Thought, step_sizes
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.replay import Entry, ReplayBuffer, reshard, stack_start
from ebt_megatron.training.graphs import Graphs


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
    sequence = micro_batch.tokens
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
        self.graphs = _graphs(recipe, state)
        options = recipe.thinking
        self.replay = ReplayBuffer(options.replay.capacity, recipe.training.seed) if options.replay.enabled else None
        self.replaying = False  # whether any rank's buffer holds something: ranks without slots must know too

    def rank_state(self) -> dict[str, Any] | None:
        """What a checkpoint must keep of this rank besides weights."""
        if self.replay is None:
            return None
        return {"tensor_rank": self.state.tensor_rank, "pipeline_rank": self.state.pipeline_rank,
                "replay": self.replay.state_dict()}  # fmt: skip

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Take this rank's part of what all ranks of the saving run kept, whatever their layout."""
        if self.replay is None:
            return
        size, micro = self.state.data_size, self.recipe.training.micro_batch_size
        samples = range(0, self.recipe.training.global_batch_size, 2)
        own = {s // 2 for s in samples if s // micro % size == self.state.data_rank}
        first_stage = [s for s in states if s["pipeline_rank"] == 0]
        content = reshard(first_stage, self.state.tensor_rank, self.state.tensor_size, own)
        self.replay.load_state_dict(content)
        self.replaying = any(s["replay"] for s in states)

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

    def _keep(self, sample: Sample, index: int, descent: Descent | None) -> None:
        """Give the replay buffer the predictions this micro-batch ended with (on the first stage)."""
        if self.replay is None:
            return
        ended = descent.prediction.final.unbind(1) if descent is not None else [None] * len(sample.observed)
        fresh = len(sample.observed) - len(sample.replayed)
        for entry, end in zip(sample.replayed, ended[fresh:], strict=True):
            self.replay.update(entry, end)
        for i, slot in enumerate(map(ReplayBuffer.slot_of, self._slots(index, fresh))):
            if slot is not None:
                self.replay.add(slot, int(sample.sample_ids[i]), sample.observed[i], sample.targets[i], ended[i])

    def _replayed_in_batch(self) -> int:
        """Replayed samples in the global batch: none until the buffer holds something."""
        if not self.replaying:
            return 0
        return (self.recipe.training.global_batch_size + 1) // 2

    def _descent(
        self,
        sample: Sample,
        plan: Plan | None,
        positions: int,
        random: bool,
        observe: Callable[[Any], None] | None = None,
    ) -> Descent:
        model, options, seed = self.model, self.recipe.thinking, self.recipe.training.seed
        if not random and not options.langevin_in_evaluation:
            options = replace(options, langevin_noise=0.0)
        prediction = model.modality.prediction(sample.targets, sample.sample_ids, options, seed, sample.start)
        length = sample.observed.shape[1]
        alpha, slope = step_sizes(model.step_size, options, sample.sample_ids, length, seed, random)
        weight = torch.full_like(alpha, 1 / positions)
        return Descent(
            prediction, model.step_size, alpha, slope, plan, weight, separable=model.separable, observe=observe
        )

    def _context(self, sample: Sample, learn: bool) -> Context:
        embed = lambda: self.model.modality.context(sample.observed)  # noqa: E731
        return Context(self.model, embed, sample.observed.shape[1], sample.segments, learn)

    def train_batch(self, micro_batches: list[Any], iteration: int) -> Totals:
        """Add the gradients of this rank's micro-batches of one optimizer step."""
        plan = Plan.draw(self.recipe.thinking, self.recipe.training.seed, iteration)
        fresh = self.recipe.training.global_batch_size
        positions = (fresh + self._replayed_in_batch()) * self.recipe.data.sequence_length
        samples = [
            self._with_replay(split(micro_batch, self.state.device), index, iteration)
            for index, micro_batch in enumerate(micro_batches)
        ]
        train = self._train_pipeline if self.state.pipeline_size > 1 else self._train_whole
        thoughts = train(samples, plan, positions)
        self.replaying = self.replay is not None
        losses = torch.stack([t.losses.double().sum((1, 2)) for t in thoughts]).sum(0) / positions
        energies = torch.stack([t.energies.double().sum((1, 2)) for t in thoughts]).sum(0) / positions
        loss = (losses * losses.new_tensor(plan.step_weights)).sum()
        return Totals(losses, energies, loss, positions)

    def _train_whole(self, samples: list[Sample], plan: Plan, positions: int) -> list[Thought]:
        thoughts = []
        for index, sample in enumerate(samples):
            if self.graphs is not None:
                thoughts.append(self._train_recorded(self.graphs, sample, plan, positions))
                continue
            thought, descent = self._train_one(sample, plan, positions, self.timers.phase)
            thoughts.append(thought)
            self._keep(sample, index, descent)
        return thoughts

    def _train_one(self, sample: Sample, plan: Plan, positions: int, phase: Any) -> tuple[Thought, Descent]:
        descent = self._descent(sample, plan, positions, random=True)
        if self.recipe.thinking.engine == "double_backward":
            context = self.model.modality.context(sample.observed)
            energies = partial(double_backward.text_energies, self.model, context, sample.segments)
            return double_backward.train(energies, descent), descent
        stream = self._context(sample, learn=True)
        return Thinker(self.model, stream, descent, phase, self.recipe.thinking.reuse).train(), descent

    def _train_recorded(self, graphs: Graphs, sample: Sample, plan: Plan, positions: int) -> Thought:
        def work(
            observed: Tensor, targets: Tensor, sample_ids: Tensor, segments: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            recorded = Sample(observed, targets, sample_ids, segments)
            thought, _ = self._train_one(recorded, plan, positions, nullcontext)  # a phase would wait for the device
            return thought.losses, thought.energies

        inputs = sample.observed, sample.targets, sample.sample_ids, sample.segments
        with self.timers.phase("graph"):
            return Thought(*graphs.run((plan, positions), work, *inputs))

    def _pipeline(
        self,
        samples: list[Sample],
        plan: Plan,
        positions: int,
        random: bool,
        observe: Callable[[Any], None] | None = None,
    ) -> Pipeline:
        first = self.state.is_first_stage

        def micro_batch(sample: Sample) -> StageBatch:
            embed = (lambda: self.model.modality.context(sample.observed)) if first else None
            descent = self._descent(sample, plan, positions, random, observe) if first else None
            return StageBatch(len(sample.observed), embed, descent, sample.segments)

        return Pipeline(
            self.model, self.recipe.data.sequence_length, plan, [micro_batch(s) for s in samples],
            self.recipe.parallel.micro_batches_in_flight, self.timers.phase,
        )  # fmt: skip

    def _train_pipeline(self, samples: list[Sample], plan: Plan, positions: int) -> list[Thought]:
        self.pipeline = self._pipeline(samples, plan, positions, random=True)
        thoughts = self.pipeline.run()
        for index, (sample, m) in enumerate(zip(samples, self.pipeline.micro_batches, strict=True)):
            self._keep(sample, index, m.descent)
        return thoughts

    @torch.no_grad()
    def evaluate(self, micro_batch: Any, steps: int, observe: Callable[[Any], None] | None = None) -> Thought:
        """Per-position losses and energies [steps, S, B] of a micro-batch; nothing is learned.

        With pipeline stages, losses are on the first and energies on the last, zeros elsewhere.

        Args:
            micro_batch: from the loader.
            steps: thinking steps.
            observe: called with the prediction after each step (on the first pipeline stage).
        """
        if self.state.pipeline_size > 1:
            sample = split(micro_batch, self.state.device)
            only_think = Plan((0.0,) * steps, "detached")
            (thought,) = self._pipeline([sample], only_think, 1, random=False, observe=observe).run()
            return thought
        return self.thinker(micro_batch, observe).think(steps)

    def thinker(self, micro_batch: Any, observe: Callable[[Any], None] | None = None) -> Thinker:
        """A micro-batch ready to think without learning (one pipeline stage); `observe` as in `evaluate`."""
        sample = split(micro_batch, self.state.device)
        descent = self._descent(sample, None, 1, random=False, observe=observe)
        return Thinker(self.model, self._context(sample, learn=False), descent, self.timers.phase)


class FeedForwardObjective:
    """Transformer++ under megatron-core's own schedules, with or without pipeline stages, or as CUDA graphs."""

    def __init__(self, model: Any, recipe: Recipe, state: ParallelState, timers: Any):
        self.model, self.recipe, self.state, self.timers = model, recipe, state, timers
        self.graphs = _graphs(recipe, state)

    def rank_state(self) -> None:
        """Nothing besides weights."""

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Nothing to take."""

    def _losses(self, micro_batches: list[Any], positions: int | None) -> list[Tensor]:
        """Per-position losses [S, B] of each micro-batch (on the last stage), learning if `positions`."""

        def forward_step(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            sample = split(next(iterator), self.state.device)

            def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                total = output.sum() / (positions or output.numel())
                return total, torch.tensor(output.numel(), dtype=torch.int), output.detach()

            return model(sample.observed, sample.targets, sample.segments), loss

        run = get_forward_backward_func()
        return run(
            forward_step_func=forward_step, data_iterator=iter(micro_batches), model=self.model,
            num_microbatches=len(micro_batches), seq_length=self.recipe.data.sequence_length,
            micro_batch_size=len(micro_batches[0].sample_ids), forward_only=positions is None,
        )  # fmt: skip

    def _train_recorded(self, graphs: Graphs, micro_batches: list[Any], positions: int) -> list[Tensor]:
        def work(observed: Tensor, targets: Tensor, segments: Tensor | None) -> tuple[Tensor]:
            losses = self.model(observed, targets, segments)
            (losses.sum() / positions).backward()
            return (losses.detach(),)

        samples = (split(micro_batch, self.state.device) for micro_batch in micro_batches)
        return [graphs.run(positions, work, s.observed, s.targets, s.segments)[0] for s in samples]

    def train_batch(self, micro_batches: list[Any], iteration: int) -> Totals:
        """As EnergyObjective.train_batch."""
        positions = self.recipe.training.global_batch_size * self.recipe.data.sequence_length
        if self.graphs is not None:
            with self.timers.phase("graph"):
                losses = self._train_recorded(self.graphs, micro_batches, positions)
        else:
            with self.timers.phase("context"):
                losses = self._losses(micro_batches, positions)
        total = torch.zeros((), dtype=torch.float64, device=self.state.device)
        for loss in losses:
            total += loss.double().sum() / positions
        return Totals(total.view(1), total.new_zeros(0), total, positions)

    @torch.no_grad()
    def evaluate(self, micro_batch: Any, steps: int, observe: Callable[[Any], None] | None = None) -> Thought:
        """Per-position losses [1, S, B]; a feed-forward model has one step and no energy."""
        losses = self._losses([micro_batch], None)
        shape = 1, self.recipe.data.sequence_length, len(micro_batch.sample_ids)
        loss = losses[0][None] if losses else torch.zeros(shape, device=self.state.device)
        return Thought(loss, loss.new_zeros(0, *shape[1:]))


def _graphs(recipe: Recipe, state: ParallelState) -> Graphs | None:
    if not recipe.training.cuda_graphs:
        return None
    if state.device.type != "cuda":
        raise RecipeError("training.cuda_graphs=true needs a GPU: set it to false")
    return Graphs()


def build_objective(model: Any, recipe: Recipe, state: ParallelState, timers: Any) -> Any:
    """The objective of the recipe's architecture and layout; `model` is this stage, not yet wrapped.

    Raises:
        RecipeError: for CUDA graphs without CUDA.
    """
    if recipe.model.architecture == "ebt":
        return EnergyObjective(model, recipe, state, timers)
    return FeedForwardObjective(model, recipe, state, timers)
