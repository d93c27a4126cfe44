"""The vocabulary's operations, over tiles of tokens and columns: no temporary as wide as the vocabulary.

`Vocabulary` goes through the tiles and does the matrix products (by BLAS); `Tiles` does the
elementwise work on a tile, here in torch. `ebt_megatron.kernels.triton_vocabulary` has the
tiles of the `triton` backend, each one kernel. The notation is that of
`ebt_megatron.kernels.interface`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_megatron.kernels.interface import RefineStats, StepRule, compute_dtype


@dataclass
class RowStats:
    """Sums over the columns so far, relative to the largest logit so far; each [T]."""

    top: Tensor
    total: Tensor
    mean: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> RowStats:
        """Return the sums over no columns."""
        zeros = like.new_zeros(3, len(like))
        zeros[0].fill_(-math.inf)
        return cls(*zeros)

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the columns so far."""
        return self.top + self.total.log()


_LOG2E = 1 / math.log(2)


def exp_minus(y: Tensor, row: Tensor, out: Tensor) -> Tensor:
    """out = exp(y - row) of y [..., c] and a value for each of its rows [..., 1], as a power of two.

    On a CPU torch.exp2 takes a third of the time of torch.exp; the factor log2(e) comes with the subtraction.
    """
    return torch.add(row * -_LOG2E, y, alpha=_LOG2E, out=out).exp2_()


class Tiles:
    """Elementwise work on tiles [t, c] of the logits; row vectors are [t]. Results go into given buffers."""

    token_tile, column_tile = 512, 1024  # on two cores no other size was faster

    def operand_dtype(self, y: Tensor, table: Tensor) -> torch.dtype:
        """Precision of the matrix products' operands; they accumulate in fp32 at least."""
        return compute_dtype(y, table)

    def embed(self, y: Tensor, stats: RowStats, e: Tensor) -> Tensor:
        """e = exp(y - top), with the new top; returns the factor [t] for what was summed before."""
        top = torch.maximum(stats.top, y.amax(1))
        factor = (stats.top - top).exp()
        exp_minus(y, top[:, None], e)
        stats.total.mul_(factor).add_(e.sum(1))
        stats.top.copy_(top)
        return factor

    def refine(
        self,
        y: Tensor,
        q: Tensor,
        lse: Tensor,
        centre: Tensor,
        alpha: Tensor,
        stats: RowStats,
        weight: Tensor,
        spare: Tensor,
        y_next: Tensor | None,
        rule: StepRule,
    ) -> Tensor:
        """weight = r exp(y' - top), and its sums.

        y' goes to y_next if given. Overwrites q.

        Returns:
            The factor [t] for what was summed before.
        """
        p = weight if rule is StepRule.MIRROR else exp_minus(y, lse[:, None], weight)
        g = q.sub_(centre[:, None]).mul_(p) if rule.by_logits else q
        stored = y_next is not None and y_next.dtype == spare.dtype
        moved = torch.addcmul(
            p if rule.from_probabilities else y, g, alpha[:, None], value=-1, out=y_next if stored else spare
        )
        if y_next is not None and not stored:
            y_next.copy_(moved)
        if y.dtype != moved.dtype:  # what is made of y' is made of it as it will be stored
            moved.copy_(moved.to(y.dtype))
        top = torch.maximum(stats.top, moved.amax(1))
        factor = (stats.top - top).exp()
        e = exp_minus(moved, top[:, None], spare if rule.by_logits else weight)
        stats.total.mul_(factor).add_(e.sum(1))
        if rule.by_logits:
            stats.mean.mul_(factor).add_(weight.mul_(e).sum(1))
        else:
            stats.mean.copy_(stats.total)
        stats.top.copy_(top)
        return factor

    def update(
        self, y: Tensor, q: Tensor, lse: Tensor, centre: Tensor, alpha: Tensor, p: Tensor, rule: StepRule
    ) -> None:
        """p = exp(y - lse), then y becomes y'. Overwrites q."""
        exp_minus(y, lse[:, None], p)
        g = q.sub_(centre[:, None]).mul_(p) if rule.by_logits else q
        torch.addcmul(p if rule.from_probabilities else y, g, alpha[:, None], value=-1, out=y)

    def probability(self, y: Tensor, lse: Tensor, p: Tensor) -> None:
        """p = exp(y - lse)."""
        exp_minus(y, lse[:, None], p)

    def direction(
        self,
        y_next: Tensor,
        lse_next: Tensor,
        column: Tensor,
        scale: Tensor,
        mean: Tensor,
        p: Tensor,
        out: Tensor,
        rule: StepRule,
    ) -> None:
        """out = r (scale (p' - 1[target]) - mean); mean is for logit_descent alone, as p is.

        column [t]: the target's, if it is in this tile. scale is positive.
        """
        exp_minus(y_next, (lse_next - scale.log())[:, None], out)
        here = (column >= 0) & (column < out.shape[1])
        out.scatter_add_(1, column.clamp(0, out.shape[1] - 1)[:, None], -(scale * here)[:, None])
        if rule.by_logits:
            out.sub_(mean[:, None]).mul_(p)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b; narrow operands (on a GPU) accumulate in the precision of out."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b; narrow operands accumulate in the precision of out."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.itemsize < out.itemsize:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:  # gradients kept in the table's low precision
        out.add_(torch.mm(a, b))


class Vocabulary:
    """The operations `vocab_*` of `ebt_megatron.kernels.interface`, on given tiles."""

    def __init__(self, tiles: Tiles):
        self.tiles = tiles

    def _tokens(self, y: Tensor) -> Iterator[slice]:
        size = self.tiles.token_tile
        return (slice(i, min(i + size, len(y))) for i in range(0, len(y), size))

    def _columns(self, valid: int) -> Iterator[slice]:
        size = self.tiles.column_tile
        return (slice(i, min(i + size, valid)) for i in range(0, valid, size))

    def _buffers(self, y: Tensor, valid: int, *dtypes: torch.dtype) -> list[Tensor]:
        # Allocated once a call: on a CPU, touching fresh memory costs more than the arithmetic on it.
        size = min(self.tiles.token_tile, len(y)) * min(self.tiles.column_tile, valid)
        return [torch.empty(size, dtype=dtype, device=y.device) for dtype in dtypes]

    @staticmethod
    def _tile(buffer: Tensor, t: slice, c: slice) -> Tensor:
        rows, columns = t.stop - t.start, c.stop - c.start
        return buffer[: rows * columns].view(rows, columns)

    def embed(self, y: Tensor, table: Tensor, valid: int) -> tuple[Tensor, Tensor]:
        """See `Kernels.vocab_embed`."""
        dtype = self.tiles.operand_dtype(y, table)
        (buffer,) = self._buffers(y, valid, dtype)
        lse = torch.empty(len(y), dtype=compute_dtype(y, table), device=y.device)
        x = lse.new_empty(len(y), table.shape[1])
        for t in self._tokens(y):
            stats, sums = RowStats.empty(lse[t]), lse.new_zeros(t.stop - t.start, table.shape[1])
            for c in self._columns(valid):
                e = self._tile(buffer, t, c)
                sums.mul_(self.tiles.embed(y[t, c], stats, e)[:, None])
                _accumulate(sums, e, table[c].to(dtype))
            torch.div(sums, stats.total[:, None], out=x[t])
            lse[t] = stats.lse
        return x, lse

    def refine(
        self,
        y: Tensor,
        lse: Tensor,
        table: Tensor,
        valid: int,
        energy_grad: Tensor,
        centre: Tensor,
        alpha: Tensor,
        target: Tensor,
        rule: StepRule,
        y_next: Tensor | None = None,
    ) -> RefineStats:
        """See `Kernels.vocab_refine`."""
        dtype, width = self.tiles.operand_dtype(y, table), table.shape[1]
        slope, weights, spares = self._buffers(y, valid, lse.dtype, dtype, lse.dtype)
        lse_next, mean, embedded = torch.empty_like(lse), torch.empty_like(lse), lse.new_empty(len(y), width)
        narrow = energy_grad.to(dtype)
        for t in self._tokens(y):
            stats, weighted = RowStats.empty(lse[t]), lse.new_zeros(t.stop - t.start, width)
            for c in self._columns(valid):
                rows, weight = table[c].to(dtype), self._tile(weights, t, c)
                q = _multiply(narrow[t], rows.mT, self._tile(slope, t, c))
                spare, kept = self._tile(spares, t, c), None if y_next is None else y_next[t, c]
                factor = self.tiles.refine(y[t, c], q, lse[t], centre[t], alpha[t], stats, weight, spare, kept, rule)
                weighted.mul_(factor[:, None])
                _accumulate(weighted, weight, rows)
            lse_next[t], mean[t] = stats.lse, stats.mean / stats.total
            torch.div(weighted, stats.total[:, None], out=embedded[t])
        # At the targets, one product of rows each: cheaper than looking for them in the tiles.
        here = target >= 0
        row = target.clamp_min(0)[:, None]
        logit = y.gather(1, row)[:, 0]
        p_target = (logit - lse).exp()
        if y_next is None:
            g = torch.linalg.vecdot(energy_grad, table[row[:, 0]].to(lse.dtype))
            g = p_target * (g - centre) if rule.by_logits else g
            moved = ((p_target if rule.from_probabilities else logit) - alpha * g).to(y.dtype)
        else:
            moved = y_next.gather(1, row)[:, 0]
        return RefineStats(lse_next, moved.to(lse.dtype) * here, p_target * here, mean, embedded)

    def backward(
        self,
        y: Tensor,
        lse: Tensor,
        table: Tensor,
        valid: int,
        energy_grad: Tensor,
        centre: Tensor,
        alpha: Tensor,
        target: Tensor,
        rule: StepRule,
        lse_next: Tensor,
        scale: Tensor,
        mean: Tensor,
        x_grad: Tensor | None,
        xt_grad: Tensor,
        table_grad: Tensor,
        y_next: Tensor | None = None,
    ) -> None:
        """See `Kernels.vocab_backward`."""
        dtype = self.tiles.operand_dtype(y, table)
        slope, values, tangents = self._buffers(y, valid, lse.dtype, dtype, dtype)
        narrow, xt_grad = energy_grad.to(dtype), xt_grad.to(dtype)
        x_grad = None if x_grad is None else x_grad.to(dtype)
        for c in self._columns(valid):
            rows = table[c].to(dtype)
            for t in self._tokens(y):
                p, direction = self._tile(values, t, c), self._tile(tangents, t, c)
                if y_next is None:
                    q = _multiply(narrow[t], rows.mT, self._tile(slope, t, c))
                    self.tiles.update(y[t, c], q, lse[t], centre[t], alpha[t], p, rule)
                    moved = y[t, c]
                else:
                    if x_grad is not None or rule.by_logits:
                        self.tiles.probability(y[t, c], lse[t], p)
                    moved = y_next[t, c]
                self.tiles.direction(moved, lse_next[t], target[t] - c.start, scale[t], mean[t], p, direction, rule)
                if x_grad is not None:
                    _accumulate(table_grad[c], p.mT, x_grad[t])
                _accumulate(table_grad[c], direction.mT, xt_grad[t])

    def update(
        self,
        y: Tensor,
        lse: Tensor,
        table: Tensor,
        valid: int,
        energy_grad: Tensor,
        centre: Tensor,
        alpha: Tensor,
        rule: StepRule,
    ) -> None:
        """See `Kernels.vocab_update`."""
        dtype = self.tiles.operand_dtype(y, table)
        slope, values = self._buffers(y, valid, lse.dtype, dtype)
        narrow = energy_grad.to(dtype)
        for c in self._columns(valid):
            rows = table[c].to(dtype)
            for t in self._tokens(y):
                q = _multiply(narrow[t], rows.mT, self._tile(slope, t, c))
                p = self._tile(values, t, c)
                self.tiles.update(y[t, c], q, lse[t], centre[t], alpha[t], p, rule)

    # --- along an adjoint as wide as the vocabulary (training through several steps) -----------------

    def adjoint(
        self, y_next: Tensor, lse_next: Tensor, target: Tensor, weight: Tensor, valid: int, adjoint: Tensor
    ) -> None:
        """See `Kernels.vocab_adjoint`."""
        (buffer,) = self._buffers(y_next, valid, lse_next.dtype)
        for t in self._tokens(y_next):
            for c in self._columns(valid):
                p = self._tile(buffer, t, c)
                self.tiles.probability(y_next[t, c], lse_next[t], p)
                adjoint[t, c].addcmul_(p, weight[t, None])
        at_target = torch.where(target >= 0, weight, 0)[:, None]
        adjoint.scatter_add_(1, target.clamp_min(0)[:, None], -at_target)  # one entry a row: no order to it

    def dot_step(
        self,
        y: Tensor,
        lse: Tensor,
        table: Tensor,
        valid: int,
        energy_grad: Tensor,
        centre: Tensor,
        rule: StepRule,
        adjoint: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.vocab_dot_step`."""
        dtype, slope, mean = self.tiles.operand_dtype(y, table), torch.zeros_like(lse), torch.zeros_like(lse)
        products, values = self._buffers(y, valid, lse.dtype, lse.dtype)
        narrow = energy_grad.to(dtype)
        for c in self._columns(valid):
            rows = table[c].to(dtype)
            for t in self._tokens(y):
                q, p = _multiply(narrow[t], rows.mT, self._tile(products, t, c)), self._tile(values, t, c)
                self.tiles.probability(y[t, c], lse[t], p)
                g = q.sub_(centre[t, None]).mul_(p) if rule.by_logits else q
                slope[t] += torch.linalg.vecdot(g, adjoint[t, c])
                mean[t] += torch.linalg.vecdot(p, adjoint[t, c])
        return slope, mean

    def tangent(
        self, y: Tensor, lse: Tensor, table: Tensor, valid: int, rule: StepRule, adjoint: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.vocab_tangent`."""
        dtype = self.tiles.operand_dtype(y, table)
        (buffer,) = self._buffers(y, valid, lse.dtype)
        norm2, embedded = torch.zeros_like(lse), lse.new_zeros(len(y), table.shape[1])
        for c in self._columns(valid):
            rows = table[c].to(dtype)
            for t in self._tokens(y):
                part = adjoint[t, c]
                norm2[t] += torch.linalg.vecdot(part, part)
                if rule.by_logits:
                    weighted = self._tile(buffer, t, c)
                    self.tiles.probability(y[t, c], lse[t], weighted)
                    part = weighted.mul_(part)
                _accumulate(embedded[t], part.to(dtype), rows)
        return norm2, embedded

    def to_logits(self, y: Tensor, lse: Tensor, valid: int, mean: Tensor, adjoint: Tensor) -> None:
        """See `Kernels.vocab_to_logits`."""
        (buffer,) = self._buffers(y, valid, lse.dtype)
        for t in self._tokens(y):
            for c in self._columns(valid):
                p = self._tile(buffer, t, c)
                self.tiles.probability(y[t, c], lse[t], p)
                adjoint[t, c].sub_(mean[t, None]).mul_(p)

    def dense_backward(
        self,
        y: Tensor,
        lse: Tensor,
        table: Tensor,
        valid: int,
        rule: StepRule,
        adjoint: Tensor,
        scale: Tensor,
        mean: Tensor,
        x: Tensor,
        xt: Tensor,
        x_grad: Tensor,
        xt_grad: Tensor,
        table_grad: Tensor,
    ) -> None:
        """See `Kernels.vocab_dense_backward`; the derivation is beside `reference.vocab_dense_backward`."""
        dtype = self.tiles.operand_dtype(y, table)
        values, tangents, firsts, seconds = self._buffers(y, valid, *[lse.dtype] * 4)
        along_value, along_tangent = torch.linalg.vecdot(x, x_grad), torch.linalg.vecdot(x, xt_grad)
        if rule.by_logits:
            along_value = along_value + torch.linalg.vecdot(xt, xt_grad)
        x_narrow, xt_narrow, unscaled = x_grad.to(dtype), xt_grad.to(dtype), mean / scale
        for c in self._columns(valid):
            rows = table[c].to(dtype)
            for t in self._tokens(y):
                p, direction = self._tile(values, t, c), self._tile(tangents, t, c)
                self.tiles.probability(y[t, c], lse[t], p)
                torch.mul(adjoint[t, c], scale[t, None], out=direction)
                through = _multiply(x_narrow[t], rows.mT, self._tile(seconds, t, c)).sub_(along_value[t, None])
                if rule.by_logits:
                    direction.sub_(mean[t, None])
                    slope = _multiply(xt_narrow[t], rows.mT, self._tile(firsts, t, c)).sub_(along_tangent[t, None])
                    through.addcmul_(slope, direction)
                    direction.mul_(p)
                if rule.from_probabilities:
                    adjoint[t, c].sub_(unscaled[t, None]).add_(through).mul_(p)
                else:
                    adjoint[t, c].addcmul_(p, through)
                _accumulate(table_grad[c], p.to(dtype).mT, x_narrow[t])
                _accumulate(table_grad[c], direction.to(dtype).mT, xt_narrow[t])
