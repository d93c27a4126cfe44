"""What follows a context, by either architecture: the one interface of generation and of scoring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.cache import Context
from ebt_megatron.inference.engine import Engine
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.reader import Reader
from ebt_megatron.inference.stages import Stages
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.prediction.logits_state import LogitsState
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import Task
from ebt_megatron.tasks.text import Text


@dataclass
class Forecast:
    """Predictions of what follows R positions; the same on every rank.

    Attributes:
        log_p: [R, V] log-probabilities.
        energy: [R] of the predictions; NaN where a model has none.
        steps: int64 [R] thinking steps; 0 where a model takes none.
        flops: that reading and predicting cost.
    """

    log_p: Tensor
    energy: Tensor
    steps: Tensor
    flops: float


class Predictor(Protocol):
    """A model that reads contexts and predicts what follows.

    Attributes:
        thinks: whether its predictions have energies.
        noisy: whether predictions depend on the seed.
        window: the most positions that a prediction sees: those trained with.
        vocab_size: V.
        device: where contexts are.
    """

    thinks: bool
    noisy: bool
    window: int
    vocab_size: int
    device: torch.device

    def check_batch(self, rows: int, length: int, chunk: int) -> None:
        """Raise RecipeError where there is not the memory, or the budget, for `context` and what is done with it."""
        ...

    def context(self, rows: int, length: int, chunk: int) -> Context:
        """An empty context, as `Reader.context`."""
        ...

    def __call__(
        self,
        context: Context,
        rows: Tensor,
        positions: Tensor,
        tokens: Tensor,
        wanted: Tensor,
        sample_ids: Tensor,
        seed: int | None = None,
    ) -> Forecast:
        """Add tokens [R] to a context, and predict what follows some of them.

        Args:
            context: from `context`.
            rows, positions: int64 [R], as `Reader.read` takes them.
            tokens: int64 [R].
            wanted: bool [R], the positions to predict after.
            sample_ids: int64 [B], of each row of the context; with the position they fix the noise.
            seed: of the noise; default: the run's.
        """
        ...


class _Reading(ABC):
    """A `Predictor` over a reader: it reads what is given, and predicts after what is wanted.

    Args:
        reader: over the run's model.
        vocab_size: V.
    """

    def __init__(self, reader: Reader, vocab_size: int):
        self.reader, self.vocab_size = reader, vocab_size
        self.window, self.device, self.context = reader.window, reader.device, reader.context

    def check_batch(self, rows: int, length: int, chunk: int) -> None:
        """See `Predictor`."""
        self.reader.require_memory(rows, length, chunk)

    @torch.no_grad()
    def __call__(
        self,
        context: Context,
        rows: Tensor,
        positions: Tensor,
        tokens: Tensor,
        wanted: Tensor,
        sample_ids: Tensor,
        seed: int | None = None,
    ) -> Forecast:
        """See `Predictor`."""
        h = self.reader.read(context, rows, positions, tokens)
        flops = self.reader.reading_flops(positions)
        rows, positions = rows[wanted], positions[wanted]
        if not len(rows):
            none = torch.empty(0, device=self.device)
            return Forecast(none.view(0, self.vocab_size), none, none.long(), flops)
        found = self._forecast(h[wanted], context, rows, positions, sample_ids[rows], seed)
        return replace(found, flops=flops + found.flops)

    @abstractmethod
    def _forecast(
        self, h: Tensor, context: Context, rows: Tensor, positions: Tensor, sample_ids: Tensor, seed: int | None
    ) -> Forecast:
        """What follows positions that have been read, h [R, 1, D] of their context stream; without the reading."""


class EnergyPredictor(_Reading):
    """An EBT that thinks.

    Args:
        engine: over the run's model.
        options: how to think.
        vocab_size: V.
        noisy: whether noise has a part in it.
    """

    thinks = True

    def __init__(self, engine: Engine, options: ThinkingOptions, vocab_size: int, noisy: bool):
        super().__init__(engine, vocab_size)
        self.engine, self.options, self.noisy = engine, options, noisy

    def check_batch(self, rows: int, length: int, chunk: int) -> None:
        """See `Predictor`."""
        super().check_batch(rows, length, chunk)
        self.engine.require_budget(rows, length, self.options)

    def _forecast(
        self, h: Tensor, context: Context, rows: Tensor, positions: Tensor, sample_ids: Tensor, seed: int | None
    ) -> Forecast:
        engine = self.engine
        thought = engine.think(context, rows, positions, self.options, sample_ids, seed, h)
        if engine.stages.first:
            assert isinstance(thought.state, LogitsState)
            log_p = thought.state.log_probabilities()
        else:
            log_p = torch.empty(len(rows), self.vocab_size, device=self.device)
        log_p = engine.stages.share(log_p, from_last=False)
        return Forecast(log_p, thought.energy, thought.steps, thought.flops)


class FeedForwardPredictor(_Reading):
    """Transformer++; nothing is random.

    Args:
        reader: over the run's model.
        vocab_size: V.
        vocabulary: FLOPs of the output, per token.
    """

    thinks = noisy = False

    def __init__(self, reader: Reader, vocab_size: int, vocabulary: float):
        super().__init__(reader, vocab_size)
        self.vocabulary = vocabulary

    def _forecast(
        self, h: Tensor, context: Context, rows: Tensor, positions: Tensor, sample_ids: Tensor, seed: int | None
    ) -> Forecast:
        count = len(rows)
        if self.reader.stages.last:
            logits = self.reader.model.output.logits(h)[:, 0]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_p = TensorGroup().columns(wide)[:, : self.vocab_size].log_softmax(-1)
        else:
            log_p = torch.empty(count, self.vocab_size, device=self.device)
        log_p = self.reader.stages.share(log_p, from_last=True)
        none = torch.full((count,), torch.nan, device=self.device)
        steps = torch.zeros(count, dtype=torch.int64, device=self.device)
        return Forecast(log_p, none, steps, count * self.vocabulary)


def predictor_of(run: TrainedRun, options: ThinkingOptions) -> EnergyPredictor | FeedForwardPredictor:
    """What predicts with a run's model, opened; see `build_predictor`."""
    return build_predictor(run.model, run.recipe, run.task, run.state, options)


def build_predictor(
    model: Any, recipe: Recipe, task: Task, state: ParallelState, options: ThinkingOptions
) -> EnergyPredictor | FeedForwardPredictor:
    """What predicts with a model of text.

    Args:
        model: this rank's part; its parameters are constants from now on.
        recipe, task, state: the run's.
        options: how to think, if it does.

    Raises:
        RecipeError: for a run of another modality, more ranks than one model takes, or options of thinking for a
            model that does not think.
    """
    where = recipe.training.output_dir
    if not isinstance(task, Text):
        raise RecipeError(f"{where} is a run of {recipe.data.modality}: only text can be generated and scored")
    if state.data_size > 1:
        raise RecipeError(
            f"{state.world_size} ranks hold {state.data_size} copies of the model: start as many as "
            f"parallel.tensor x parallel.pipeline={state.tensor_size * state.pipeline_size}"
        )
    stages, vocabulary = Stages(state, model.config), task.cost().vocabulary / task.length
    if recipe.model.architecture == "ebt":
        options.check()
        if options.steps == 0 and not recipe.thinking.starts_at_context:
            raise RecipeError(
                f"steps=0: {where} has no prediction before its first step: give steps=1, or train with "
                "thinking.initial=context"
            )
        noisy = replace(recipe.thinking, langevin_noise=options.noise(recipe.thinking)).noisy
        if options.candidates > 1 and not noisy:
            raise RecipeError(
                f"candidates={options.candidates}: without noise every start of {where} is the same: "
                "give a langevin_noise, 0.3 say, or leave candidates out"
            )
        engine = Engine(model, recipe, stages, task.length, vocabulary)
        return EnergyPredictor(engine, options, task.vocab_size, noisy)
    if options != ThinkingOptions(final_energy=options.final_energy):
        raise RecipeError(
            f"{where} is a {recipe.model.architecture}, which does not think: leave out steps, candidates and the like"
        )
    embed = model.embedding if stages.first else None
    return FeedForwardPredictor(Reader(model, recipe, stages, task.length, embed), task.vocab_size, vocabulary)
