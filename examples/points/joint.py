"""An energy of one's own in which predictions see each other: every point sees the mean of all of them."""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from ebt_megatron.model.initialization import Draw
from ebt_megatron.model.sharding import StageModule
from ebt_megatron.parallel.parameters import replicated
from ebt_megatron.tasks.latent_model import LatentEmbeddings
from examples.points.points import Points


class Layer(torch.nn.Module):
    def __init__(self, config: Any, kernels: Any):
        super().__init__()
        width, how = config.hidden_size, {"config": config, "init_method": config.init_method, "bias": False}
        self.kernels, self.draws = kernels, {f"{n}.weight": Draw.xavier(width, 2 * width) for n in ("up", "down")}
        self.up = ColumnParallelLinear(width, 2 * width, gather_output=False, **how)
        self.down = RowParallelLinear(2 * width, width, input_is_parallel=True, skip_bias_add=True, **how)

    def forward(self, h: torch.Tensor, read: torch.Tensor, tangent: bool) -> torch.Tensor:
        hidden = self.up(h + h.mean(0, keepdim=True) + (torch.cat([read, 0 * read], 1) if tangent else read))[0]
        return h + self.down(self.kernels.gelu(hidden, torch.zeros_like(hidden[0, 0]), tangent=tangent))[0]


class MeanEnergy(StageModule):
    separable, context_sees_step, starts_thinking, context_rows, step_tokens = False, False, False, None, 0

    def __init__(self, config: Any, recipe: Any, ops: Any, size: int, first: bool, last: bool):
        super().__init__(config)
        self.modality, self.last = LatentEmbeddings(config, size, ops) if first else None, last
        if first:
            self.step_size = torch.nn.Parameter(torch.tensor(float(recipe.thinking.step_size)))
        count, width = config.num_layers // recipe.parallel.pipeline, config.hidden_size
        self.layers = torch.nn.ModuleList(Layer(config, ops) for _ in range(count))
        if last:
            self.head, self.draws["head"] = replicated(torch.empty(width), config), Draw.xavier(width, 1)

    def context(self, h: torch.Tensor, length: int, segments: Any, step: int = 0) -> Any:
        return h, [(h, h)] * len(self.layers)  # handed on; what a layer reads are two tensors, as keys and values

    def predict(self, h: Any, contexts: Any, length: int, segments: Any, step: int, tangent: bool, *more: Any) -> Any:
        for layer, (context, _) in zip(self.layers, contexts, strict=True):
            h = layer(h, context, tangent)
        return (h.chunk(2, 1)[1] if tangent else h) @ self.head if self.last else h


def plain_energy(model: Any, context: torch.Tensor, step: int, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        hidden = (x + x.mean(0, keepdim=True) + context) @ layer.up.weight.T
        x = x + torch.nn.functional.gelu(hidden, approximate="tanh") @ layer.down.weight.T
    return x @ model.head


class JointPoints(Points):
    def energy_model(self, config: Any, kernels: Any, first: bool, last: bool) -> Any:
        return MeanEnergy(config, self.recipe, kernels, self.size, first, last)
