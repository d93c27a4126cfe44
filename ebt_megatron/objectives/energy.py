"""Training and evaluating an EBT: thinking and learning on the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives.counting import mean_of, weighed
from ebt_megatron.objectives.graphs import Graphs, graphs_of
from ebt_megatron.objectives.interface import BatchMetrics, Phase, RankState, Timing
from ebt_megatron.objectives.replaying import Replaying
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.prediction.interface import Prediction
from ebt_megatron.tasks.interface import Sample, Task
from ebt_megatron.thinking import double_backward
from ebt_megatron.thinking.dual_stream import Descent, Thinker, ThinkingOutput, step_sizes
from ebt_megatron.thinking.pipeline import Pipeline
from ebt_megatron.thinking.plan import Plan


class EnergyObjective:
    """An EBT on one pipeline stage, an `Objective`.

    Args:
        model: this stage of the energy, not wrapped.
        recipe: the run.
        task: its modality.
        state: the layout.
        timers: told what is being done.
    """

    thinks = True

    def __init__(self, model: Any, recipe: Recipe, task: Task, state: ParallelState, timers: Timing):
        self.model, self.recipe, self.task, self.state, self.timers = model, recipe, task, state, timers
        self.starts_at_context = recipe.thinking.starts_at_context
        self.graphs = graphs_of(recipe, state)
        self.replaying = Replaying(recipe, state) if recipe.thinking.replay.enabled else None

    def rank_state(self) -> RankState | None:
        """What a checkpoint must keep of this rank besides weights."""
        return None if self.replaying is None else self.replaying.state()

    def load_rank_states(self, states: list[RankState]) -> None:
        """Take this rank's part of what all ranks of the saving run kept, whatever their layout."""
        if self.replaying is not None:
            self.replaying.load(states)

    # --- training -------------------------------------------------------------------------------

    def train_batch(self, micro_batches: list[MicroBatch], iteration: int) -> BatchMetrics:
        """Add the gradients of this rank's micro-batches of one optimizer step."""
        plan = Plan.draw(self.recipe.thinking, self.recipe.training.seed, iteration)
        samples = [self.task.sample(micro_batch, self.state.device) for micro_batch in micro_batches]
        count = self.recipe.training.global_batch_size
        if self.replaying is not None:
            ids = [micro_batch.sample_ids.tolist() for micro_batch in micro_batches]  # on the CPU: nothing waits
            samples = [self.replaying.extend(sample, i, iteration, ids[i]) for i, sample in enumerate(samples)]
            count += self.replaying.in_batch()
        samples, positions = weighed(samples, self.state), count * self.task.length
        if self.graphs is not None:
            thoughts = [self._train_recorded(self.graphs, sample, plan, positions) for sample in samples]
        elif self.state.pipeline_size > 1:
            thoughts = self._train_pipeline(samples, plan, positions)
        else:
            thoughts = [
                self._train_one(sample, i, plan, positions, self.timers.phase) for i, sample in enumerate(samples)
            ]
        if self.replaying is not None:
            self.replaying.begun = True
        losses = mean_of([t.losses for t in thoughts], samples, positions)
        energies = mean_of([t.energies for t in thoughts], samples, positions)
        loss, initial = (losses * losses.new_tensor(plan.step_weights)).sum(), None
        if plan.initial_weight is not None:
            initial = mean_of([t.initial for t in thoughts if t.initial is not None], samples, positions)
            loss = loss + plan.initial_weight * initial
        return BatchMetrics(losses, energies, loss, positions, initial)

    def _train_one(self, sample: Sample, index: int, plan: Plan, positions: int, phase: Phase) -> ThinkingOutput:
        thinker = self._thinker(sample, plan, positions, random=True, phase=phase)
        if self.recipe.thinking.engine == "double_backward":
            context = self.model.modality.context(sample.observed)
            energies = double_backward.energies_of(self.model, context, sample.segments)
            starts = plan.initial_weight is not None
            hidden = double_backward.read_out(self.model, context, sample.segments) if starts else None
            thought = double_backward.train(energies, thinker.descent, hidden)
        else:
            thought = thinker.train()
        self._keep(sample, index, thinker.descent)
        return thought

    def _train_recorded(self, graphs: Graphs, sample: Sample, plan: Plan, positions: int) -> ThinkingOutput:
        def work(
            observed: Tensor,
            targets: Tensor,
            sample_ids: Tensor,
            segments: Tensor | None,
            start: Tensor | None,
            weight: Tensor | None,
        ) -> tuple[Tensor, ...]:
            recorded = Sample(observed, targets, sample_ids, segments, start, weight=weight)
            thought = self._train_one(recorded, 0, plan, positions, nullcontext)  # a phase would wait for the device
            initial = () if thought.initial is None else (thought.initial,)
            return thought.losses, thought.energies, *initial

        inputs = sample.observed, sample.targets, sample.sample_ids, sample.segments, sample.start, sample.weight
        with self.timers.phase("graph"):
            return ThinkingOutput(*graphs.run((plan, positions), work, *inputs))

    def _train_pipeline(self, samples: list[Sample], plan: Plan, positions: int) -> list[ThinkingOutput]:
        def begin(index: int) -> Thinker:
            return self._thinker(samples[index], plan, positions, random=True)

        def keep(index: int, thinker: Thinker) -> None:
            self._keep(samples[index], index, thinker.descent if self.state.is_first_stage else None)

        return self._in_stages(plan, [len(sample.sample_ids) for sample in samples], begin, keep)

    def _keep(self, sample: Sample, index: int, descent: Descent | None) -> None:
        if self.replaying is not None:
            self.replaying.keep(sample, index, None if descent is None else descent.prediction.final)

    # --- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, sample: Sample, steps: int, observe: Callable[[Prediction], None] | None = None
    ) -> ThinkingOutput:
        """Per-position losses and energies [steps, S, B] of a micro-batch; nothing is learned.

        With pipeline stages, losses are on the first and energies on the last, zeros elsewhere.

        Args:
            sample: from the task.
            steps: thinking steps; 0 where they start at the context's prediction, for that alone.
            observe: called with the prediction after each step, and before the first where it starts there (on the
                first pipeline stage).
        """
        thinker = self.thinker(sample, observe)
        if self.state.pipeline_size == 1:
            return thinker.think(steps)
        plan = Plan.thinking(steps, self.model.starts_thinking)
        (thought,) = self._in_stages(plan, [thinker.size], lambda _: thinker)
        return thought

    def thinker(self, sample: Sample, observe: Callable[[Prediction], None] | None = None) -> Thinker:
        """A micro-batch ready to think without learning; `observe` as in `evaluate`."""
        return self._thinker(sample, None, 1, random=False, observe=observe, phase=self.timers.phase)

    # --- what both are made of ------------------------------------------------------------------

    def _thinker(
        self,
        sample: Sample,
        plan: Plan | None,
        positions: int,
        random: bool,
        observe: Callable[[Prediction], None] | None = None,
        phase: Phase = nullcontext,
    ) -> Thinker:
        """A micro-batch on this stage; `random`: step sizes and noise as in training."""
        model, options, seed = self.model, self.recipe.thinking, self.recipe.training.seed
        context = descent = None
        if self.state.is_first_stage:
            if not random and not options.langevin_in_evaluation:
                options = replace(options, langevin_noise=0.0)
            prediction = model.modality.prediction(sample.targets, sample.sample_ids, options, seed, sample.start)
            alpha, slope = step_sizes(
                model.step_size, options, sample.sample_ids, self.task.length, seed, random, model.separable
            )
            weight = torch.full_like(alpha, 1 / positions) if sample.weight is None else sample.weight.to(alpha)
            descent = Descent(
                prediction, model.step_size, alpha, slope, plan, weight, separable=model.separable, observe=observe
            )
            context = partial(model.modality.context, sample.observed)
        learned = plan.learned if plan is not None else ()
        return Thinker(
            model,
            len(sample.sample_ids),
            self.task.length,
            sample.segments,
            learned,
            context,
            descent,
            options.reuse,
            phase,
        )

    def _in_stages(
        self,
        plan: Plan,
        sizes: list[int],
        begin: Callable[[int], Thinker],
        keep: Callable[[int, Thinker], None] | None = None,
    ) -> list[ThinkingOutput]:
        """What comes of micro-batches on this pipeline stage; `sizes`, `begin` as in `Pipeline`, `keep` as its end."""
        thoughts: dict[int, ThinkingOutput] = {}

        def end(index: int, thinker: Thinker) -> None:
            thoughts[index] = thinker.finish(plan.steps)
            if keep is not None:
                keep(index, thinker)

        in_flight, reuse = self.recipe.parallel.micro_batches_in_flight, self.recipe.thinking.reuse
        Pipeline(self.model, plan, sizes, self.task.length, begin, end, in_flight, reuse, self.timers.phase).run()
        return [thoughts[index] for index in range(len(sizes))]
