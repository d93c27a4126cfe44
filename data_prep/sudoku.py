"""Sudoku by a SAT solver (python-sat): full grids, clues with one answer, what is wrong with a puzzle.

A grid [cells] holds 0 where nothing is known and 1 .. N. Variable 1 + cell N + symbol - 1 says that the cell holds the
symbol; "clues have one answer" is "the clues and another answer contradict each other".
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.puzzles import BLANK, BOXES

_TRIES = 10_000  # orders to take clues away in, before a number of clues is given up


def _solver() -> Any:
    try:
        from pysat.solvers import Minisat22
    except ImportError as error:
        raise DataError(f"puzzles need python-sat ({error}): pip install python-sat") from None
    return Minisat22()


class Sudoku:
    """The rules of one size, `Rules`.

    Args:
        size: N, rows and symbols.
    """

    measure = "clues"

    def __init__(self, size: int):
        self.size, self.cells = size, size * size
        self.usual, self.limits = (self.cells // 4, self.cells * 5 // 12), (1, self.cells - 1)
        rows, columns = BOXES[size]
        grid = np.arange(self.cells).reshape(size, size)
        boxes = grid.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2).reshape(size, size)
        self.solver = _solver()
        for group, symbol in itertools.product((*grid, *grid.T, *boxes), range(1, size + 1)):
            holds = [self._says(int(cell), symbol) for cell in group]
            self.solver.add_clause(holds)
            for pair in itertools.combinations(holds, 2):
                self.solver.add_clause([-one for one in pair])
        for cell in range(self.cells):
            symbols = [self._says(cell, symbol) for symbol in range(1, size + 1)]
            self.solver.add_clause(symbols)
            for pair in itertools.combinations(symbols, 2):
                self.solver.add_clause([-one for one in pair])

    def extent(self, question: np.ndarray) -> int:
        """Clues."""
        return int((question != BLANK).sum())

    def _says(self, cell: int, symbol: int) -> int:
        return 1 + cell * self.size + symbol - 1

    def _clues(self, grid: np.ndarray) -> list[int]:
        return [self._says(cell, int(symbol)) for cell, symbol in enumerate(grid) if symbol != BLANK]

    def possible(self, grid: np.ndarray) -> bool:
        """Whether a grid [cells] has an answer."""
        return bool(self.solver.solve(self._clues(grid)))

    def other(self, grid: np.ndarray, answer: np.ndarray) -> bool:
        """Whether a grid has an answer besides this one: some cell that is not given may hold something else."""
        clues = self._clues(grid)
        blanks = np.flatnonzero(grid == BLANK).tolist()
        return any(self.solver.solve([*clues, -self._says(cell, int(answer[cell]))]) for cell in blanks)

    def problem(self, question: np.ndarray, answer: np.ndarray) -> str:
        """What is wrong with a puzzle, in words, or ""."""
        given = question != BLANK
        if (question[given] != answer[given]).any():
            cell = int(np.flatnonzero(given & (question != answer))[0])
            return f"its answer contradicts the clue {question[cell]} in {self._place(cell)}"
        if not self.possible(answer):
            return "its answer breaks the rules"
        return "it has several answers" if self.other(question, answer) else ""

    def _place(self, cell: int) -> str:
        return f"row {cell // self.size + 1}, column {cell % self.size + 1}"

    def full(self, draw: random.Random) -> np.ndarray:
        """A full grid: cells in a random order, each of the first of its symbols, in a random order, that can be.

        It depends on what can be alone, not on which answer the solver finds first, so that `draw` fixes it.
        """
        grid = np.zeros(self.cells, np.int64)
        for cell in draw.sample(range(self.cells), self.cells):
            for symbol in draw.sample(range(1, self.size + 1), self.size):
                grid[cell] = symbol
                if self.possible(grid):
                    break
        return grid

    def puzzle(self, draw: random.Random, clues: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """A question with one answer, and the answer: from a full grid clues are taken away in a random order.

        Args:
            draw: fixes it.
            clues: the least and the most of them; how many is drawn, and is more where no more can be taken.

        Raises:
            DataError: where so few are not found.
        """
        wanted = draw.randint(*clues)
        for _ in range(_TRIES):
            answer = self.full(draw)
            question = answer.copy()
            for cell in draw.sample(range(self.cells), self.cells):
                if (question != BLANK).sum() <= wanted:
                    break
                question[cell] = BLANK
                if self.solver.solve([*self._clues(question), -self._says(cell, int(answer[cell]))]):
                    question[cell] = answer[cell]
            if (question != BLANK).sum() <= clues[1]:
                return question, answer
        raise DataError(
            f"no sudoku of size {self.size} with {clues[0]} to {clues[1]} clues was found in {_TRIES} tries: "
            "ask for more clues"
        )
