"""Rounding to 8-bit floats, in plain torch.

Scales are powers of two, so that dividing by them rounds nothing, and every backend gives
the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FP8 = torch.float8_e4m3fn  # largest number 448; three bits of mantissa over 14 binades
MULTIPLE = 16  # GPUs multiply 8-bit matrices whose inner dimension is a multiple of this


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.round_rows`."""
    wide = pad(x.float(), (0, -x.shape[1] % MULTIPLE))
    # The exponent bits of each row's largest entry; NaN and infinity are the largest integers of all.
    exponent = (wide.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True) >> 23
    scale = ((exponent.clamp_min(8) - 7) << 23).view(torch.float32)  # brings that entry into [128, 256)
    rounded = (wide / scale).to(FP8).contiguous()
    return rounded, torch.where(exponent == 255, torch.nan, scale)
