"""Thinking at inference: descent on the energy at any positions of a cached context.

    y_{i+1} = b(y_i) - alpha dE/ds(y_i)

as in training (`ebt_megatron.thinking.dual_stream`), and nothing else of training: parameters are constants, the
energy's gradient goes to the prediction alone. What there is besides are ways to think longer, to stop, to refuse a
step, and to choose among several starts; each is a field of `ThinkingOptions`.

This file knows nothing of text: a prediction is a `State` (`ebt_megatron.prediction.state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.inference.cache import Context, Queries
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.reader import Reader
from ebt_megatron.inference.stages import Elsewhere, Stages
from ebt_megatron.prediction.state import State


@dataclass
class Conclusion:
    """What came of thinking about R tokens.

    Attributes:
        state: the predictions.
        energy: [R], of the predictions where that was asked for, else before the last step.
        steps: int64 [R] steps taken (of the candidate that was kept).
        flops: that all of it cost, all candidates together.
    """

    state: State
    energy: Tensor
    steps: Tensor
    flops: float


class Tokens:
    """Tokens that are thought about together; those that have stopped are put aside and cost nothing any more.

    Attributes:
        alive: int64, which of all tokens go on.
        queries: where those stand in the context.
        state, start: their predictions, now and as the step began.
        energy, first, fell: of all tokens: the newest energy, the first one, and how much the last step lowered it.
        steps: of all tokens, how many they took.
    """

    def __init__(self, state: State, queries: Queries):
        count, device = len(queries.rows), queries.rows.device
        self.alive, self.queries = torch.arange(count, device=device), queries
        self.state = self.start = state
        self.energy, self.first, self.fell = torch.full((3, count), torch.inf, dtype=torch.float64, device=device)
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)
        self._aside: list[tuple[Tensor, State]] = []

    def begin_step(self, keep: bool) -> None:
        """Begin a step. With `keep`, `start` stays as it is while `state` changes."""
        self.start = self.state
        if keep:
            self.state = self.start.take(torch.arange(len(self.alive), device=self.alive.device))

    def note(self, energy: Tensor) -> None:
        """The newest energies of the tokens that go on."""
        energy = energy.double()
        self.fell[self.alive] = self.energy[self.alive] - energy
        self.energy[self.alive] = energy
        self.first[self.alive] = torch.where(self.steps[self.alive] == 0, energy, self.first[self.alive])

    def stop(self, stopping: Tensor, undo: bool = False) -> Tensor:
        """Put tokens aside, bool over those that go on; with `undo` as the step began.

        Returns:
            Indices of those that still go on, among those that did.
        """
        out, on = (torch.nonzero(x)[:, 0] for x in (stopping, ~stopping))
        if len(out):
            self._aside.append((self.alive[out], (self.start if undo else self.state).take(out)))
            self.state, self.start, self.alive = self.state.take(on), self.start.take(on), self.alive[on]
            self.queries = self.queries.take(on)
        return on

    def end(self) -> State:
        """The predictions of all tokens, in their order."""
        parts = [(self.alive, self.state), *self._aside]
        order = torch.argsort(torch.cat([index for index, _ in parts]))
        return self.state.join([state for _, state in self._aside]).take(order)


class Engine(Reader):
    """An EBT's thinking, over contexts that it reads.

    Args:
        model: this stage, an `EnergyTransformer` say.
        recipe: the run's.
        stages: this stage's place.
        window: how many context positions a prediction sees.
        vocabulary: FLOPs of embedding a prediction, and of taking the gradient back through that.
    """

    def __init__(self, model: Any, recipe: Recipe, stages: Stages, window: int, vocabulary: float):
        modality = model.modality if stages.first else None
        super().__init__(model, recipe, stages, window, modality and modality.context)
        self.vocabulary, self.modality = vocabulary, modality
        self.landscapes, self.starts = int(model.num_landscapes), bool(model.starts_thinking)
        size = model.step_size.detach().clamp_min(recipe.thinking.step_size_min) if stages.first else torch.zeros(())
        self.step_size = float(stages.share(size.float().view(1), from_last=False))

    # --- passes ---------------------------------------------------------------------------------

    def _weigh(self, context: Context, queries: Queries, state: State, landscape: int) -> tuple[Tensor, Tensor]:
        """The prediction stream through this stage: its input, and its output, on the last stage energies [R, 1]."""
        attend = context.of(landscape).predict(queries)
        return self.stages.down(
            state.embed,
            len(queries.rows),
            lambda h: self.model.weigh(h, self.rotations(queries.positions + 1, h), attend, landscape),
        )

    @torch.no_grad()
    def energies(self, context: Context, queries: Queries, state: State, landscape: int) -> Tensor:
        """The energies of predictions [R]: one forward pass."""
        _, energy = self._weigh(context, queries, state, landscape)
        return self._shared(energy, len(queries.rows))

    def slopes(self, context: Context, queries: Queries, state: State, landscape: int) -> tuple[Tensor, Tensor]:
        """The energies of predictions [R] and, on the first stage, their gradients by the model's input [R, 1, D]."""
        with torch.enable_grad():
            x, energy = self._weigh(context, queries, state, landscape)
        gradient = self.stages.up(x, energy)
        return self._shared(energy.detach(), len(queries.rows)), gradient

    def _shared(self, energy: Tensor, rows: int) -> Tensor:
        return self.stages.share(energy[:, 0] if self.stages.last else torch.empty(rows, device=energy.device), True)

    # --- thinking -------------------------------------------------------------------------------

    def start(
        self, sample_ids: Tensor, positions: Tensor, hidden: Tensor | None = None, seed: int | None = None
    ) -> State:
        """Where R predictions start: on the first stage; elsewhere what stands for them.

        Args:
            sample_ids, positions: int64 [R].
            hidden, seed: as `think` takes them; hidden of this stage's dtype.
        """
        if self.modality is None:
            return Elsewhere(len(positions), positions.device)  # type: ignore[return-value]
        seed = self.recipe.training.seed if seed is None else seed
        read = self.model.read_out(hidden) if self.starts else None
        return self.modality.start(sample_ids, positions, self.recipe.thinking, seed, read)

    @torch.no_grad()
    def think(
        self,
        context: Context,
        rows: Tensor,
        positions: Tensor,
        options: ThinkingOptions,
        sample_ids: Tensor | None = None,
        seed: int | None = None,
        hidden: Tensor | None = None,
    ) -> Conclusion:
        """Predict what follows positions of a context, R of them.

        Args:
            context: as `read` left it.
            rows, positions: int64 [R], of the newest positions or any others, counted from 0 in each row.
            options: how.
            sample_ids: int64 [R], which fix the noise; default: the rows.
            seed: of the noise; default: the run's.
            hidden: [R, 1, D] what `read` gave at these positions; needed where thinking starts at the context's
                prediction.

        Raises:
            RecipeError: for a budget that does not pay for one step of each token.
        """
        count, candidates = len(rows), options.candidates
        starts = torch.cat([self._sample_ids(rows if sample_ids is None else sample_ids, m) for m in range(candidates)])
        rows, positions = rows.repeat(candidates), positions.repeat(candidates)
        if self.starts:
            assert hidden is not None
            hidden = self.stages.share(hidden, from_last=True).to(self.dtype).repeat(candidates, 1, 1)
        state = self.start(starts, positions, hidden, seed)
        queries = Queries(rows, positions + context.sinks)
        tokens, schedule = Tokens(state, queries), options.schedule(self.landscapes, self.recipe.thinking.max_steps)
        flops = self.starts * self._cost(queries, layers=0, vocabulary=1)
        flops += self._descend(context, tokens, schedule, options)
        state = tokens.end()
        tokens.energy[tokens.steps == 0] = torch.nan  # it is known only after a pass
        if options.verifies:
            tokens.energy = self.energies(context, queries, state, schedule[-1] if schedule else 0)
            flops += self._cost(queries, layers=1, vocabulary=1)
        return self._choose(Conclusion(state, tokens.energy, tokens.steps, flops), tokens.first, count, options)

    def _descend(self, context: Context, tokens: Tokens, schedule: Sequence[int], options: ThinkingOptions) -> float:
        """Take the steps; returns their FLOPs."""
        spent = 0.0
        for step, landscape in enumerate(schedule):
            noise = options.noise(self.recipe.thinking, step)
            if options.confidence is not None and (step or self.starts):
                confidence = self.stages.share(tokens.state.confidence(), from_last=False)
                tokens.stop(confidence >= options.confidence)
            if options.flops is not None:
                self._afford(tokens, options.flops - spent, step, options)
            if not len(tokens.alive):
                break
            tokens.begin_step(keep=noise > 0 or options.accept_only or options.prediction_tolerance is not None)
            if noise:
                tokens.state.perturb(step, noise)
            energy, gradient = self.slopes(context, tokens.queries, tokens.state, landscape)
            spent += self._cost(tokens.queries, layers=2, vocabulary=1)
            if noise and options.accept_only:
                energy = self.energies(context, tokens.queries, tokens.start, landscape)
                spent += self._cost(tokens.queries, layers=1, vocabulary=1)
            tokens.note(energy)
            if options.energy_tolerance is not None and step and schedule[step - 1] == landscape:
                on = tokens.stop(tokens.fell[tokens.alive].abs() <= options.energy_tolerance, undo=True)
                if not len(on):
                    break
                gradient = gradient[on]
            tokens.state.step(gradient, options.size(self.step_size, landscape, self.landscapes))
            spent += self._cost(tokens.queries, layers=0, vocabulary=1)
            tokens.steps[tokens.alive] += 1
            settled = torch.zeros_like(tokens.alive, dtype=torch.bool)
            if options.accept_only:
                spent += self._cost(tokens.queries, layers=1, vocabulary=1)
                refused = self._refuse(context, tokens, landscape)
                if not noise and all(later == landscape for later in schedule[step:]):
                    settled |= refused  # the same step would be refused again
            if options.prediction_tolerance is not None:
                moved = self.stages.share(tokens.state.distance(tokens.start), from_last=False)
                settled |= moved <= options.prediction_tolerance
            tokens.stop(settled)
        return spent

    def _refuse(self, context: Context, tokens: Tokens, landscape: int) -> Tensor:
        """Take back the steps that did not lower their token's energy; bool, which they were."""
        after, before = self.energies(context, tokens.queries, tokens.state, landscape), tokens.energy[tokens.alive]
        better = after < before
        tokens.state = tokens.state.where(better, tokens.start)
        tokens.note(torch.where(better, after, before))
        return ~better

    def _sample_ids(self, sample_ids: Tensor, candidate: int) -> Tensor:
        """Return the sample ids of a candidate; the first one's are those of training's evaluation."""
        return sample_ids ^ stable_seed("candidate", candidate) if candidate else sample_ids

    def _choose(self, thought: Conclusion, first: Tensor, count: int, options: ThinkingOptions) -> Conclusion:
        """Keep one of each token's candidates, or mix them."""
        if options.candidates == 1:
            return thought
        energy, steps = thought.energy.view(-1, count), thought.steps.view(-1, count)
        if options.choose == "mixture":
            weights = (-energy / options.tau).softmax(0)
            return Conclusion(thought.state.mixed(weights), (weights * energy).sum(0), steps.amax(0), thought.flops)
        score = {"energy": energy, "drop": energy - first.view(-1, count), "max": -energy}[options.choose]
        best = score.argmin(0)
        kept = best * count + torch.arange(count, device=best.device)
        return Conclusion(thought.state.take(kept), thought.energy[kept], thought.steps[kept], thought.flops)

    # --- what it costs --------------------------------------------------------------------------

    def _flops(self, queries: Queries, layers: int, vocabulary: int) -> Tensor:
        """FLOPs of each token [R] for so many passes of the layers, forward or back, and of the vocabulary."""
        visible = (queries.positions + 1).clamp_max(self.window + self.sinks) + 1
        return layers * self.layer_flops(visible) + vocabulary * self.vocabulary

    def _cost(self, queries: Queries, layers: int, vocabulary: int) -> float:
        return float(self._flops(queries, layers, vocabulary).sum())

    def _step_flops(self, queries: Queries, step: int, options: ThinkingOptions) -> Tensor:
        """FLOPs of step `step` of each token [R]; to accept it takes energies of what it leads to and, noisy, left."""
        checks = 1 + (options.noise(self.recipe.thinking, step) > 0) if options.accept_only else 0
        return self._flops(queries, layers=2 + checks, vocabulary=2 + checks)

    def require_budget(self, tokens: int, length: int, options: ThinkingOptions) -> None:
        """Raise RecipeError where options.flops does not pay for a step of so many tokens after `length` positions."""
        count = tokens * options.candidates
        last = torch.full((count,), length - 1 + self.sinks, device=self.device)
        needed = float(self._step_flops(Queries(last, last), 0, options).sum())
        if options.flops is not None and needed > options.flops and not self.starts:
            raise RecipeError(
                f"flops={options.flops:g} does not pay for one step of a batch of {count} tokens: "
                f"give at least {needed:.3g}"
            )

    def _afford(self, tokens: Tokens, left: float, step: int, options: ThinkingOptions) -> None:
        """Stop the tokens that the budget does not pay another step for: those whose energy fell least."""
        each = self._step_flops(tokens.queries, step, options)
        order = torch.argsort(tokens.fell[tokens.alive], descending=True, stable=True)
        paid = each[order].cumsum(0) <= left
        if step == 0 and not paid.all() and not self.starts:
            raise RecipeError(
                f"flops={options.flops:g} does not pay for one step of a batch of {len(each)} tokens: "
                f"give at least {float(each.sum()):.3g}"
            )
        tokens.stop(torch.zeros_like(paid).scatter(0, order, ~paid))
