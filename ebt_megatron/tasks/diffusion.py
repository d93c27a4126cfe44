"""The schedule of noise that pictures are denoised from, and the steps of DDPM and DDIM."""

from __future__ import annotations

import torch
from torch import Tensor

from ebt_megatron.config import ImagesConfig


class NoiseSchedule:
    """Level t keeps a_t of a picture's variance, a_t the product of 1 - beta over t + 1 steps; beta is linear.

    Args:
        options: the recipe's.

    Attributes:
        kept: a, float64 [T].
    """

    def __init__(self, options: ImagesConfig):
        betas = torch.linspace(options.beta_first, options.beta_last, options.schedule_steps, dtype=torch.float64)
        self.kept = (1 - betas).cumprod(0)

    def _kept(self, level: Tensor, like: Tensor) -> Tensor:
        """A of levels [B], to go with [B, S, C]."""
        return self.kept.to(like.device)[level].to(like.dtype)[:, None, None]

    def noised(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Pictures [B, S, C] with noise at levels int64 [B]."""
        kept = self._kept(level, clean)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def clean(self, noised: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Pictures without that noise: the inverse of `noised`."""
        kept = self._kept(level, noised)
        return (noised - (1 - kept).sqrt() * noise) / kept.sqrt()

    @staticmethod
    def levels(first: int, passes: int) -> list[int]:
        """Evenly spaced levels from `first` down, one for each pass; the last pass ends without noise."""
        return [round(first * (1 - i / passes)) for i in range(passes)]

    def step(
        self, noised: Tensor, noise: Tensor, level: Tensor, to: Tensor | None, fresh: Tensor | None = None
    ) -> Tensor:
        """From a level to a lower one (arXiv 2010.02502, eq. 12).

        Args:
            noised: pictures [B, S, C] at `level` [B].
            noise: what a model takes for their noise.
            level, to: int64 [B]; None: no noise at all.
            fresh: N(0, 1) to make the step as random as DDPM's (ancestral); None: DDIM's, which is not.
        """
        clean = self.clean(noised, noise, level)
        if to is None:
            return clean
        kept, after = self._kept(level, noised), self._kept(to, noised)
        deviation = torch.zeros_like(kept)
        if fresh is not None:
            deviation = ((1 - after) / (1 - kept) * (1 - kept / after)).clamp_min(0).sqrt()
        out = after.sqrt() * clean + (1 - after - deviation**2).clamp_min(0).sqrt() * noise
        return out if fresh is None else out + deviation * fresh
