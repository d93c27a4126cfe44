"""Puzzles: every cell predicted at once, by an energy of the whole grid or by a feed-forward or recurrent network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.core.randomness import CLUE_STREAM, START_STREAM, uniform
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.data.puzzles import BLANK, Puzzle, turned
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.cells import CellEnergy, CellTransformer
from ebt_megatron.model.flops import Cost, cost, padded, position_flops
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.prediction.cells import GIVEN, CellPrediction
from ebt_megatron.prediction.logits import most_likely
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.puzzle_model import CellEmbedding, Feedback, PuzzleEmbeddings, PuzzleOutput
from ebt_megatron.thinking.dual_stream import Thinker

_SURE = 3.0  # a logit of a cell that thinking starts at: about what one step of a trained model says


class Puzzles:
    """Puzzles, a `Task`.

    Args:
        recipe: the run.
        puzzle: what they are.

    Raises:
        RecipeError: for settings that do not do.
    """

    kind = "puzzles"
    evaluation = "ebt_megatron.evaluation.puzzle_suite:PuzzleEvaluation"

    def __init__(self, recipe: Recipe, puzzle: Puzzle):
        self.recipe, self.puzzle, self.options, self.length = recipe, puzzle, recipe.puzzles, puzzle.cells
        self.identity = {"puzzle": [puzzle.kind, puzzle.height, puzzle.width, puzzle.symbols]}
        self._vocab = puzzle.symbols, padded(puzzle.symbols, recipe.model.vocab_multiple)
        self._check()

    def _check(self) -> None:
        model, thinking, passes = self.recipe.model, self.recipe.thinking, self.options.passes
        stages, recurrent = self.recipe.parallel.pipeline, model.architecture == "baseline" and passes > 1
        for wrong, why in (
            (
                self.recipe.data.sequence_length != self.length,
                f"data.sequence_length={self.recipe.data.sequence_length}, and {self.puzzle.name} has {self.length} "
                f"cells: set data.sequence_length={self.length}",
            ),
            (
                model.conditioning not in ("none", "time_embed"),
                f"model.conditioning={model.conditioning}: puzzles have none (one landscape) or time_embed",
            ),
            (
                model.num_query_groups != model.num_attention_heads,
                f"model.num_query_groups={model.num_query_groups}: puzzles have one group for each head",
            ),
            (
                thinking.initial != "noise",
                f"thinking.initial={thinking.initial}: grids start at noise, or at none: set noise, and initial_std",
            ),
            (
                thinking.langevin_on == "embedding",
                "thinking.langevin_on=embedding is for video and images, data.modality is puzzles: set prediction",
            ),
            (
                self.recipe.data.document_mask,
                "data.document_mask=true is about text, data.modality is puzzles: set it to false",
            ),
            (
                self.recipe.data.learn_from != "all",
                f"data.learn_from={self.recipe.data.learn_from} is about text, data.modality is puzzles: set it to all",
            ),
            (
                recurrent and stages > 1,
                f"puzzles.passes={passes} goes through all layers again and again: set parallel.pipeline=1",
            ),
        ):
            if wrong:
                raise RecipeError(why)

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Puzzles:
        """See `Task`."""
        return cls(recipe, Puzzle.read(source.manifest.encoder, source.folder))

    @classmethod
    def of_size(cls, recipe: Recipe, vocab_size: int, channels: int) -> Puzzles:
        """See `Task`: puzzles of as many cells as `data.sequence_length` says."""
        return cls(recipe, Puzzle.of_cells(recipe.data.sequence_length))

    def made_up(self, sample_ids: Tensor) -> MicroBatch:
        """See `Task`: no clues, and one symbol as the answer of every cell."""
        question = torch.full((len(sample_ids), self.length), BLANK)
        return MicroBatch(sample_ids, torch.stack([question, torch.ones_like(question)], 1))

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        """Clues [B, S] (0: none) are observed; targets [B, S] are the symbols less 1, `GIVEN` where there is a clue.

        In training every puzzle is turned into another, and some answers may be given away.
        """
        samples, ids = batch.samples.to(device), batch.sample_ids.to(device)
        training, seed = batch.counts is None, self.recipe.training.seed
        if training and self.options.symmetries:
            samples = turned(self.puzzle, samples, ids, seed)
        question, answer = samples.unbind(1)
        if training and self.options.clues_given_away:
            question = torch.where(self._given_away(ids), answer, question)
        targets = torch.where(question == BLANK, answer - 1, GIVEN)
        starts = self.recipe.model.architecture == "ebt" or self.options.passes > 1
        near = training and starts and self.recipe.thinking.starts_near_answer > 0
        return Sample(question, targets, ids, start=self._near_answer(answer - 1, ids) if near else None)

    def _near_answer(self, answer: Tensor, sample_ids: Tensor) -> Tensor:
        """Logits [S, B, V padded / TP] to start at: right but for a share of cells; NaN: as ever."""
        places = torch.arange(2 * self.length + 2, device=sample_ids.device)
        u = uniform(self.recipe.training.seed, sample_ids, places, START_STREAM).t()
        wrong, other, (share, chosen) = u[:, : self.length], u[:, self.length : -2], u[:, -2:].t()
        symbols = torch.where(wrong < share[:, None], (other * self.puzzle.symbols).long(), answer)
        start = _SURE * torch.nn.functional.one_hot(symbols, self._vocab[1]).float()
        start[chosen >= self.recipe.thinking.starts_near_answer] = torch.nan
        group = TensorGroup()
        return start.chunk(group.size, -1)[group.rank].transpose(0, 1).contiguous()

    def _given_away(self, sample_ids: Tensor) -> Tensor:
        """Which cells [B, S] are; at most all but one."""
        most = (1 - sample_ids / self.options.clues_given_away).clamp_min(0)
        u = uniform(
            self.recipe.training.seed, sample_ids, torch.arange(self.length + 1, device=sample_ids.device), CLUE_STREAM
        ).t()
        share = most * u[:, -1]
        return (u[:, :-1] < share[:, None]) & (u[:, :-1] < u[:, :-1].amax(1, keepdim=True))

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> CellEnergy:
        """See `Task`."""
        embeddings = PuzzleEmbeddings(config, self.recipe, self.length, self._vocab, kernels) if first else None
        return CellEnergy(config, self.recipe, kernels, embeddings, first, last)

    def feed_forward_model(
        self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool
    ) -> CellTransformer:
        """See `Task`: recurrent, if it is to take passes."""
        symbols, passes = self.puzzle.symbols, self.options.passes
        embedding = CellEmbedding(config, self.length, symbols) if first else None
        output = PuzzleOutput(config, *self._vocab) if last else None
        feedback = Feedback(config, symbols, passes) if passes > 1 else None
        return CellTransformer(config, self.recipe, kernels, embedding, output, first, last, feedback, passes)

    def cost(self) -> Cost:
        """See `Task`; embedding clues is none."""
        recipe, passes = self.recipe, self.options.passes
        whole = cost(recipe, self.puzzle.symbols)
        layers = self.length * position_flops(recipe, self.length)
        if recipe.model.architecture == "ebt":
            return replace(whole, layers=layers, context=0.0)
        # What is fed back is embedded, and its weight's gradient taken: 2 of an output's 3 products.
        products = passes + (passes - 1) * 2 / 3
        return replace(whole, layers=passes * layers, vocabulary=products * whole.vocabulary)

    def meter(self, steps: int, device: torch.device) -> PuzzleMeter:
        """See `Task`."""
        return PuzzleMeter(steps, device)

    def describe(self, loss: float) -> dict[str, float]:
        """A loss is in nats per cell that is asked for: nothing more."""
        return {}

    def example(self, sample: Sample, thinker: Thinker, steps: int) -> dict[str, Any] | None:
        """See `Task`: `evaluation.puzzles` follows a puzzle in its own way."""
        return None


class PuzzleMeter:
    """After every step, how many puzzles are solved whole, and how many of the cells that are asked for are right.

    Args:
        steps: n.
        device: of the counts.
    """

    def __init__(self, steps: int, device: torch.device):
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # puzzles, cells asked
        self.solved, self.right = torch.zeros(2, steps, dtype=torch.float64, device=device)

    def watch(self, sample: Sample, valid: Tensor) -> Callable[[Any], None]:
        """See `Meter`."""
        valid = valid.to(self.counts.device)
        targets = sample.targets.t()
        asked = (targets != GIVEN) & valid
        self.counts += torch.stack([valid.sum(), asked.sum()])
        step = 0

        def observe(prediction: Any) -> None:
            nonlocal step
            right = decoded(prediction) == targets
            self.solved[step] += ((right | (targets == GIVEN)).all(0) & valid).sum()
            self.right[step] += (right & asked).sum()
            step += 1

        return observe

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `Meter`: predictions are on one pipeline stage alone."""
        return [self.counts], [self.solved, self.right]

    def results(self, positions: int, thinks: bool) -> dict[str, Any]:
        """Shares, one per step of an EBT; of a baseline those of the last pass that was trained."""
        puzzles, cells = self.counts.tolist()
        out = {"solved": (self.solved / puzzles).tolist(), "cells_right": (self.right / cells).tolist()}
        return out if thinks else {name: shares[0] for name, shares in out.items()}


def decoded(prediction: Any) -> Tensor:
    """The most likely symbol of each cell, int64 [S, B], of a `CellPrediction` or a `PuzzleOutput`."""
    if isinstance(prediction, CellPrediction):
        return most_likely(prediction)
    return prediction.probabilities(prediction.y).argmax(-1)
