"""Initial weights that are the same for every layout.

Every weight is drawn whole from a generator seeded by the run's seed and the weight's
global name, and each rank keeps its part. Weights follow Xavier's normal rule, norms start
at one, adaLN-zero at zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from ebt_megatron.parallel.randomness import stable_seed


def global_name(name: str, first_layer: int) -> str:
    """A parameter's name with the layer's index in the whole model rather than in its stage."""
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + first_layer}.", name, count=1)


def first_layer_of_stage(num_local_layers: int) -> int:
    """How many layers the earlier pipeline stages hold."""
    return parallel_state.get_pipeline_model_parallel_rank() * num_local_layers


def mark_tensor_parallel(model: nn.Module) -> None:
    """Set Megatron's tensor-parallel attributes, which it sets only when it initialises weights itself."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
        if getattr(module, "bias", None) is not None and dim == 0 and isinstance(module, ColumnParallelLinear):
            set_tensor_model_parallel_attributes(module.bias, is_parallel=True, dim=0, stride=1)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with layout-free names."""
    layers = getattr(model, "layers", [])
    first = first_layer_of_stage(len(layers))
    for name, parameter in model.named_parameters():
        yield global_name(name, first), parameter


def initialize_weights(model: nn.Module, seed: int) -> None:
    """Draw every weight that declares `xavier_fans`; the others keep their constant start.

    A weight with `xavier_fans = (fan_in, fan_out)` is drawn from N(0, 2 / (fan_in + fan_out))
    (Glorot and Bengio 2010, eq. 16, as a normal); None means zeros.
    """
    mark_tensor_parallel(model)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named_weights(model):
        if not hasattr(parameter, "xavier_fans"):
            continue
        fans = parameter.xavier_fans
        if fans is None:
            nn.init.zeros_(parameter)
            continue
        shape: list[int] = list(parameter.shape)
        parallel = getattr(parameter, "tensor_model_parallel", False)
        dim: int = getattr(parameter, "partition_dim", 0)
        if parallel:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(stable_seed(seed, "weight", name))
        whole = torch.randn(shape, generator=generator) * math.sqrt(2 / sum(fans))
        part = whole.chunk(size, dim)[rank] if parallel else whole
        with torch.no_grad():
            parameter.copy_(part)
