"""Predictions of real numbers, a frame of video or a patch of a picture, while they think.

The state y [S, B, C] is the prediction itself. With x = W y + b (+ fixed positions) what the model reads, and G the
energy's gradient at x,

    y' = y - alpha g,    g = dE/dy = G W,    loss = smooth L1 of y' - target (beta 1), the mean over the C numbers

Latents are whole on every tensor-parallel rank: C is no larger than the model is wide, or little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.kernels import Kernels
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import gradient_buffer
from ebt_megatron.prediction.plain_latents import PlainLatents


@dataclass
class LatentMap:
    """The linear map from latents to hidden states, outside autograd.

    Attributes:
        weight, bias: W [D, C] and b [D].
        group: the tensor-parallel group.
        positions: [S, D] added to x, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    group: TensorGroup
    positions: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Latents [S, B, C] -> hidden [S(/TP), B, D]."""
        x = self.direction(values) + self.bias.detach()
        return x if self.positions is None else x + self.group.own_positions(self.positions)[:, None].to(x.dtype)

    def direction(self, values: Tensor) -> Tensor:
        """Map a direction in latents likewise, without bias and position."""
        return F.linear(self.group.own_positions(values).to(self.weight.dtype), self.weight.detach())

    def unit_direction(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A direction [S, B, C] as `Prediction.tangent` returns it, and of unit length."""
        norm = values.norm(dim=-1).clamp_min(torch.finfo(values.dtype).tiny)
        along = values / norm[..., None]
        return self.direction(along), norm, along

    def back(self, grad: Tensor) -> Tensor:
        """A gradient by hidden states [S(/TP), B, D] as one by latents [S, B, C], whole on every rank."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        return self.group.from_hidden(grad.to(wide) @ self.weight.detach().to(wide))

    def add_gradients(self, x_grad: Tensor, values: Tensor, xt_grad: Tensor, directions: Tensor) -> None:
        """Add to the gradients of W and b, given those at what `self(values)` and `direction(directions)` gave.

        Of this rank's positions alone: Megatron sums the map's gradients over a sequence-parallel group.
        """
        both = torch.cat([x_grad, xt_grad]).flatten(0, 1)
        read = torch.cat([self.group.own_positions(values), self.group.own_positions(directions)]).flatten(0, 1)
        weight, bias = gradient_buffer(self.weight), gradient_buffer(self.bias)
        weight.add_(both.to(weight.dtype).mT @ read.to(weight.dtype))
        bias.add_(x_grad.to(bias.dtype).sum((0, 1)))


@dataclass
class LatentReadout:
    """The linear output on the context stream, outside autograd.

    Attributes:
        weight, bias: [C, D] and [C].
        group: the tensor-parallel group.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    group: TensorGroup

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden [S(/TP), B, D] -> latents [S, B, C], whole on every rank."""
        return self.group.from_hidden(F.linear(hidden, self.weight.detach(), self.bias.detach()))

    def backward(self, hidden: Tensor, grad: Tensor) -> Tensor:
        """Add a gradient by the latents [S, B, C] to weight and bias; returns that by the hidden states.

        Of this rank's positions alone: Megatron sums the output's gradients over a sequence-parallel group.
        """
        own = self.group.own_positions(grad)
        weight, bias = gradient_buffer(self.weight), gradient_buffer(self.bias)
        weight.add_(own.to(weight.dtype).flatten(0, 1).mT @ hidden.to(weight.dtype).flatten(0, 1))
        bias.add_(own.to(bias.dtype).sum((0, 1)))
        return own.to(self.weight.dtype) @ self.weight.detach()


def _loss_gradient(y: Tensor, target: Tensor) -> Tensor:
    """dloss/dy, [S, B, C]."""
    return (y - target).clamp(-1, 1) / y.shape[-1]


@dataclass
class _Step:
    """A step: from y, along g, to y'."""

    y: Tensor
    g: Tensor
    following: Tensor


class LatentPrediction:
    """A micro-batch of predicted latents, a `Prediction` (see the module's text for the notation).

    Args:
        kernels: for the noise.
        embed: the map W y + b.
        targets: [B, S, C].
        sample_ids: int64 [B], which fix the noise.
        thinking: how it starts and steps; a step is one on y whatever the step rule, which is about logits.
        seed: the run's seed.
        start: [S, B, C] where it starts; where it is NaN, or None, by `thinking.initial`.
        output: on the context stream, whose change of `start`, or of 0, is where thinking starts.
    """

    def __init__(
        self,
        kernels: Kernels,
        embed: LatentMap,
        targets: Tensor,
        sample_ids: Tensor,
        thinking: ThinkingConfig,
        seed: int,
        start: Tensor | None,
        output: LatentReadout | None = None,
    ):
        self.output = output
        self.kernels, self.map, self.group = kernels, embed, embed.group
        self.thinking, self.seed, self.sample_ids = thinking, seed, sample_ids
        dtype = torch.promote_types(embed.weight.dtype, torch.float32)
        self.target = targets.transpose(0, 1).to(dtype)
        self.y = self._noise(0, thinking.initial_std) if thinking.starts_at_noise else torch.zeros_like(self.target)
        if start is not None:
            self.y = torch.where(start.isnan(), self.y, start.to(dtype))
        self.history: list[_Step] = []
        self.now = 0  # the step that is taken

    def _noise(self, stream: int, std: float, channels: int | None = None) -> Tensor:
        """N(0, std^2) [S, B, channels], those of latents unless given."""
        length, batch, own = self.target.shape
        keys = self.kernels.row_keys(self.sample_ids, torch.arange(length, device=self.target.device), stream)
        noise = torch.zeros(length * batch, channels or own, dtype=self.target.dtype, device=self.target.device)
        self.kernels.add_noise_(noise, keys, 0, std, self.seed)
        return noise.view(length, batch, -1)

    def _langevin(self, step: int, on: str = "prediction") -> Tensor | float:
        """The Langevin noise of step `step` on the prediction or on its embedding [S, B, D], whichever has it."""
        std = self.thinking.langevin_noise
        if std <= 0 or on != self.thinking.langevin_on:
            return 0.0
        return self._noise(1 + step, std, len(self.map.weight) if on == "embedding" else None)

    # --- the start, where the context says it -------------------------------------------------

    def begin(self, hidden: Tensor) -> Tensor:
        """See `Prediction`."""
        assert self.output is not None
        self._hidden = hidden
        self.y = self._initial = self.y + self.output(hidden).to(self.y.dtype)
        return F.smooth_l1_loss(self.y, self.target, reduction="none").mean(-1)

    def begin_backward(self, weight: Tensor) -> Tensor:
        """See `Prediction`."""
        return self.begin_backward_along(torch.zeros_like(self._initial), weight)

    def begin_backward_along(self, adjoint: Tensor, weight: Tensor) -> Tensor:
        """Go back as `begin_backward` does, with the adjoint of the start added."""
        assert self.output is not None
        gradient = _loss_gradient(self._initial, self.target)
        return self.output.backward(self._hidden, adjoint + weight[..., None].to(gradient.dtype) * gradient)

    # --- a step ---------------------------------------------------------------------------

    def perturb(self, step: int) -> None:
        """See `Prediction`."""
        self.now, self.y = step, self.y + self._langevin(step)

    def embed(self) -> Tensor:
        """See `Prediction`."""
        x, noise = self.map(self.y), self._langevin(self.now, "embedding")
        return x + self.group.own_positions(noise).to(x.dtype) if isinstance(noise, Tensor) else x

    def refine(self, energy_grad: Tensor, alpha: Tensor) -> Tensor:
        """See `Prediction`."""
        g = self.map.back(energy_grad).to(self.y.dtype)
        self.step = _Step(self.y, g, self.y - alpha[..., None].to(g.dtype) * g)
        return F.smooth_l1_loss(self.step.following, self.target, reduction="none").mean(-1)

    def slope(self) -> Tensor:
        """See `Prediction`."""
        return (_loss_gradient(self.step.following, self.target) * self.step.g).sum(-1)

    def tangent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        gradient = weight[..., None].to(self.y.dtype) * _loss_gradient(self.step.following, self.target)
        xt, norm, self._along = self.map.unit_direction(gradient)
        return xt, norm

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """See `Prediction`."""
        self.map.add_gradients(x_grad, self.y, xt_grad, self._along)

    def advance(self, keep: bool) -> None:
        """See `Prediction`."""
        if keep:
            self.history.append(self.step)
        self.y = self.step.following

    @property
    def final(self) -> Tensor:
        """See `Prediction`."""
        return self.history[-1].following if self.history else self.y

    def begin_adjoint(self) -> LatentAdjoint:
        """See `Prediction`."""
        return LatentAdjoint(self)

    # --- for the judge ----------------------------------------------------------------------

    def plain(self) -> PlainLatents:
        """See `Prediction`; call it before the first step."""
        noise = self._langevin if self.thinking.langevin_noise > 0 else None
        output = None if self.output is None else (self.output.weight, self.output.bias)
        return PlainLatents(self.y, self.map.weight, self.map.bias, self.map.positions, self.target, noise, output)


class LatentAdjoint:
    """The adjoint dL/dy [S, B, C] on the way back through the steps, a `PredictionAdjoint`.

    Args:
        prediction: after its last step.
    """

    def __init__(self, prediction: LatentPrediction):
        self.prediction, self.value = prediction, torch.zeros_like(prediction.y)

    def add_loss_gradient(self, step: int, weight: Tensor) -> None:
        """See `PredictionAdjoint`."""
        gradient = _loss_gradient(self.prediction.history[step].following, self.prediction.target)
        self.value = self.value + weight[..., None].to(gradient.dtype) * gradient

    def rewind(self, step: int) -> None:
        """See `PredictionAdjoint`."""
        self.prediction.now, self.prediction.step = step, self.prediction.history[step]
        self.prediction.y = self.prediction.step.y

    def slope(self) -> Tensor:
        """See `PredictionAdjoint`."""
        return (self.value * self.prediction.step.g).sum(-1)

    def tangent(self) -> tuple[Tensor, Tensor]:
        """See `PredictionAdjoint`."""
        xt, norm, self._along = self.prediction.map.unit_direction(self.value)
        return xt, norm

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """See `PredictionAdjoint`."""
        self.prediction.map.add_gradients(x_grad, self.prediction.y, xt_grad, self._along)
        self.value = self.value + self.prediction.map.back(x_grad).to(self.value.dtype)

    def past(self) -> None:
        """A step starts at y itself."""

    def begin_backward(self, weight: Tensor) -> Tensor:
        """See `PredictionAdjoint`."""
        return self.prediction.begin_backward_along(self.value, weight)
