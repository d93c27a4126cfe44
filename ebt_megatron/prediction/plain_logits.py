"""Predicted distributions in plain torch, on one process: text's part of the double-backward judge.

Formulas of their own: nothing here is the code of `ebt_megatron.prediction.logits` or of a vocabulary kernel, but
for the noise, which must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.kernels import StepRule


@dataclass
class PlainText:
    """A micro-batch of predictions, held as logits y [S * B, V]; a `PlainPrediction`.

    Attributes:
        start: y_0.
        table: the prediction embedding [V, D].
        target: [S * B].
        valid: tokens of the vocabulary; the rest of V is padding.
        rule: how a step is made.
        stored: what y is rounded to between steps.
        add_noise: (y, step): adds that step's Langevin noise in place; None: there is none.
        output: of the context's hidden states, [V, D], where thinking starts at its prediction.
    """

    start: Tensor
    table: Tensor
    target: Tensor
    valid: int
    rule: StepRule
    stored: torch.dtype
    add_noise: Callable[[Tensor, int], None] | None
    output: Tensor | None = None

    def _store(self, y: Tensor) -> Tensor:
        """What storing y rounds away, taken off; gradients do not see it."""
        return y if self.stored == y.dtype else y + (y.to(self.stored) - y).detach()

    def begin(self, hidden: Tensor) -> Tensor:
        """See `PlainPrediction.begin`."""
        assert self.output is not None
        logits = F.linear(hidden.flatten(0, 1), self.output[: self.valid])
        return self._store(F.pad(logits, (0, len(self.output) - self.valid)))

    def perturb(self, y: Tensor, step: int) -> Tensor:
        """Y with the noise before step `step`."""
        noise = torch.zeros_like(y)
        if self.add_noise is not None:
            self.add_noise(noise, step)
        return self._store(y + noise)

    def step(
        self, y: Tensor, alpha: Tensor, energies: Callable[[Tensor], Tensor], create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """See `PlainPrediction.step`."""
        p = F.pad(y[:, : self.valid].softmax(-1), (0, y.shape[1] - self.valid))
        by = y if self.rule is StepRule.LOGIT else p
        x = p[:, : self.valid].to(self.table.dtype) @ self.table[: self.valid]
        energy = energies(x.view(*alpha.shape, -1))
        (gradient,) = torch.autograd.grad(energy.sum(), by, create_graph=create_graph, retain_graph=True)
        start = p if self.rule is StepRule.PROBABILITY else y
        return self._store(start - alpha.flatten()[:, None] * gradient), energy

    def loss(self, y: Tensor) -> Tensor:
        """Cross-entropy, [S * B]."""
        return F.cross_entropy(y[:, : self.valid], self.target, reduction="none")
