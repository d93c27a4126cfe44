"""Drawing tokens: temperature, top-k and top-p; each draw a pure function of seed, text and position."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.randomness import uniform

_STREAM = 1 << 21  # apart from the streams of thinking


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a prediction.

    Attributes:
        temperature: log-probabilities are divided by it; 0: always the most likely token.
        top_k: draw among so many most likely tokens; None: all.
        top_p: draw among the fewest most likely tokens that have this probability together; 1: all.
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise RecipeError for the first option that does not do."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise RecipeError(f"temperature={self.temperature}: must be a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise RecipeError(f"top_k={self.top_k}: must be at least 1")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p={self.top_p}: must be greater than 0 and at most 1")

    def draw(self, log_p: Tensor, texts: Tensor, positions: Tensor) -> Tensor:
        """Tokens [R] of log-probabilities [R, V], for positions of texts, int64 [R]: the same in any batch."""
        if self.temperature == 0:
            return log_p.argmax(-1)
        # The highest becomes 0, so that no temperature makes it infinite; the least one is the least normal number.
        below = (log_p - log_p.amax(-1, keepdim=True)).double() / max(self.temperature, sys.float_info.min)
        values, tokens = below.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        p = values.exp()
        if self.top_k is not None:
            p[:, self.top_k :] = 0
            p = p / p.sum(-1, keepdim=True)
        p[p.cumsum(-1) - p >= self.top_p] = 0  # what comes before it is enough
        each = zip(texts[:, None], positions[:, None], strict=True)
        chance = torch.cat([uniform(self.seed, text, position, _STREAM)[0] for text, position in each]).to(p)
        passed = p.cumsum(-1) <= chance[:, None] * p.sum(-1, keepdim=True)
        index = passed.sum(-1).clamp_max((p > 0).sum(-1) - 1)
        return tokens.gather(1, index[:, None])[:, 0]
