"""The order of samples: a pure function of (seed, epoch), blended from several sources.

Nothing here reads data. A position in the run is one number, so a run stops at any sample and
goes on with any number of ranks, and the global sequence is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.randomness import stable_seed

_BLOCK = 1 << 16  # positions between two running counts of a blend's sources


def drawn_samples(shards: list[list[int]], samples: int, seed: int) -> list[np.ndarray]:
    """Draw samples of each source by its size, without replacement: their numbers, ascending.

    Args:
        shards: of each source, samples of each of its shards.
        samples: in all.
        seed: of the draw.

    Raises:
        DataError: if there are not so many, or a source would give none.
    """
    sizes = np.array([sum(of) for of in shards])
    if samples > sizes.sum():
        raise DataError(f"data.unique_samples={samples}, and data.train has {sizes.sum()} samples")
    ends = np.round(np.cumsum(sizes) * (samples / sizes.sum())).astype(int)
    wanted = np.diff(ends, prepend=0).tolist()
    if not all(wanted):
        raise DataError(f"data.unique_samples={samples} is not one sample of each of {len(shards)} sources: raise it")
    draws = [np.random.Generator(np.random.Philox(stable_seed(seed, "unique", i))) for i in range(len(shards))]
    return [np.sort(d.choice(size, n, replace=False)) for d, size, n in zip(draws, sizes, wanted, strict=True)]


class SourceOrder:
    """One source's samples, turn after turn without end.

    A turn deals the shards into groups at random and mixes the samples within each group, so only
    one group's shards are needed at a time.

    Args:
        shards: samples of each shard.
        together: shards of a group; 0: all.
        shuffle: False: shards and samples in their own order.
        key: of the random order.
        kept: numbers of the samples that there are, ascending; None: all.
    """

    def __init__(self, shards: list[int], together: int, shuffle: bool, *key: Any, kept: np.ndarray | None = None):
        self.first = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
        self.kept = kept
        if kept is not None:  # samples are then counted among those that are kept
            self.first = np.searchsorted(kept, self.first)
        self.size = int(self.first[-1])
        self.together, self.shuffle, self.key = together or len(shards), shuffle, key
        self._groups = -(-len(shards) // self.together)
        # A turn's deal is asked for by its neighbour, too; of the samples only one group's are held.
        self._deal = lru_cache(maxsize=2)(self._new_deal)
        self._samples = lru_cache(maxsize=1)(self._new_samples)

    def _mix(self, array: np.ndarray, *key: Any) -> np.ndarray:
        if self.shuffle:
            np.random.Generator(np.random.Philox(stable_seed(*self.key, *key))).shuffle(array)
        return array

    def _new_deal(self, turn: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each group, and where in the turn each group ends."""
        shards = self._mix(np.arange(len(self.first) - 1), "shards", turn)
        groups = [shards[i : i + self.together] for i in range(0, len(shards), self.together)]
        sizes = self.first[1:] - self.first[:-1]
        return groups, np.cumsum([sizes[g].sum() for g in groups])

    def _new_samples(self, turn: int, group: int) -> np.ndarray:
        shards = self._deal(turn)[0][group]
        ranges = [np.arange(self.first[s], self.first[s + 1]) for s in shards]
        order = self._mix(np.concatenate(ranges), "samples", turn, group)
        return order if self.kept is None else self.kept[order]

    def samples(self, places: np.ndarray) -> np.ndarray:
        """The samples at these places (ascending) of the endless sequence."""
        parts = []
        while len(places):
            turn, offset = divmod(int(places[0]), self.size)
            ends = self._deal(turn)[1]
            group = int(np.searchsorted(ends, offset, side="right"))
            begin = turn * self.size + (int(ends[group - 1]) if group else 0)
            count = int(np.searchsorted(places, turn * self.size + int(ends[group])))
            parts.append(self._samples(turn, group)[places[:count] - begin])
            places = places[count:]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def shards(self, first: int, last: int) -> list[int]:
        """The shards that places first .. last need, then those of the group after them."""
        begin, end = self._group(first), self._group(last) + 1
        numbers: dict[int, None] = {}
        for number in range(begin, end + 1):
            turn, group = divmod(number, self._groups)
            numbers.update(dict.fromkeys(self._deal(turn)[0][group].tolist()))
        return list(numbers)

    def _group(self, place: int) -> int:
        """The group a place belongs to, counted over all turns."""
        turn, offset = divmod(place, self.size)
        return turn * self._groups + int(np.searchsorted(self._deal(turn)[1], offset, side="right"))


class Blend:
    """Several sources as one endless sequence of epochs.

    An epoch has as many samples as all sources together; a source with weight w gives the
    share w of them, going through its own samples in an order of its own, again and again.

    Args:
        shards: of each source, samples of each of its shards.
        weights: relative; empty: by size.
        seed: of every order.
        shuffle: False: sources one after the other, in their own order.
        together: shards whose samples are mixed with each other; 0: all of a source.
        kept: of each source, the samples that there are; None: all.
    """

    def __init__(
        self,
        shards: list[list[int]],
        weights: list[float],
        seed: int,
        shuffle: bool,
        together: int = 0,
        kept: list[np.ndarray] | None = None,
    ):
        chosen: list[np.ndarray | None] = [*kept] if kept else [None] * len(shards)
        self.sources = [
            SourceOrder(s, together, shuffle, seed, "source", i, kept=chosen[i]) for i, s in enumerate(shards)
        ]
        self.seed, self.shuffle = seed, shuffle
        sizes = [s.size for s in self.sources]
        share = np.array(weights or sizes, dtype=np.float64)
        share = np.floor(share / share.sum() * sum(sizes)).astype(np.int64)
        share[np.argmax(share)] += sum(sizes) - share.sum()
        self.share = share
        self._turns = lru_cache(maxsize=2)(self._new_turns)

    def __len__(self) -> int:
        return int(self.share.sum())

    def _new_turns(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Say whose turn it is at every position of an epoch [N], and how often it was whose before every block."""
        whose = np.repeat(np.arange(len(self.sources), dtype=np.uint16), self.share)
        if self.shuffle:
            np.random.Generator(np.random.Philox(stable_seed(self.seed, "epoch", epoch))).shuffle(whose)
        blocks = range(0, len(whose), _BLOCK)
        counts = [np.bincount(whose[b : b + _BLOCK], minlength=len(self.sources)) for b in blocks]
        return whose, np.cumsum([np.zeros_like(self.share), *counts], axis=0)

    def _places(self, epoch: int, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources at these positions of an epoch, and places in the sources' own sequences."""
        if len(self.sources) == 1:
            return np.zeros(len(within), np.int64), within + epoch * len(self)
        whose, counts = self._turns(epoch)
        block = int(within.min()) // _BLOCK
        begin = block * _BLOCK
        span = whose[begin : int(within.max()) + 1]
        sources = span[within - begin].astype(np.int64)
        places = np.empty(len(within), np.int64)
        for i in np.unique(sources).tolist():
            before = np.cumsum(span == i) - 1
            at = sources == i
            places[at] = before[within[at] - begin] + counts[block, i] + epoch * self.share[i]
        return sources, places

    def _by_source(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Sort positions by source: (source, where its positions are, places in its sequence), each in order."""
        size, parts, rest = len(self), [], positions
        while len(rest):
            epoch = int(rest[0]) // size
            count = int(np.searchsorted(rest, (epoch + 1) * size))
            parts.append(self._places(epoch, rest[:count] - epoch * size))
            rest = rest[count:]
        sources, places = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        for i in np.unique(sources).tolist():
            at = np.flatnonzero(sources == i)
            yield i, at, places[at]

    def locate_all(self, positions: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Global positions in the run [N], in order -> of each source that has some: (source, where, its samples)."""
        return [(i, at, self.sources[i].samples(places)) for i, at, places in self._by_source(positions)]

    def locate(self, position: int) -> tuple[int, int]:
        """Global position in the run -> (source, sample of that source)."""
        ((source, _, samples),) = self.locate_all(np.array([position]))
        return source, int(samples[0])

    def shards(self, positions: np.ndarray) -> dict[int, list[int]]:
        """Return, for each source that these ordered positions need, its shards for them, then the next ones."""
        return {
            i: self.sources[i].shards(int(places[0]), int(places[-1])) for i, _, places in self._by_source(positions)
        }
