"""Mazes and graphs by networkx: made by seed, and verified.

`ebt_megatron.data.puzzles` says what their cells hold.
"""

from __future__ import annotations

import itertools
import random

import networkx
import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.puzzles import APART, BLANK, EDGE, END, FREE, PATH, REACHED, UNREACHED, WALL
from ebt_megatron.data_prep.rules import Made

Cell = tuple[int, int]
_FAR = 5  # cells of a maze's way, its ends among them, at least


class Maze:
    """Mazes of up to N x N cells in N x N cells, the rest of which is wall: one way leads from one end to the other.

    Args:
        size: N, odd.
    """

    measure = "rows"

    def __init__(self, size: int):
        self.size = size
        self.usual = self.limits = 5, size

    def extent(self, question: np.ndarray) -> int:
        """Rows or columns of the part that is not wall, the outer wall with it, whichever are more."""
        open_ = np.argwhere(question.reshape(self.size, self.size) != WALL)
        return int((open_.max(0) - open_.min(0)).max()) + 3 if len(open_) else 0

    def puzzle(self, draw: random.Random, extent: tuple[int, int]) -> Made:
        """A random spanning tree of rooms two cells apart, by depth-first search, somewhere in the grid."""
        sizes = [n for n in range(extent[0], extent[1] + 1) if n % 2]
        if not sizes:
            raise DataError(f"no maze has {extent[0]} rows: its rows are odd")
        rows = draw.choice(sizes)
        grid = np.full((self.size, self.size), WALL)
        top, left = (draw.randrange(self.size - rows + 1) for _ in range(2))
        part = grid[top : top + rows, left : left + rows]
        rooms = networkx.grid_2d_graph(rows // 2, rows // 2)
        seen, stack = {(0, 0)}, [(0, 0)]
        part[1, 1] = BLANK
        while stack:
            here = stack[-1]
            new = sorted(room for room in rooms[here] if room not in seen)
            if not new:
                stack.pop()
                continue
            there = draw.choice(new)
            part[1 + here[0] + there[0], 1 + here[1] + there[1]] = BLANK  # what is between them
            part[1 + 2 * there[0], 1 + 2 * there[1]] = BLANK
            seen.add(there)
            stack.append(there)
        cells = np.flatnonzero(grid == BLANK).tolist()
        while True:
            question = grid.copy()
            question.flat[draw.sample(cells, 2)] = END
            (way,) = self._ways(question)
            if len(way) >= _FAR:
                return question.flatten(), self._answer(question, way).flatten()

    @staticmethod
    def _answer(grid: np.ndarray, way: list[Cell]) -> np.ndarray:
        answer = np.where(grid == BLANK, FREE, grid)
        for cell in way[1:-1]:
            answer[cell] = PATH
        return answer

    def _ways(self, grid: np.ndarray) -> list[list[Cell]]:
        """The shortest ways from one end to the other, two of them at most."""
        cells = networkx.grid_2d_graph(self.size, self.size)
        cells.remove_nodes_from(list(map(tuple, np.argwhere(grid == WALL).tolist())))
        ends = list(map(tuple, np.argwhere(grid == END).tolist()))
        if len(ends) != 2 or not networkx.has_path(cells, *ends):
            return []
        return list(itertools.islice(networkx.all_shortest_paths(cells, *ends), 2))

    def problem(self, question: np.ndarray, answer: np.ndarray) -> str:
        """See `Rules`."""
        grid = question.reshape(self.size, self.size)
        if not np.isin(question, (BLANK, WALL, END)).all():
            return "its question has other cells than walls, ends and those that are asked for"
        ways = self._ways(grid)
        if not ways:
            return "no way leads from one end to another"
        if len(ways) > 1:
            return "it has several answers"
        right = self._answer(grid, ways[0]).flatten()
        return "" if (right == answer).all() else "its answer is not the shortest way"


class Graph:
    """Undirected graphs of up to N nodes among N, the rest of which are joined to none: what can be reached from one.

    Args:
        size: N.
    """

    measure = "nodes"

    def __init__(self, size: int):
        self.size = size
        self.usual = self.limits = 4, size

    def extent(self, question: np.ndarray) -> int:
        """Nodes that are joined to another."""
        return int((question.reshape(-1, self.size)[:-1] == EDGE).any(1).sum())

    def puzzle(self, draw: random.Random, extent: tuple[int, int]) -> Made:
        """Two random trees, so that some nodes are reached and some are not."""
        nodes = draw.sample(range(self.size), draw.randint(*extent))
        cut = draw.randint(2, len(nodes) - 2)
        question = np.full((self.size + 1, self.size), APART)
        for part in (nodes[:cut], nodes[cut:]):
            for i in range(1, len(part)):
                one, other = part[i], part[draw.randrange(max(0, i - 2), i)]  # of the last two: chains are long
                question[one, other] = question[other, one] = EDGE
        question[-1] = BLANK
        question[-1, nodes[0]] = REACHED
        return question.flatten(), self._answer(question).flatten()

    def _answer(self, question: np.ndarray) -> np.ndarray:
        (source,) = np.flatnonzero(question[-1] == REACHED).tolist()
        graph = networkx.from_numpy_array(question[:-1] == EDGE)
        answer = question.copy()
        answer[-1] = UNREACHED
        answer[-1, sorted(networkx.node_connected_component(graph, source))] = REACHED
        return answer

    def problem(self, question: np.ndarray, answer: np.ndarray) -> str:
        """See `Rules`."""
        rows = question.reshape(self.size + 1, self.size)
        if not np.isin(rows[:-1], (APART, EDGE)).all() or (rows[:-1] != rows[:-1].T).any():
            return "its question does not say of every two nodes whether they are joined"
        if (rows[-1] == REACHED).sum() != 1 or not np.isin(rows[-1], (BLANK, REACHED)).all():
            return "its question gives no one node as reached"
        return "" if (self._answer(rows).flatten() == answer).all() else "its answer is not what can be reached"
