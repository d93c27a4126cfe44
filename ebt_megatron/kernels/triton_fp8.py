"""Rounding to 8-bit floats of the `triton` backend: two reads and one write of a quarter to half their size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebt_megatron.kernels.fp8 import FP8, MULTIPLE

_ROWS, _COLUMNS = 32, 128  # of a tile; wide enough to read along either dimension


@triton.jit
def _tile(X, r, k, rows, columns, stride_r, stride_k):
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    at = r.to(tl.int64)[:, None] * stride_r + k.to(tl.int64)[None, :] * stride_k
    return tl.load(X + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _round_rows(X, OUT8, SCALE, rows, columns, width, stride_r, stride_k, BR: tl.constexpr, BK: tl.constexpr):
    """X [rows, columns] of any strides; OUT8 [rows, width] and SCALE [rows] contiguous."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    largest = tl.zeros([BR], tl.int32)
    for start in range(0, columns, BK):
        x = _tile(X, r, start + tl.arange(0, BK), rows, columns, stride_r, stride_k)
        largest = tl.maximum(largest, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    exponent = largest >> 23
    shift = tl.maximum(exponent, 8) - 7
    scale = (shift << 23).to(tl.float32, bitcast=True)
    tl.store(SCALE + r, tl.where(exponent == 255, float("nan"), scale), mask=r < rows)
    inverse = ((254 - shift) << 23).to(tl.float32, bitcast=True)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        x = _tile(X, r, k, rows, columns, stride_r, stride_k) * inverse[:, None]
        inside = (r < rows)[:, None] & (k < width)[None, :]
        tl.store(OUT8 + r.to(tl.int64)[:, None] * width + k[None, :], x.to(OUT8.dtype.element_ty), mask=inside)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.round_rows`."""
    rows, columns = x.shape
    width = -(-columns // MULTIPLE) * MULTIPLE
    out = torch.empty(rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, _ROWS),)
    _round_rows[grid](x, out, scale, rows, columns, width, *x.stride(), BR=_ROWS, BK=_COLUMNS)
    return out, scale
