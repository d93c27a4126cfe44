"""Random numbers that do not depend on how a run is laid out.

Everything random about a sample is a pure function of the run's seed and the sample's own
global index, so any tensor-, pipeline- or data-parallel layout, any micro-batch size and
any resumed run draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch

STEP_SIZE_STREAM = 1 << 20  # apart from the noise streams, which count thinking steps
LEVEL_STREAM, CLASS_STREAM = STEP_SIZE_STREAM + 1, STEP_SIZE_STREAM + 2
SYMMETRY_STREAM, CLUE_STREAM, START_STREAM = STEP_SIZE_STREAM + 3, STEP_SIZE_STREAM + 4, STEP_SIZE_STREAM + 5
PICTURE_NOISE_STREAM = 1 << 21  # and, above it, of the passes that sample a picture


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable, the same on every machine and Python run."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""

    def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:  # logical, not arithmetic
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ shifted(x, 31)


def uniform(seed: int, sample_ids: torch.Tensor, positions: torch.Tensor, stream: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), one for each position of each sample.

    Args:
        seed: the run's seed.
        sample_ids: int64 [B], global sample indices.
        positions: int64 [S].
        stream: which of several independent draws.

    Returns:
        float64 [S, B].
    """
    golden = -7046029254386353131  # 0x9E3779B97F4A7C15
    per_sample = mix64(sample_ids * golden + stable_seed(seed, stream))
    bits = mix64(per_sample[None, :] + (positions[:, None] + 1) * golden)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw_integer(seed: int, iteration: int, low: int, high: int) -> int:
    """An integer in [low, high] for a whole training step, the same on every rank."""
    return low + stable_seed(seed, "integer", iteration) % (high - low + 1)


def draw_subset(seed: int, iteration: int, total: int, size: int) -> frozenset[int]:
    """`size` of the numbers 0 .. total - 1 for a whole training step, each subset with the same probability."""
    ranked = sorted(range(total), key=lambda i: stable_seed(seed, "subset", iteration, i))
    return frozenset(ranked[:size])
