"""The layers' matrix products in 8-bit floats (`training.precision=fp8`); everything else stays bf16.

Matrices are rounded to e4m3 (arXiv 2209.05433), gradients too: each row of the first matrix and
each column of the second has a scale of its own, which leaves no need for e5m2's range, and lets
a tangent be orders of magnitude smaller than the value it is stacked behind. Scales are taken
from the matrix at hand, so there is no history of them to keep, save or resume. The products
are torch's, on GPUs since Hopper and, for tests, on CPUs (torch 2.13 has them, 2.11 does not).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType, scaled_mm

from ebt_megatron.config import RecipeError
from ebt_megatron.kernels import Kernels


def product(a: Tensor, b: Tensor, kernels: Kernels) -> Tensor:
    """a [M, K] times b [K, N] with both rounded to 8 bits, summed in fp32, given in a's dtype.

    Args:
        a, b: bf16 (on CPUs also fp32); on GPUs N must be a multiple of 16.
        kernels: for the rounding.
    """
    (rows, of_rows), (columns, of_columns) = kernels.round_rows(a), kernels.round_rows(b.mT)
    by_row = ScalingType.RowWise
    return scaled_mm(rows, columns.mT, of_rows, by_row, of_columns.mT, by_row, output_dtype=a.dtype)


def require_products(kernels: Kernels, device: torch.device) -> None:
    """Try one product on `device`.

    Raises:
        RecipeError: if this torch or this device has none.
    """
    square = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        product(square, square, kernels)
    except (RuntimeError, ValueError) as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        raise RecipeError(
            f"training.precision=fp8: torch {torch.__version__} has no 8-bit products on {name} "
            f"({str(error).splitlines()[0][:80]}...): set bf16"
        ) from None


class _Linear(torch.autograd.Function):
    """x [S, B, K], weight [N, K] -> x weight^T and its gradients, all by `product`.

    With a group, x is split over it along S and gathered for each product, as Megatron does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], group: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product, ctx.group = product, group
        x = gather_from_sequence_parallel_region(x, group=group) if group else x
        return product(x.flatten(0, 1), weight.mT).unflatten(0, x.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows, x_grad, weight_grad = grad.flatten(0, 1), None, None
        if ctx.needs_input_grad[0]:
            x_grad = ctx.product(rows, weight).unflatten(0, grad.shape[:2])
            x_grad = reduce_scatter_to_sequence_parallel_region(x_grad, group=ctx.group) if ctx.group else x_grad
        if ctx.needs_input_grad[1]:
            x = gather_from_sequence_parallel_region(x, group=ctx.group) if ctx.group else x
            weight_grad = ctx.product(rows.mT, x.flatten(0, 1))
        return x_grad, weight_grad, None, None


class _Fp8:
    """Mixed into a parallel linear layer of Megatron's, without bias: its products are in fp8."""

    def __init__(self, *args: Any, kernels: Kernels, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kernels = kernels
        self._forward_impl = self._linear  # what Megatron's layers call, between their communication

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See the function."""
        return product(a, b, self.kernels)

    def _linear(
        self, *, input: Tensor, weight: Tensor, allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **_: Any
    ) -> Tensor:
        if allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return _Linear.apply(input, weight, self.product, tp_group if sequence_parallel else None)


class Fp8ColumnParallelLinear(_Fp8, ColumnParallelLinear):
    """Megatron's column-parallel layer in fp8."""


class Fp8RowParallelLinear(_Fp8, RowParallelLinear):
    """Megatron's row-parallel layer in fp8."""
