"""Puzzles: what their cells are, and what turns one into another.

A sample is two rows of cells, the question and the answer: symbols 1 .. V, and 0 where the question asks. A puzzle has
one answer. What a folder's puzzles are is in puzzle.json beside its manifest, and in the manifest.

sudoku: N x N cells hold 1 .. N, each once in a row, a column and a box.
maze: N x N cells are WALL, END (two of them), or asked for: FREE, or PATH where the shortest way between the ends goes.
graph: N rows of N cells say which of N nodes are joined (EDGE or APART); the last row asks which node can be reached
(REACHED or not, UNREACHED) from the one that is given as reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.randomness import SYMMETRY_STREAM, uniform

BLANK = 0
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box of Sudoku, by size
WALL, END, FREE, PATH = 1, 2, 3, 4
APART, EDGE, UNREACHED, REACHED = 1, 2, 3, 4
KINDS = ("sudoku", "maze", "graph")
_LARGEST = 99  # rows of a maze, and nodes of a graph


@dataclass(frozen=True)
class Puzzle:
    """What the puzzles of a folder are.

    Attributes:
        kind: of KINDS.
        height, width: of the grid, in cells.
        symbols: V; a cell holds 1 .. V, or BLANK.
    """

    kind: str
    height: int
    width: int
    symbols: int

    @classmethod
    def sudoku(cls, size: int) -> Self:
        """Sudoku of so many rows; raises DataError for a size it has no boxes for."""
        return cls.of("sudoku", size)

    @classmethod
    def of(cls, kind: str, size: int) -> Self:
        """Puzzles of a kind: sudoku or mazes of so many rows, graphs of so many nodes.

        Raises:
            DataError: for a kind or size there is not.
        """
        if kind not in KINDS:
            raise DataError(f"puzzles of kind {kind}: choose one of {', '.join(KINDS)}")
        if kind == "sudoku":
            if size not in BOXES:
                raise DataError(f"sudoku of size {size}: choose one of {', '.join(map(str, BOXES))}")
            return cls(kind, size, size, size)
        if not 5 <= size <= _LARGEST or (kind == "maze" and size % 2 == 0):
            raise DataError(f"{kind} of size {size}: choose {'an odd' if kind == 'maze' else 'a'} one, 5 to {_LARGEST}")
        return cls(kind, size + (kind == "graph"), size, 4)

    @classmethod
    def of_cells(cls, cells: int) -> Self:
        """The first of KINDS that has puzzles of so many cells; raises DataError where none has."""
        for kind in KINDS:
            with suppress(DataError):
                puzzle = cls.of(kind, math.isqrt(cells))
                if puzzle.cells == cells:
                    return puzzle
        raise DataError(
            f"no puzzle has {cells} cells (data.sequence_length): Sudoku and mazes have N^2, graphs N^2 + N"
        )

    @classmethod
    def read(cls, described: dict[str, Any], where: str) -> Self:
        """What a manifest says; raises DataError where it does not."""
        missing = [key for key in ("kind", "height", "width", "symbols") if key not in described]
        if missing:
            raise DataError(f"{where}/manifest.json does not say {', '.join(missing)} of its puzzles: prepare it again")
        puzzle = cls(*(described[key] for key in ("kind", "height", "width", "symbols")))
        try:
            known = cls.of(puzzle.kind, puzzle.width)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if puzzle != known:
            raise DataError(f"{where} holds {puzzle.name} with {puzzle.symbols} symbols: {known.name} has others")
        return puzzle

    def parsed(self, text: str) -> np.ndarray | None:
        """A grid that is written row by row, int64 [cells]: digits, and a dot for BLANK; None: it is none."""
        digits = text.replace(".", "0")
        if len(digits) != self.cells or not (digits.isascii() and digits.isdigit()):
            return None
        return np.frombuffer(digits.encode(), np.uint8).astype(np.int64) - ord("0")

    def describe(self) -> dict[str, Any]:
        """The inverse of `read`."""
        return asdict(self)

    @property
    def cells(self) -> int:
        """How many cells a grid has."""
        return self.height * self.width

    @property
    def name(self) -> str:
        """The kind and size of the puzzle, in words."""
        return f"{self.kind} of {self.height} x {self.width}"


def _shuffled_lines(u_bands: Tensor, u_lines: Tensor) -> Tensor:
    """An order of lines [B, N] that keeps bands together, of uniform numbers [B, bands] and [B, N]."""
    bands = u_bands.argsort(1).argsort(1).repeat_interleave(u_lines.shape[1] // u_bands.shape[1], 1)
    return (bands + u_lines).argsort(1)


def turned(puzzle: Puzzle, samples: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
    """Every puzzle as another that its rules allow.

    Of Sudoku symbols, bands, stacks and the lines in them are shuffled, of graphs nodes; mazes are turned and mirrored.

    Args:
        puzzle: what they are.
        samples: int64 [B, 2, cells].
        sample_ids: int64 [B]; with the seed they say how each is turned.
        seed: the run's.

    Returns:
        int64 [B, 2, cells].
    """
    grids = samples.unflatten(2, (puzzle.height, puzzle.width))

    def draws(*parts: int) -> tuple[Tensor, ...]:
        """Uniform numbers [B, part] for each part."""
        numbers = torch.arange(sum(parts), device=sample_ids.device)
        return uniform(seed, sample_ids, numbers, SYMMETRY_STREAM).t().split(parts, 1)

    return _TURNED[puzzle.kind](puzzle, grids, draws).flatten(2)


def _by_rows(grids: Tensor, rows: Tensor) -> Tensor:
    return grids.gather(2, rows[:, None, :, None].expand(-1, grids.shape[1], -1, grids.shape[3]))


def _by_columns(grids: Tensor, columns: Tensor) -> Tensor:
    return grids.gather(3, columns[:, None, None, :].expand(*grids.shape[:3], -1))


def _turned_sudoku(puzzle: Puzzle, grids: Tensor, draws: _Draws) -> Tensor:
    size, (rows, columns) = puzzle.symbols, BOXES[puzzle.symbols]
    symbols, bands, lines, stacks, more = draws(size, size // rows, size, size // columns, size)
    name = torch.cat([torch.zeros_like(symbols[:, :1]), symbols.argsort(1) + 1], 1).long()  # the blank stays
    grids = name.gather(1, grids.flatten(1)).view_as(grids)
    return _by_columns(_by_rows(grids, _shuffled_lines(bands, lines)), _shuffled_lines(stacks, more))


def _turned_maze(puzzle: Puzzle, grids: Tensor, draws: _Draws) -> Tensor:
    (u,) = draws(3)
    for change, turn in zip(u.t() < 0.5, (lambda g: g.mT, lambda g: g.flip(2), lambda g: g.flip(3)), strict=True):
        grids = torch.where(change[:, None, None, None], turn(grids), grids)
    return grids


def _turned_graph(puzzle: Puzzle, grids: Tensor, draws: _Draws) -> Tensor:
    (u,) = draws(puzzle.width)
    nodes = u.argsort(1)
    last = torch.full_like(nodes[:, :1], puzzle.width)  # the row of what is asked stays the last
    return _by_columns(_by_rows(grids, torch.cat([nodes, last], 1)), nodes)


_Draws = Callable[..., tuple[Tensor, ...]]
_TURNED = {"sudoku": _turned_sudoku, "maze": _turned_maze, "graph": _turned_graph}
