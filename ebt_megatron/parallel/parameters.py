"""What megatron-core notes on parameters, read and written here alone.

tensor_model_parallel, partition_dim    the parameter is this rank's part of one that is cut along a dimension
sequence_parallel                       every tensor-parallel rank holds it whole and sees its own positions alone,
                                        so gradients are to be summed over the ranks
pipeline_parallel                       every pipeline stage holds it, so gradients are to be summed over the stages
shared                                  another stage holds the original, which the gradient's norm counts
main_grad                               where its data-parallel wrapper sums gradients, in fp32
main_param                              the optimizer's fp32 copy
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


def replicated(tensor: Tensor, config: TransformerConfig) -> nn.Parameter:
    """A parameter that every tensor-parallel rank holds whole."""
    parameter = nn.Parameter(tensor)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def on_every_stage(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter that every pipeline stage holds."""
    parameter.pipeline_parallel = True  # type: ignore[attr-defined]
    return parameter


def mark_copies(parameters: Iterable[nn.Parameter]) -> None:
    """Note that another pipeline stage holds the originals of parameters."""
    for parameter in parameters:
        parameter.shared = True  # type: ignore[attr-defined]


def mark_tensor_parallel(model: nn.Module) -> None:
    """Note how weights are cut, which Megatron does only where it initialises them itself."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def cut_dimension(parameter: nn.Parameter) -> int | None:
    """The dimension that a parameter is cut along over tensor-parallel ranks; None: it is whole."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore


def gradient_buffer(parameter: nn.Parameter) -> Tensor:
    """The tensor gradients of a parameter are summed into: Megatron's if there is one, else .grad."""
    main = getattr(parameter, "main_grad", None)
    if main is not None:
        return main
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def main_parameter(parameter: Tensor) -> Tensor:
    """What the optimizer updates: its fp32 copy of a bf16 parameter, else the parameter."""
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main
