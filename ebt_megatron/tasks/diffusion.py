"""The schedule of noise that pictures are denoised from, and the steps of DDPM and DDIM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebt_megatron.config import ImagesConfig

_BOUND_WEIGHT = 0.001  # of the variational bound in DiT's loss (arXiv 2102.09672, eq. 16)


def _normal(x: Tensor) -> Tensor:
    """Nearly the distribution function of N(0, 1)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class NoiseSchedule:
    """Level t keeps a_t of a picture's variance, a_t the product of 1 - beta over t + 1 steps; beta is linear.

    Args:
        options: the recipe's.

    Attributes:
        kept: a, float64 [T].
        bounds: log of the least and of the most variance of DDPM's step down from a level, float64 [2, T].
    """

    def __init__(self, options: ImagesConfig):
        self.betas = torch.linspace(options.beta_first, options.beta_last, options.schedule_steps, dtype=torch.float64)
        self.kept = (1 - self.betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.kept[:-1]])
        least = self.betas * (1 - before) / (1 - self.kept)
        least[0] = least[1] if len(least) > 1 else self.betas[0]  # 0 itself has no logarithm (arXiv 2102.09672, code)
        self.bounds = torch.stack([least, self.betas]).log()

    @staticmethod
    def _of(values: Tensor, level: Tensor, like: Tensor) -> Tensor:
        """Values [T] at levels [B], to go with [B, S, C]."""
        return values.to(like.device)[level].to(like.dtype)[:, None, None]

    def _kept(self, level: Tensor, like: Tensor) -> Tensor:
        return self._of(self.kept, level, like)

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

    def log_variance(self, v: Tensor, level: Tensor) -> Tensor:
        """The learned log variance of the step down from levels [B]; v [B, S, C] of 0 and 1 gives its bounds."""
        least, most = (self._of(bound, level, v) for bound in self.bounds)
        return v * most + (1 - v) * least

    def _terms(self, noise: Tensor, predicted: Tensor, v: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log variance, how far the mean is off, and KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) in nats.

        Both means are affine in the noise with the same slope, beta / sqrt((1 - beta) (1 - a)).
        """
        log_variance = self.log_variance(v, level)
        slope = self._of(self.betas / ((1 - self.betas) * (1 - self.kept)).sqrt(), level, v)
        off = slope * (noise - predicted.detach())
        true = self._of(self.bounds[0], level, v)
        divergence = log_variance - true - 1 + (true - log_variance).exp() + off.square() / log_variance.exp()
        return log_variance, off, divergence / 2

    def variational_bound(self, noise: Tensor, predicted: Tensor, v: Tensor, level: Tensor, noised: Tensor) -> Tensor:
        """0.001 T times the term of the variational bound at a level, in nats per number (arXiv 2102.09672, eq. 16).

        KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)), at level 0 -log p(x_0 | x_1), its density. T terms are a sample of
        the whole bound.

        Args:
            noise, predicted: true and predicted [B, S, C]; the mean is a constant (arXiv 2102.09672, section 3.1).
            v: [B, S, C], of the variance.
            level: int64 [B].
            noised: [B, S, C], not read.
        """
        log_variance, off, divergence = self._terms(noise, predicted, v, level)
        likelihood = (math.log(2 * math.pi) + log_variance + off.square() / log_variance.exp()) / 2
        return _BOUND_WEIGHT * len(self.betas) * torch.where((level == 0)[:, None, None], likelihood, divergence)

    def bound_in_bits(self, noise: Tensor, predicted: Tensor, v: Tensor, level: Tensor, noised: Tensor) -> Tensor:
        """The term at a level in bits per number; at level 0 of values in steps of 1 / 127.5 from -1 to 1.

        That is -log2 of the probability between half a step below and above x_0 (arXiv 2006.11239, eq. 13), with the
        normal distribution function as 0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as the public code takes it.

        Args:
            noise, predicted, v, level: as of `variational_bound`.
            noised: [B, S, C], at the level.
        """
        log_variance, off, divergence = self._terms(noise, predicted, v, level)
        clean = self.clean(noised, noise, level)
        # At level 0 the mean of q is x_0 itself: x_0 minus the model's mean is minus `off`.
        above, below = (_normal((half - off) / (log_variance / 2).exp()) for half in (1 / 255, -1 / 255))
        above, below = torch.where(clean > 0.999, 1.0, above), torch.where(clean < -0.999, 0.0, below)
        likelihood = -(above - below).clamp_min(1e-12).log()
        return torch.where((level == 0)[:, None, None], likelihood, divergence) / math.log(2)

    def step(
        self,
        noised: Tensor,
        noise: Tensor,
        level: Tensor,
        to: Tensor | None,
        fresh: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Tensor:
        """Go from a level to a lower one (arXiv 2010.02502, eq. 12).

        Args:
            noised: pictures [B, S, C] at `level` [B].
            noise: what a model takes for their noise.
            level, to: int64 [B]; None: no noise at all.
            fresh: N(0, 1) to make the step as random as DDPM's (ancestral); None: DDIM's, which is not.
            v: [B, S, C], where between its bounds the variance of a random step is; None: the lower one.
        """
        clean = self.clean(noised, noise, level)
        if to is None:
            return clean
        kept, after = self._kept(level, noised), self._kept(to, noised)
        if fresh is None:
            return after.sqrt() * clean + (1 - after).sqrt() * noise
        most = 1 - kept / after  # beta of the whole step (arXiv 2102.09672, section 4)
        least = (1 - after) / (1 - kept) * most
        variance = least if v is None else (v * most.log() + (1 - v) * least.log()).exp()
        return after.sqrt() * clean + (1 - after - least).clamp_min(0).sqrt() * noise + variance.sqrt() * fresh
