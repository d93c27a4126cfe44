"""Initial weights that are the same for every layout.

Every weight is drawn whole from a generator seeded by the run's seed and the weight's
global name, and each rank keeps its part. Linear layers follow Xavier's normal rule, norms
start at one, adaLN-zero at zero; `model.initialization` is about the embeddings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from megatron.core import parallel_state
from torch import nn

from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.parallel.parameters import cut_dimension, mark_tensor_parallel


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


@runtime_checkable
class Drawn(Protocol):
    """A module that says how weights start, its own or those of modules in it.

    Attributes:
        draws: by the weight's name in the module.
    """

    draws: Mapping[str, Draw]


def draws_of(model: nn.Module) -> dict[str, Draw]:
    """How the weights of a model start, by their names in it."""
    drawn = ((prefix, module.draws) for prefix, module in model.named_modules() if isinstance(module, Drawn))
    return {f"{prefix}.{name}".lstrip("."): draw for prefix, draws in drawn for name, draw in draws.items()}


def draw_of_embedding(rows: int, width: int, rule: str) -> Draw:
    """Return the draw of a table looked up by token or by step; `rule` is `model.initialization`."""
    return Draw(1.0) if rule == "paper" else Draw.xavier(rows, width)


def draw_of_predictions(vocab_size: int, width: int, step_size: float, first_step_std: float, rule: str) -> Draw:
    """Return the draw of the prediction embedding W [V, D].

    With "unit_logits" the first step's logits -alpha G W^T have a standard deviation of about `first_step_std` at any
    vocabulary and width: the energy's gradient G has entries of about 1 at the start (docs/design.md has the
    measurements), so rows of entries first_step_std / (alpha sqrt(D)) do. What all rows share is the hidden state of
    every prediction, whose probabilities sum to one; it keeps the first norm from amplifying next to nothing, and
    moves no logit relative to another.
    """
    if rule == "paper":
        return Draw.xavier(vocab_size, width)
    return Draw(first_step_std / (step_size * math.sqrt(width)), math.sqrt(2 / width))


def global_name(name: str, first_layer: int) -> str:
    """A parameter's name with the layer's index in the whole model rather than in its stage."""
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + first_layer}.", name, count=1)


def first_layer_of_stage(num_local_layers: int) -> int:
    """How many layers the earlier pipeline stages hold."""
    return parallel_state.get_pipeline_model_parallel_rank() * num_local_layers


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with layout-free names."""
    layers = getattr(model, "layers", [])
    first = first_layer_of_stage(len(layers))
    for name, parameter in model.named_parameters():
        yield global_name(name, first), parameter


def initialize_weights(model: nn.Module, seed: int) -> None:
    """Draw every weight that a module has a `Draw` of; the others keep their constant start.

    Raises:
        ValueError: for a draw of no weight.
    """
    mark_tensor_parallel(model)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    draws = draws_of(model)
    for (local, parameter), (name, _) in zip(model.named_parameters(), named_weights(model), strict=True):
        draw = draws.pop(local, None)
        if draw is None:
            continue
        shape, dim = list(parameter.shape), cut_dimension(parameter)
        if dim is not None:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(stable_seed(seed, "weight", name))
        whole = torch.randn(shape, generator=generator) * draw.std
        if draw.shared_std:
            whole += torch.randn(shape[-1], generator=generator) * draw.shared_std
        with torch.no_grad():
            parameter.copy_(whole if dim is None else whole.chunk(size, dim)[rank])
    if draws:
        raise ValueError(f"there are draws of what is no weight: {', '.join(draws)}")
