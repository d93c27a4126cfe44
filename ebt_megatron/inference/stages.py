"""Passes through pipeline stages, in turn: hidden states go down, gradients come back, and what all need is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.parallel.setup import ParallelState


class Stages:
    """This rank's place among the pipeline's stages.

    All stages go through the same program, and enter each pass together. With one stage nothing is sent.

    Args:
        state: this rank's place.
        config: Megatron's, of the model.
    """

    def __init__(self, state: ParallelState, config: TransformerConfig):
        self.state, self.first, self.last = state, state.is_first_stage, state.is_last_stage
        self.width, self.dtype = config.hidden_size, config.params_dtype
        self.ranks = dist.get_process_group_ranks(state.pipeline_group)

    def down(self, begin: Callable[[], Tensor], rows: int, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """One pass forward.

        Args:
            begin: makes the first stage's input, [R, 1, D].
            rows: R.
            run: this stage.

        Returns:
            This stage's input, which takes a gradient where gradients are on, and its output.
        """
        if self.first:
            h = begin()
        else:
            h = torch.empty(rows, 1, self.width, dtype=self.dtype, device=self.state.device)
            dist.recv(h, self.ranks[self.state.pipeline_rank - 1], group=self.state.pipeline_group)
        h = h.detach().requires_grad_(torch.is_grad_enabled())
        out = run(h)
        if not self.last:
            dist.send(
                out.detach().contiguous(), self.ranks[self.state.pipeline_rank + 1], group=self.state.pipeline_group
            )
        return h, out

    def up(self, h: Tensor, out: Tensor) -> Tensor:
        """The gradient of the sum of the last stage's outputs at this stage's input, of the pass that `down` was."""
        grad = torch.ones_like(out) if self.last else torch.empty_like(out)
        if not self.last:
            dist.recv(grad, self.ranks[self.state.pipeline_rank + 1], group=self.state.pipeline_group)
        (by_h,) = torch.autograd.grad(out, h, grad)
        if not self.first:
            dist.send(by_h.contiguous(), self.ranks[self.state.pipeline_rank - 1], group=self.state.pipeline_group)
        return by_h

    def share(self, numbers: Tensor, from_last: bool) -> Tensor:
        """Numbers [R, ...] of the last stage, or of the first, on every stage; elsewhere only the shape counts."""
        if len(self.ranks) == 1:
            return numbers
        numbers = numbers.to(torch.float32).contiguous()
        dist.broadcast(numbers, self.ranks[-1 if from_last else 0], group=self.state.pipeline_group)
        return numbers


class Elsewhere:
    """A `State` on stages that do not hold the predictions: it counts their rows."""

    def __init__(self, rows: int, device: torch.device):
        self.rows, self.device = rows, device

    def perturb(self, step: int, std: float) -> None:
        """See `State`."""

    def embed(self) -> Tensor:
        """See `State`; never asked for."""
        raise NotImplementedError

    def step(self, energy_grad: Tensor, alpha: float) -> None:
        """See `State`."""

    def distance(self, other: Any) -> Tensor:
        """See `State`."""
        return torch.zeros(self.rows, device=self.device)

    def confidence(self) -> Tensor:
        """See `State`."""
        return torch.zeros(self.rows, device=self.device)

    def take(self, rows: Tensor) -> Elsewhere:
        """See `State`."""
        return Elsewhere(len(rows), self.device)

    def where(self, keep: Tensor, other: Any) -> Elsewhere:
        """See `State`."""
        return self

    def join(self, others: Sequence[Any]) -> Elsewhere:
        """See `State`."""
        return Elsewhere(self.rows + sum(other.rows for other in others), self.device)

    def mixed(self, weights: Tensor) -> Elsewhere:
        """See `State`."""
        return Elsewhere(weights.shape[1], self.device)
