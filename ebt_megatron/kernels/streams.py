"""What tiled torch kernels share: streams stacked along dim 1, and some positions at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 1 << 18  # of a tensor worked on at once, so that what is made of them stays in cache


def positions(x: Tensor) -> Iterator[slice]:
    """Neighbouring positions of x [S, ...], some at a time; all where there is no cache to stay in (a GPU)."""
    size = max(1, _ELEMENTS * len(x) // max(x.numel(), 1)) if x.device.type == "cpu" else max(1, len(x))
    return (slice(i, min(i + size, len(x))) for i in range(0, len(x), size))


def streams(x: Tensor, tangent: bool) -> tuple[Tensor, ...]:
    """Value, and tangent if there is one, of x [S, B*, ...]; views."""
    return x.chunk(2, 1) if tangent else (x,)


def wide(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in float32 at least, for accumulation."""
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> over the last dimension, which stays as one of size 1."""
    return (x * y).sum(-1, keepdim=True)
