"""Predicted latents in plain torch, on one process: their part of the double-backward judge.

Formulas of their own: nothing here is the code of `ebt_megatron.prediction.latents`, but for the noise, which must be
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PlainLatents:
    """A micro-batch of predicted latents y [S, B, C]; a `PlainPrediction`.

    Attributes:
        start: y_0.
        weight, bias: of x = W y + b, [D, C] and [D].
        positions: [S, D] added to x, or None.
        target: [S, B, C].
        noise: a step's Langevin noise on y, and, told "embedding", that on x; None: there is none.
        output: weight [C, D] and bias [C] of the output on the context stream, whose change of `start` is where
            thinking starts.
    """

    start: Tensor
    weight: Tensor
    bias: Tensor
    positions: Tensor | None
    target: Tensor
    noise: Callable[..., Tensor | float] | None
    output: tuple[Tensor, Tensor] | None = None
    taken: int = 0

    def begin(self, hidden: Tensor) -> Tensor:
        """See `PlainPrediction.begin`."""
        assert self.output is not None
        weight, bias = self.output
        return self.start + torch.einsum("sbd,cd->sbc", hidden, weight) + bias

    def perturb(self, y: Tensor, step: int) -> Tensor:
        """Y with the noise before step `step`."""
        self.taken = step
        return y.clone() if self.noise is None else y + self.noise(step)

    def step(
        self, y: Tensor, alpha: Tensor, energies: Callable[[Tensor], Tensor], create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """See `PlainPrediction.step`."""
        x = torch.einsum("sbc,dc->sbd", y.to(self.weight.dtype), self.weight) + self.bias
        if self.positions is not None:
            x = x + self.positions.to(x.dtype).unsqueeze(1)
        if self.noise is not None:
            x = x + self.noise(self.taken, "embedding")
        energy = energies(x)
        (gradient,) = torch.autograd.grad(energy.sum(), y, create_graph=create_graph, retain_graph=True)
        return y - alpha.unsqueeze(-1) * gradient, energy

    def loss(self, y: Tensor) -> Tensor:
        """Smooth L1, [S, B]: half the square up to 1, then linear; the mean over the channels."""
        distance = (y - self.target).abs()
        return torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean(-1)
