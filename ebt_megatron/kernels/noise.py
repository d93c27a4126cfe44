"""Gaussian noise that is a pure function of (seed, sample, position, stream, column).

A counter-based generator: nothing is stored, any part can be made again, and every
tensor-parallel slice of the vocabulary sees the noise of the whole. A 32-bit hash of row
key and column (the finaliser of MurmurHash3, with a second row key mixed in between) gives
16 bits that index the 65,536 equiprobable quantiles of the normal distribution, so the
noise is normal up to that quantisation (|z| <= 4.3).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ebt_megatron.core.randomness import mix64

_TILE = 1 << 18  # elements worked on at once: they stay in cache
GOLDEN = -1640531535  # 0x9E3779B1, odd: consecutive columns spread over all 32 bits


@functools.cache
def quantiles(device: torch.device) -> Tensor:
    """Midpoint quantiles of N(0, 1), scaled to unit variance; float32 [65536]."""
    z = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    return (z / z.square().mean().sqrt()).float().to(device)


def _wrap(value: int) -> int:
    """An integer modulo 2^64 as a signed one, as int64 tensors hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def keys_of(sample_ids: Tensor, positions: Tensor, stream: int) -> Tensor:
    """The key of each sample's row at each position; int64, of shapes that broadcast."""
    golden = -7046029254386353131  # 0x9E3779B97F4A7C15
    per_sample = mix64(sample_ids.long() * golden + _wrap((stream + 1) * 0x632BE59BD9B4E019))
    return mix64(per_sample + (positions.long() + 1) * golden)


def row_keys(sample_ids: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Keys of the rows of a micro-batch, token order (position, sample).

    Args:
        sample_ids: int64 [B] global sample indices.
        positions: int64 [S].
        stream: which of several independent noises.

    Returns:
        int64 [S * B].
    """
    return keys_of(sample_ids[None, :], positions[:, None], stream).flatten()


def seeded_halves(keys: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The two 32-bit numbers that a row's hash starts from; int64 keys [R] -> int32 [R] each."""
    mixed = mix64(keys + _wrap(seed * 0x9E3779B97F4A7C15))
    return (mixed & 0xFFFFFFFF).int(), (mixed >> 32).int()


def _hash(first: Tensor, second: Tensor, columns: Tensor, h: Tensor, spare: Tensor) -> Tensor:
    """h = 16 bits for each row, by the halves [R, 1] of its key, and column [V] (times GOLDEN); int32 [R, V]."""

    def fold(bits: int) -> None:  # h ^= h >> bits, of unsigned numbers
        torch.bitwise_right_shift(h, bits, out=spare).bitwise_and_((1 << (32 - bits)) - 1)
        h.bitwise_xor_(spare)

    torch.add(columns, first, out=h)
    fold(16)
    h.mul_(-2048144789).bitwise_xor_(second)
    fold(13)
    h.mul_(-1028477387)
    fold(16)
    return h.bitwise_and_(0xFFFF)


def add_noise_(y: Tensor, keys: Tensor, column_offset: int, std: float, seed: int) -> None:
    """y [T, V] += std * noise, in place; keys [T] from `row_keys`."""
    first, second = (half[:, None] for half in seeded_halves(keys, seed))
    width = y.shape[1]
    rows = min(max(1, _TILE // max(width, 1)), len(y))
    columns = torch.arange(column_offset, column_offset + width, dtype=torch.int32, device=y.device) * GOLDEN
    h, spare = torch.empty(2, rows, width, dtype=torch.int32, device=y.device)
    noise, table = torch.empty(rows, width, device=y.device), quantiles(y.device)
    for begin in range(0, len(y), rows):
        part = slice(begin, min(begin + rows, len(y)))
        size = part.stop - begin
        bits = _hash(first[part], second[part], columns, h[:size], spare[:size])
        torch.index_select(table, 0, bits.flatten(), out=noise[:size].view(-1))
        y[part].add_(noise[:size], alpha=std)
