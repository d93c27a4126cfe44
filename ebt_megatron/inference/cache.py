"""The context as thinking reads it: keys and values of every layer, kept as the context grows.

A context position is known by its row of the cache and its position in that row. A pass goes over any set of such
pairs, so rows may be of any lengths and nothing is padded but the scores. Positions count from 0 in every row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebt_megatron.kernels import Kernels
from ebt_megatron.model.layers import Attend

_NEVER = 1 << 62  # the position of a slot that nothing was written to


class Queries:
    """Positions in the order of a pass, [R], and the same grouped by row of the cache, [B', Q].

    Attributes:
        rows, positions: int64 [R].
        own: int64 [B'], the rows that there are.
    """

    def __init__(self, rows: Tensor, positions: Tensor):
        self.rows, self.positions = rows, positions
        self.own, group, counts = rows.unique(return_inverse=True, return_counts=True)
        self.most = int(counts.max()) if len(rows) else 1
        order = torch.argsort(group, stable=True)
        first = counts.cumsum(0) - counts
        self._place = torch.empty_like(order)
        self._place[order] = (
            torch.arange(len(order), device=order.device) - first[group[order]] + self.most * group[order]
        )
        self._places = len(self.own) * self.most
        self._in_order = len(rows) == self._places and bool((self._place[1:] > self._place[:-1]).all())

    def take(self, index: Tensor) -> Queries:
        """Some of them; there may be none."""
        return Queries(self.rows[index], self.positions[index])

    def group(self, x: Tensor) -> Tensor:
        """Put queries [R, ...] of a row beside each other: [B', Q, ...], with zeros where a row has fewer."""
        if not self._in_order:
            x = x.new_zeros(self._places, *x.shape[1:]).index_copy(0, self._place, x)
        return x.unflatten(0, (-1, self.most))

    def ungroup(self, x: Tensor) -> Tensor:
        """The reverse of `group`."""
        flat = x.flatten(0, 1)
        return flat if self._in_order else flat.index_select(0, self._place)


class ContextCache:
    """Keys and values of context positions, for one condition of the context.

    With more positions than it holds, the oldest are written over: what is `window` or more before a query is not
    seen, but for the first `sinks` positions, which always are.

    Args:
        kernels: how attention runs.
        layers: of this pipeline stage.
        rows: B.
        slots: positions of a row that are held, see `slots_for`; bounds the memory.
        window: of positions that a query sees, itself included.
        groups, size: of this rank's key heads.
        sinks: positions before the sequence.
        like: of its dtype and device.
    """

    def __init__(
        self,
        kernels: Kernels,
        layers: int,
        rows: int,
        slots: int,
        window: int,
        groups: int,
        size: int,
        sinks: int,
        like: Tensor,
    ):
        self.kernels, self.window, self.sinks = kernels, window, sinks
        self.kept = torch.zeros(layers, 2, rows, groups, slots, size, dtype=like.dtype, device=like.device)
        self.positions = torch.full((rows, slots), _NEVER, device=like.device)
        self.used = 0

    @staticmethod
    def slots_for(positions: int, window: int, chunk: int, sinks: int) -> int:
        """How many positions of a row to hold: so that a chunk is written over what its first position sees no more.

        Args:
            positions: the most that a row will have, `sinks` included.
            window, sinks: as the cache's.
            chunk: the most positions of a row that one pass adds.
        """
        return min(positions, sinks + window + chunk - 1)

    def append(self, queries: Queries) -> list[Attend]:
        """Attention of each layer for a pass that adds positions to the context: its keys are kept, then read."""
        ring = self.positions.shape[1] - self.sinks
        at = queries.positions
        slots = torch.where(at < self.sinks, at, self.sinks + (at - self.sinks) % max(ring, 1))
        self.positions[queries.rows, slots] = at
        self.used = max(self.used, int(slots.max()) + 1)
        seen = self._seen(queries)

        def attend(layer: int) -> Attend:
            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                for kept, new in zip(self.kept[layer], (k, v), strict=True):
                    kept[queries.rows, :, slots] = new[:, 0]
                out = self.kernels.cached_attention(queries.group(q[:, 0]), *self._read(layer, queries), seen)
                return queries.ungroup(out)[:, None]

            return attention

        return [attend(layer) for layer in range(len(self.kept))]

    def predict(self, queries: Queries) -> list[Attend]:
        """Attention of each layer for predictions at `queries`: each reads the context up to there, and itself."""
        seen = self._seen(queries)

        def attend(layer: int) -> Attend:
            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = (queries.group(t[:, 0]) for t in (q, k, v))
                out = self.kernels.cached_attention(q, *self._read(layer, queries), seen, k, v)
                return queries.ungroup(out)[:, None]

            return attention

        return [attend(layer) for layer in range(len(self.kept))]

    def _read(self, layer: int, queries: Queries) -> tuple[Tensor, Tensor]:
        """Keys and values [B', G, C, H] of the rows that there are queries of; copied only if not of all rows."""
        k, v = self.kept[layer, :, :, :, : self.used].unbind(0)
        return (k, v) if len(queries.own) == len(k) else (k[queries.own], v[queries.own])

    def _seen(self, queries: Queries) -> Tensor:
        """Which cached positions each query may see, bool [B', Q, C]."""
        at = queries.group(queries.positions)[..., None]
        there = self.positions[queries.own, None, : self.used]
        return (there <= at) & ((at - there < self.window) | (there < self.sinks))

    def select(self, rows: Tensor) -> None:
        """Keep some rows, or some of them several times, int64 indices; the cache's rows are then these."""
        self.kept, self.positions = self.kept[:, :, rows], self.positions[rows]


class Context:
    """B rows of context of a model on this pipeline stage.

    Args:
        caches: one, or where the context sees the step one for each landscape.
        sinks: as in `ContextCache`.
    """

    def __init__(self, caches: Sequence[ContextCache], sinks: int):
        self.caches, self.sinks = caches, sinks

    def of(self, landscape: int) -> ContextCache:
        """The cache that a landscape's predictions read."""
        return self.caches[min(landscape, len(self.caches) - 1)]

    def select(self, rows: Tensor) -> None:
        """See `ContextCache.select`."""
        for cache in self.caches:
            cache.select(rows)
