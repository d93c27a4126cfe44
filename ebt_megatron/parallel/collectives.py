"""Reductions over the tensor-parallel group, outside autograd but where said.

The thinking algorithm moves gradients by hand (first order only), so it needs plain
collectives rather than differentiable ones. All are identities when the group has one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


class TensorGroup:
    """The tensor-parallel group as the prediction state sees it.

    Args:
        sequence_parallel: hidden states [S, ...] are split over the group along S.
    """

    def __init__(self, sequence_parallel: bool = False):
        active = parallel_state.model_parallel_is_initialized()
        self.group = parallel_state.get_tensor_model_parallel_group() if active else None
        self.size = parallel_state.get_tensor_model_parallel_world_size() if active else 1
        self.rank = parallel_state.get_tensor_model_parallel_rank() if active else 0
        self.sequence_parallel = sequence_parallel and self.size > 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the group; may overwrite x."""
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the group."""
        if self.size == 1:
            return x
        top = x.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return top

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Combine each rank's log-sum-exp of its part into that of the whole."""
        if self.size == 1:
            return x
        top = self.max(x)
        return self.sum((x - top).exp()).log() + top

    def to_hidden(self, partial: Tensor) -> Tensor:
        """Sum partial hidden states [S, ...] and leave what this rank holds of them: [S(/TP), ...]."""
        if not self.sequence_parallel:
            return self.sum(partial)
        out = partial.new_empty(partial.shape[0] // self.size, *partial.shape[1:])
        dist.reduce_scatter_tensor(out, partial.contiguous(), group=self.group)
        return out

    def from_hidden(self, local: Tensor) -> Tensor:
        """The whole of hidden states or per-position numbers [S(/TP), ...] -> [S, ...]."""
        if not self.sequence_parallel:
            return local
        out = local.new_empty(local.shape[0] * self.size, *local.shape[1:])
        dist.all_gather_into_tensor(out, local.contiguous(), group=self.group)
        return out

    def columns(self, part: Tensor) -> Tensor:
        """The whole of what is split over the group along the last dimension."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def all_positions(self, own: Tensor) -> Tensor:
        """Losses of this rank's positions [S(/TP), ...] as those of all; inside autograd, every rank goes on alike."""
        if not self.sequence_parallel:
            return own
        return gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=False)

    def own_positions(self, whole: Tensor) -> Tensor:
        """This rank's positions of [S, ...]."""
        if not self.sequence_parallel:
            return whole
        return whole.chunk(self.size)[self.rank]
