"""What models are made of: a stage of layers, what an energy learns of its steps, and what Megatron's schedules ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig, build_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebt_megatron.config import Recipe, ThinkingConfig
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.layers import Attend, RMSNorm, Rotary, layer_spec
from ebt_megatron.model.sharding import StageModule


def layers_of_stage(config: TransformerConfig, make: Callable[[], nn.Module]) -> nn.ModuleList:
    """A stage's share of the model's layers."""
    assert config.num_layers
    return nn.ModuleList(make() for _ in range(config.num_layers // config.pipeline_model_parallel_size))


class LayerStage(StageModule):
    """A pipeline stage of layers of any kind, which can be computed again for the backward pass.

    Args:
        config: Megatron's configuration.
        recipe: the run.
        pre_process: this is the first stage.
        post_process: this is the last stage.
    """

    def __init__(self, config: TransformerConfig, recipe: Recipe, pre_process: bool, post_process: bool):
        super().__init__(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.recompute_layers = recipe.model.recompute_layers

    def maybe_recomputed(self, function: Callable[..., Any], *args: Any, kept: bool = False, **kwargs: Any) -> Any:
        """What `function` returns; under `model.recompute_layers` it keeps its inputs alone for the backward pass.

        Args:
            function, args, kwargs: a layer's, and what it is given.
            kept: something (a tape) keeps its activations anyway.
        """
        if self.recompute_layers and not kept and torch.is_grad_enabled():  # nothing in a layer is random
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return function(*args, **kwargs)


class Backbone(LayerStage):
    """The Transformer layers of one pipeline stage, rotary positions, and on the last stage the final norm.

    EBT and Transformer++ share it: they differ in the objective.

    Args:
        config, recipe, pre_process, post_process: as `LayerStage`.
        kernels: how the hot operations run.
        block: neighbouring positions that see each other, e.g. the tokens of a frame.
    """

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        kernels: Kernels,
        pre_process: bool,
        post_process: bool,
        block: int = 1,
    ):
        super().__init__(config, recipe, pre_process, post_process)
        self.recipe, self.kernels, self.block = recipe, kernels, block

    def add_layers(self) -> None:
        """Build layers and norm; after what comes before them, as checkpoints hold parameters in this order."""
        config, recipe, kernels = self.config, self.recipe, self.kernels
        assert config.kv_channels
        spec = layer_spec(recipe.model, kernels, recipe.training.precision == "fp8", self.block)
        self.layers = layers_of_stage(config, lambda: build_module(spec, config))
        if self.post_process:
            self.final_norm = RMSNorm(config, kernels)
        self.rotary = Rotary(config.kv_channels, recipe.model.rotary_base)

    def stream(self, h: Tensor, rotations: Tensor, attend: Sequence[Attend], condition: Tensor | None = None) -> Tensor:
        """Any positions [S, B, D] through this stage's layers, with attention given for each: over a cache, say.

        Args:
            h, rotations, condition: as in `TransformerLayer.stream`.
            attend: of each layer, likewise.
        """
        for layer, attention in zip(self.layers, attend, strict=True):
            h = layer.stream(h, rotations, attention, condition=condition)
        return h


class Landscapes:
    """What an energy learns for its thinking steps, beside a stage of layers."""

    num_landscapes: int
    step_size: nn.Parameter
    lr_multipliers: dict[str, float]

    def landscape(self, step: int) -> int:
        """Which energy landscape step `step` descends: its own, the last one beyond those trained."""
        return min(step, self.num_landscapes - 1)

    def add_step_size(self, thinking: ThinkingConfig) -> None:
        """The learned scalar alpha."""
        self.step_size = nn.Parameter(torch.tensor(thinking.step_size, dtype=torch.float32))
        self.step_size.requires_grad_(thinking.learn_step_size)
        assert thinking.step_size_lr_multiplier is not None
        self.lr_multipliers["step_size"] = thinking.step_size_lr_multiplier


class Scheduled:
    """A stage that megatron-core's own schedules run."""

    model_type = ModelType.encoder_or_decoder  # they ask
    input_tensor: Tensor | None = None

    def set_input_tensor(self, tensors: Any) -> None:
        """The previous stage's output is handed over this way."""
        self.input_tensor = tensors[0] if isinstance(tensors, list) else tensors
