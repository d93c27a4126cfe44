"""Initial weights that are the same for every layout.

Every weight is drawn whole from a generator seeded by the run's seed and the weight's
global name, and each rank keeps its part. Linear layers follow Xavier's normal rule, norms
start at one, adaLN-zero at zero; `model.initialization` is about the embeddings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from ebt_megatron.core.randomness import stable_seed


@dataclass(frozen=True)
class Draw:
    """The distribution of a weight [rows, columns].

    Attributes:
        std: of every entry's own part, N(0, std^2).
        shared_std: of a row drawn once and added to every row.
    """

    std: float
    shared_std: float = 0.0

    @classmethod
    def xavier(cls, fan_in: int, fan_out: int) -> Draw:
        """N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16, as a normal)."""
        return cls(math.sqrt(2 / (fan_in + fan_out)))


def draw_of_embedding(rows: int, width: int, rule: str) -> Draw:
    """Of a table looked up by token or by step; `rule` is `model.initialization`."""
    return Draw(1.0) if rule == "paper" else Draw.xavier(rows, width)


def draw_of_predictions(vocab_size: int, width: int, step_size: float, rule: str) -> Draw:
    """Of the prediction embedding W [V, D].

    With "unit_logits" the first step's logits -alpha G W^T have a standard deviation of about 1 at any
    vocabulary and width: the energy's gradient G has entries of about 1 at the start (docs/design.md has the
    measurements), so rows of entries 1 / (alpha sqrt(D)) do. What all rows share is the hidden state of every
    prediction, whose probabilities sum to one; it keeps the first norm from amplifying next to nothing, and
    moves no logit relative to another.
    """
    if rule == "paper":
        return Draw.xavier(vocab_size, width)
    return Draw(1 / (step_size * math.sqrt(width)), math.sqrt(2 / width))


def global_name(name: str, first_layer: int) -> str:
    """A parameter's name with the layer's index in the whole model rather than in its stage."""
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + first_layer}.", name, count=1)


def first_layer_of_stage(num_local_layers: int) -> int:
    """How many layers the earlier pipeline stages hold."""
    return parallel_state.get_pipeline_model_parallel_rank() * num_local_layers


def mark_tensor_parallel(model: nn.Module) -> None:
    """Set Megatron's tensor-parallel attributes of weights, as it does only where it initialises them itself."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with layout-free names."""
    layers = getattr(model, "layers", [])
    first = first_layer_of_stage(len(layers))
    for name, parameter in model.named_parameters():
        yield global_name(name, first), parameter


def initialize_weights(model: nn.Module, seed: int) -> None:
    """Draw every weight that has a `draw`, a `Draw`; the others keep their constant start."""
    mark_tensor_parallel(model)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named_weights(model):
        draw = getattr(parameter, "draw", None)
        if draw is None:
            continue
        shape: list[int] = list(parameter.shape)
        parallel = getattr(parameter, "tensor_model_parallel", False)
        dim: int = getattr(parameter, "partition_dim", 0)
        if parallel:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(stable_seed(seed, "weight", name))
        whole = torch.randn(shape, generator=generator) * draw.std
        if draw.shared_std:
            whole += torch.randn(shape[-1], generator=generator) * draw.shared_std
        part = whole.chunk(size, dim)[rank] if parallel else whole
        with torch.no_grad():
            parameter.copy_(part)
