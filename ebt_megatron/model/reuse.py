"""Reuse: a learn pass that takes what it can from the propose pass before it.

Both passes go through the same layers with the same values. Propose has already computed
every linear layer's output for the value, and, going back, the energy's gradient at every
linear layer's input. In the learn pass the tangent's adjoint is that same gradient times the
weight of the energies: each position's own where a position's energy depends on its own
prediction alone, else the same for a whole sample (`thinking.dual_stream.split_factor`). So
learn computes, per linear layer, the tangent's output (forward), the value's input gradient
and the weight's gradient (backward): 4 C instead of 6 C, for the memory of the tape.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from ebt_megatron.parallel.collectives import TensorGroup


class _Note(torch.autograd.Function):
    """The identity; its backward pass writes the gradient down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tape: Tape, name: str) -> Tensor:
        ctx.tape, ctx.name = tape, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.tape.gradients[ctx.name] = grad
        return grad, None, None


class _Replay(torch.autograd.Function):
    """A linear layer on value and tangent, given the value's output and the tangent's input gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, layer: Any, out: Tensor, tangent_grad: Tensor, group: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, tangent_grad)
        ctx.column, ctx.group = isinstance(layer, ColumnParallelLinear), group
        ctx.product = getattr(layer, "product", torch.matmul)  # an fp8 layer has its own
        with torch.no_grad():
            tangent_out, _ = layer(x.chunk(2, 1)[1].contiguous())
        return torch.cat([out, tangent_out], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, tangent_grad = ctx.saved_tensors
        if ctx.column:  # forward gathered x (sequence parallel); the input gradient is summed over ranks
            whole_x, whole_grad = ctx.group.from_hidden(x), grad
        else:  # forward scattered the output
            whole_x, whole_grad = x, ctx.group.from_hidden(grad)
        value_grad = ctx.product(whole_grad.chunk(2, 1)[0].flatten(0, 1), weight)
        value_grad = value_grad.unflatten(0, (len(whole_grad), -1))
        if ctx.column:
            value_grad = ctx.group.to_hidden(value_grad)
        weight_grad = ctx.product(whole_grad.flatten(0, 1).mT, whole_x.flatten(0, 1))
        return torch.cat([value_grad, tangent_grad], 1), weight_grad, None, None, None, None


class Tape:
    """What one propose pass leaves for the learn pass of the same step.

    Use it first for `predict` without tangent, then set `weight`, then for `predict` with tangent.

    Args:
        group: the tensor-parallel group.
    """

    def __init__(self, group: TensorGroup):
        self.group = group
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.weight: Tensor | None = None  # [S, B] of each position's energy in the learn pass

    def apply(self, name: str, layer: Any, x: Tensor, tangent: bool) -> Tensor:
        """Run a Megatron linear layer on x, writing down or taking up."""
        if not tangent:
            out, _ = layer(_Note.apply(x, self, name))
            self.outputs[name] = out.detach()
            return out
        grad = self.gradients.pop(name)
        weighted = grad * self._weight_of(grad).to(grad.dtype)[..., None]
        return _Replay.apply(x, layer.weight, layer, self.outputs.pop(name), weighted, self.group)

    def _weight_of(self, grad: Tensor) -> Tensor:
        """The weight of each row of a gradient, which may hold this rank's positions, or a step's token before them."""
        assert self.weight is not None
        if len(grad) == len(self.weight) + 1:
            return torch.cat([torch.zeros_like(self.weight[:1]), self.weight])
        return self.weight if len(grad) == len(self.weight) else self.group.own_positions(self.weight)
