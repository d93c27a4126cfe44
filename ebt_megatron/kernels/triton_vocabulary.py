"""The vocabulary's tiles and the noise of the `triton` backend: one kernel for each pass over a tile.

A program takes one row. The products between the kernels are cuBLAS's, in the precision of
the table, accumulating in fp32 (see `ebt_megatron.kernels.vocabulary`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebt_megatron.kernels.interface import StepRule
from ebt_megatron.kernels.noise import GOLDEN, quantiles, seeded_halves
from ebt_megatron.kernels.vocabulary import RowStats, Tiles, Vocabulary

_BLOCK = 1024


@triton.jit
def _embed(Y, E, TOP, TOTAL, FACTOR, y_stride, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    Y += row * y_stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(Y + c, mask=c < C, other=float("-inf")).to(tl.float32))
    old = tl.load(TOP + row)
    top = tl.maximum(old, tl.max(largest, 0))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        e = tl.exp(tl.load(Y + c, mask=c < C, other=float("-inf")).to(tl.float32) - top)
        tl.store(E + row * C + c, e.to(E.dtype.element_ty), mask=c < C)
        total += e
    factor = tl.exp(old - top)
    tl.store(TOP + row, top)
    tl.store(TOTAL + row, tl.load(TOTAL + row) * factor + tl.sum(total, 0))
    tl.store(FACTOR + row, factor)


@triton.jit
def _moved(Y, Q, c, C, lse, centre, alpha, BY_LOGITS: tl.constexpr, FROM_P: tl.constexpr):
    """p and y' of columns c; outside the tile p = 0 and y' = -inf."""
    y = tl.load(Y + c, mask=c < C, other=float("-inf")).to(tl.float32)
    p = tl.exp(y - lse)
    q = tl.load(Q + c, mask=c < C, other=0.0)
    if BY_LOGITS:
        q = p * (q - centre)
    moved = tl.where(c < C, (p if FROM_P else y) - alpha * q, float("-inf"))
    return p, moved.to(Y.dtype.element_ty).to(tl.float32)  # as it will be stored


@triton.jit
def _refine(
    Y, Q, NEXT, WEIGHT, LSE, CENTRE, ALPHA, TOP, TOTAL, MEAN, FACTOR, y_stride, next_stride, C,
    KEEP: tl.constexpr, BY_LOGITS: tl.constexpr, FROM_P: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Y += row * y_stride
    Q += row * C
    lse, centre, alpha = tl.load(LSE + row), tl.load(CENTRE + row), tl.load(ALPHA + row)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        p, moved = _moved(Y, Q, c, C, lse, centre, alpha, BY_LOGITS, FROM_P)
        if KEEP:
            tl.store(NEXT + row * next_stride + c, moved, mask=c < C)
        largest = tl.maximum(largest, moved)
    old = tl.load(TOP + row)
    top = tl.maximum(old, tl.max(largest, 0))
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        p, moved = _moved(Y, Q, c, C, lse, centre, alpha, BY_LOGITS, FROM_P)
        e = tl.exp(moved - top)
        weight = p * e if BY_LOGITS else e
        tl.store(WEIGHT + row * C + c, weight.to(WEIGHT.dtype.element_ty), mask=c < C)
        total += e
        mean += weight
    factor = tl.exp(old - top)
    tl.store(TOP + row, top)
    tl.store(FACTOR + row, factor)
    tl.store(TOTAL + row, tl.load(TOTAL + row) * factor + tl.sum(total, 0))
    tl.store(MEAN + row, tl.load(MEAN + row) * factor + tl.sum(mean, 0))


@triton.jit
def _update(
    Y, Q, P, LSE, CENTRE, ALPHA, y_stride, C,
    STEP: tl.constexpr, BY_LOGITS: tl.constexpr, FROM_P: tl.constexpr, BLOCK: tl.constexpr,
):
    """P = p; with STEP, Y becomes y'."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    Y += row * y_stride
    lse = tl.load(LSE + row)
    if STEP:
        centre, alpha = tl.load(CENTRE + row), tl.load(ALPHA + row)
        p, moved = _moved(Y, Q + row * C, c, C, lse, centre, alpha, BY_LOGITS, FROM_P)
        tl.store(Y + c, moved, mask=c < C)
    else:
        p = tl.exp(tl.load(Y + c, mask=c < C, other=float("-inf")).to(tl.float32) - lse)
    tl.store(P + row * C + c, p.to(P.dtype.element_ty), mask=c < C)


@triton.jit
def _direction(NEXT, P, OUT, LSE, COLUMN, SCALE, MEAN, next_stride, C, BY_LOGITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_next = tl.load(NEXT + row * next_stride + c, mask=c < C, other=float("-inf")).to(tl.float32)
    p_next = tl.exp(y_next - tl.load(LSE + row))
    hot = (c == tl.load(COLUMN + row)).to(tl.float32)
    out = tl.load(SCALE + row) * (p_next - hot)
    if BY_LOGITS:
        out = (out - tl.load(MEAN + row)) * tl.load(P + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(OUT + row * C + c, out.to(OUT.dtype.element_ty), mask=c < C)


@triton.jit
def _noise(Y, FIRST, SECOND, QUANTILES, y_stride, offset, C, std, GOLDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Y += std * noise; the hash of `ebt_megatron.kernels.noise`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = ((c + offset).to(tl.int32) * GOLDEN + tl.load(FIRST + row)).to(tl.int32)
    h ^= (h >> 16) & 0xFFFF
    h = (h * -2048144789).to(tl.int32)
    h ^= tl.load(SECOND + row)
    h ^= (h >> 13) & 0x7FFFF
    h = (h * -1028477387).to(tl.int32)
    h ^= (h >> 16) & 0xFFFF
    at = Y + row * y_stride + c
    noise = tl.load(QUANTILES + (h & 0xFFFF), mask=c < C, other=0.0)
    y = tl.load(at, mask=c < C, other=0.0)
    tl.store(at, (y + std * noise).to(y.dtype), mask=c < C)


class TritonTiles(Tiles):
    """`Tiles`, each a kernel that reads and writes a tile once (a softmax reads it twice, from cache)."""

    token_tile, column_tile = 2048, 4096  # large for cuBLAS; a tile in fp32 is 32 MB and stays in an H100's cache

    def operand_dtype(self, y: Tensor, table: Tensor) -> torch.dtype:
        """The table's own precision: what the GPU's matrix units are fast in."""
        return table.dtype if y.is_cuda else super().operand_dtype(y, table)

    def embed(self, y: Tensor, stats: RowStats, e: Tensor) -> Tensor:
        """See `Tiles.embed`."""
        factor = torch.empty_like(stats.top)
        _embed[(len(y),)](y, e, stats.top, stats.total, factor, y.stride(0), y.shape[1], BLOCK=_BLOCK)
        return factor

    def refine(
        self, y: Tensor, q: Tensor, lse: Tensor, centre: Tensor, alpha: Tensor, stats: RowStats, weight: Tensor,
        spare: Tensor, y_next: Tensor | None, rule: StepRule,
    ) -> Tensor:
        """See `Tiles.refine`."""
        factor, kept = torch.empty_like(stats.top), y if y_next is None else y_next
        _refine[(len(y),)](
            y, q, kept, weight, lse, centre, alpha, stats.top, stats.total, stats.mean, factor,
            y.stride(0), kept.stride(0), y.shape[1], KEEP=y_next is not None, BY_LOGITS=rule.by_logits,
            FROM_P=rule.from_probabilities, BLOCK=_BLOCK,
        )
        return factor

    def update(
        self, y: Tensor, q: Tensor, lse: Tensor, centre: Tensor, alpha: Tensor, p: Tensor, rule: StepRule
    ) -> None:
        """See `Tiles.update`."""
        grid = (len(y), triton.cdiv(y.shape[1], _BLOCK))
        _update[grid](y, q, p, lse, centre, alpha, y.stride(0), y.shape[1], STEP=True, BY_LOGITS=rule.by_logits,
                      FROM_P=rule.from_probabilities, BLOCK=_BLOCK)

    def probability(self, y: Tensor, lse: Tensor, p: Tensor) -> None:
        """See `Tiles.probability`."""
        grid = (len(y), triton.cdiv(y.shape[1], _BLOCK))
        _update[grid](y, y, p, lse, lse, lse, y.stride(0), y.shape[1], STEP=False, BY_LOGITS=False,
                      FROM_P=False, BLOCK=_BLOCK)

    def direction(
        self, y_next: Tensor, lse_next: Tensor, column: Tensor, scale: Tensor, mean: Tensor, p: Tensor, out: Tensor,
        rule: StepRule,
    ) -> None:
        """See `Tiles.direction`."""
        grid = (len(out), triton.cdiv(out.shape[1], _BLOCK))
        _direction[grid](y_next, p, out, lse_next, column, scale, mean, y_next.stride(0), out.shape[1],
                         BY_LOGITS=rule.by_logits, BLOCK=_BLOCK)


vocabulary = Vocabulary(TritonTiles())


def add_noise_(y: Tensor, keys: Tensor, column_offset: int, std: float, seed: int) -> None:
    """See `Kernels.add_noise_`."""
    first, second = seeded_halves(keys, seed)
    grid = (len(y), triton.cdiv(y.shape[1], _BLOCK))
    _noise[grid](
        y, first, second, quantiles(y.device), y.stride(0), column_offset, y.shape[1], std, GOLDEN=GOLDEN, BLOCK=_BLOCK
    )
