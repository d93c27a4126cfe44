"""Rotary position embedding on interleaved pairs (arXiv 2104.09864), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [S, B, heads, H] by table [S, H / 2, 2] (cosine and sine); linear, so it serves tangents too."""
    wide = x.to(torch.promote_types(x.dtype, table.dtype))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)[:, None, None]).flatten(-2).type_as(x)


def split_heads(mixed: Tensor, table: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.split_heads`."""
    grouped = mixed.unflatten(-1, (groups, -1, size))
    q, k, v = grouped.split([grouped.shape[3] - 2, 1, 1], 3)  # one split: its backward is one copy
    return rotate(q.flatten(2, 3), table), rotate(k.flatten(2, 3), table), v.flatten(2, 3)
