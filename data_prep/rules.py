"""What making and verifying puzzles of a kind takes: its rules."""

from __future__ import annotations

import random
from functools import cache
from typing import Protocol

import numpy as np

from ebt_megatron.data.puzzles import Puzzle

Made = tuple[np.ndarray, np.ndarray]  # a question [cells] and its answer


class Rules(Protocol):
    """The rules of puzzles of one kind and size; grids are int64 [cells].

    Attributes:
        measure: in words, what says how hard a puzzle is.
        usual: the least and the most of it, unless others are asked for.
        limits: the least and the most that can be asked for.
    """

    measure: str
    usual: tuple[int, int]
    limits: tuple[int, int]

    def extent(self, question: np.ndarray) -> int:
        """How much there is of `measure` in a question."""
        ...

    def puzzle(self, draw: random.Random, extent: tuple[int, int]) -> Made:
        """A question with one answer, and the answer; `draw` fixes them. Raises DataError where none is found."""
        ...

    def problem(self, question: np.ndarray, answer: np.ndarray) -> str:
        """What is wrong with a puzzle, in words, or ""."""
        ...


@cache
def rules_of(puzzle: Puzzle) -> Rules:
    """The rules of a folder's puzzles, in this process."""
    if puzzle.kind == "sudoku":
        from ebt_megatron.data_prep.sudoku import Sudoku

        return Sudoku(puzzle.symbols)
    from ebt_megatron.data_prep import networks

    return networks.Maze(puzzle.width) if puzzle.kind == "maze" else networks.Graph(puzzle.width)
