"""A loaded model of puzzles: solve them, watch it think, ask for energies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.api.model import Model
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.data.puzzles import BLANK, Puzzle
from ebt_megatron.inference import puzzles

Grids = str | Sequence[str] | np.ndarray | Tensor
_AT_ONCE = 256  # puzzles


@dataclass(frozen=True)
class Solution:
    """A puzzle's answer, and how it was come by.

    Attributes:
        grid: symbols 1 .. V, int64 [rows, columns].
        steps: that were taken.
        energy: the mean energy of the cells that were asked for; nan of a model without energies.
        confidence: the mean over those cells of the symbol's log-probability.
    """

    grid: np.ndarray
    steps: int
    energy: float
    confidence: float

    @property
    def text(self) -> str:
        """The grid's symbols one after another, row by row."""
        return "".join(map(str, self.grid.flatten()))


@dataclass(frozen=True)
class Thought:
    """A puzzle after a step.

    Attributes:
        grid: the likeliest symbols, int64 [rows, columns]; given cells are as given.
        probabilities: of them, [rows, columns].
        energy: of the whole grid; nan of a model without energies.
    """

    grid: np.ndarray
    probabilities: np.ndarray
    energy: float


class PuzzleModel(Model):
    """An EBT, or a recurrent or feed-forward network, of puzzles; see `Model`.

    A grid is a text of digits, row by row, with 0 or a dot where it asks, or an array of symbols [cells] or [rows,
    columns], 0 where it asks; several are a list of texts, or an array with one more dimension.
    """

    @property
    def puzzle(self) -> Puzzle:
        """What its puzzles are."""
        return self.run.task.puzzle  # type: ignore[attr-defined]

    def solve(
        self, questions: Grids, steps: int = 16, starts: int = 1, until: str | None = None, seed: int = 0
    ) -> list[Solution]:
        """Solve puzzles.

        Args:
            questions: one or several.
            steps: thinking steps, or passes of a recurrent network, at most.
            starts: 1: as it was trained. More: so many starts at noise, of which the lowest energy is kept.
            until: when thinking ends before that: "grid stays", "energy rises" or "energy settles"
                (`ebt_megatron.inference.puzzles.last_steps`).
            seed: of the starts.

        Raises:
            DataError: for what is no grid of its puzzles.
            RecipeError: for steps, starts or a rule that it does not have.
        """
        for name, value in (("steps", steps), ("starts", starts)):
            if value < 1:
                raise RecipeError(f"{name}={value}: must be at least 1")
        out = []
        for some in self._grids(questions).split(_AT_ONCE):
            found = puzzles.solve(self.run, some, steps, starts, until, seed)
            shaped = found.grids.view(-1, self.puzzle.height, self.puzzle.width).cpu().numpy()
            columns = (getattr(found, name).tolist() for name in ("steps", "energies", "confidence"))
            out += [Solution(*row) for row in zip(shaped, *columns, strict=True)]
        return out

    def think(self, question: Grids, steps: int = 16) -> Iterator[Thought]:
        """Follow one puzzle: what the grid is after every step.

        Raises:
            DataError: for what is no grid of its puzzles, or several.
        """
        grid = self._grids(question).to(self.device)
        if len(grid) != 1:
            raise DataError(f"{len(grid)} puzzles are given: follow one at a time")
        sample = puzzles.asked(grid)
        thoughts = puzzles.think(self.run, sample, puzzles.most_steps(self.run, steps))
        shape = self.puzzle.height, self.puzzle.width
        for logits, energy in zip(thoughts.logits[:, 0], thoughts.energies[:, 0], strict=True):
            p, symbols = logits.softmax(-1).max(-1)
            given = grid[0] != BLANK
            shown = torch.where(given, grid[0], symbols + 1).view(shape).cpu().numpy()
            yield Thought(shown, p.masked_fill(given, 1.0).view(shape).cpu().numpy(), float(energy))

    def energy(self, questions: Grids, answers: Grids) -> np.ndarray:
        """The mean energy, of the cells that a question asks for, of whole answers: float [B].

        Raises:
            RecipeError: of a model without energies.
            DataError: for what is no grid of its puzzles, or an answer with blanks.
        """
        self.require_thinking("energy")
        grids, full = self._grids(questions).to(self.device), self._grids(answers).to(self.device)
        if (full == BLANK).any() or grids.shape != full.shape:
            raise DataError("answers must be as many as questions, and have a symbol in every cell")
        sample = puzzles.asked(grids)
        cells = puzzles.energy(self.run, sample, puzzles.of_symbols(full - 1, self.puzzle.symbols))
        return puzzles.mean_of_asked(cells, grids == BLANK).cpu().numpy()

    def _grids(self, given: Grids) -> Tensor:
        """Grids as int64 [B, cells].

        Raises:
            DataError: naming the first that is none.
        """
        puzzle = self.puzzle
        items: Any = [given] if isinstance(given, str) else given
        if not isinstance(items, np.ndarray | Tensor):
            parsed = [puzzle.parsed(text) if isinstance(text, str) else None for text in items]
            for number, (text, cells) in enumerate(zip(items, parsed, strict=True), 1):
                if cells is None:
                    raise DataError(
                        f"puzzle {number} ({text!r}) is no {puzzle.name}: give {puzzle.cells} digits or dots"
                    )
            items = np.array(parsed, np.int64)
        grids = torch.as_tensor(items).long()
        if grids.numel() == 0 or grids.numel() % puzzle.cells:
            raise DataError(
                f"an array of {list(grids.shape)} holds no grids of {puzzle.name}: {puzzle.cells} cells each"
            )
        grids = grids.reshape(-1, puzzle.cells)
        if grids.min() < BLANK or grids.max() > puzzle.symbols:
            raise DataError(f"{puzzle.name} has the symbols 1 to {puzzle.symbols}, and 0 where it asks")
        return grids
