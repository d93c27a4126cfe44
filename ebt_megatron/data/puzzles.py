"""Puzzles: what their cells are, and what turns one into another.

A sample is two rows of cells, the question and the answer: symbols 1 .. V, and 0 where the question asks. A puzzle has
one answer. What a folder's puzzles are is in puzzle.json beside its manifest, and in the manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.randomness import SYMMETRY_STREAM, uniform

BLANK = 0
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box of Sudoku, by size


@dataclass(frozen=True)
class Puzzle:
    """What the puzzles of a folder are.

    Attributes:
        kind: "sudoku".
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
        if size not in BOXES:
            raise DataError(f"sudoku of size {size}: choose one of {', '.join(map(str, BOXES))}")
        return cls("sudoku", size, size, size)

    @classmethod
    def read(cls, described: dict[str, Any], where: str) -> Self:
        """What a manifest says; raises DataError where it does not."""
        missing = [key for key in ("kind", "height", "width", "symbols") if key not in described]
        if missing:
            raise DataError(f"{where}/manifest.json does not say {', '.join(missing)} of its puzzles: prepare it again")
        puzzle = cls(*(described[key] for key in ("kind", "height", "width", "symbols")))
        if puzzle.kind != "sudoku" or puzzle.symbols not in BOXES:
            raise DataError(f"{where} holds {puzzle.kind} of {puzzle.symbols} symbols, which is not known: sudoku is")
        return puzzle

    def describe(self) -> dict[str, Any]:
        """The inverse of `read`."""
        return asdict(self)

    @property
    def cells(self) -> int:
        """Of a grid."""
        return self.height * self.width

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.kind} of {self.height} x {self.width}"


def _shuffled_lines(u_bands: Tensor, u_lines: Tensor) -> Tensor:
    """An order of lines [B, N] that keeps bands together, of uniform numbers [B, bands] and [B, N]."""
    bands = u_bands.argsort(1).argsort(1).repeat_interleave(u_lines.shape[1] // u_bands.shape[1], 1)
    return (bands + u_lines).argsort(1)


def turned(puzzle: Puzzle, samples: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
    """Every puzzle as another that its rules allow: of Sudoku symbols, bands, stacks and the lines in them shuffled.

    Args:
        puzzle: what they are.
        samples: int64 [B, 2, cells].
        sample_ids: int64 [B]; with the seed they say how each is turned.
        seed: the run's.

    Returns:
        int64 [B, 2, cells].
    """
    size, (rows, columns) = puzzle.symbols, BOXES[puzzle.symbols]
    parts = [size, size // rows, size, size // columns, size]  # symbols; bands and their rows; stacks and their columns
    u = uniform(seed, sample_ids, torch.arange(sum(parts), device=sample_ids.device), SYMMETRY_STREAM)
    symbols, bands, lines, stacks, more = u.t().split(parts, 1)
    name = torch.cat([torch.zeros_like(symbols[:, :1]), symbols.argsort(1) + 1], 1).long()  # the blank stays
    grids = name.gather(1, samples.flatten(1)).unflatten(1, (2, puzzle.height, puzzle.width))
    by_row, by_column = _shuffled_lines(bands, lines), _shuffled_lines(stacks, more)
    grids = grids.gather(2, by_row[:, None, :, None].expand_as(grids))
    return grids.gather(3, by_column[:, None, None, :].expand_as(grids)).flatten(2)
