"""The layers of a pipeline stage, which the EBT and its feed-forward baseline share: they differ in the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig, build_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.layers import Attend, RMSNorm, Rotary, layer_spec
from ebt_megatron.model.sharding import StageModule


class Backbone(StageModule):
    """The Transformer layers of one pipeline stage, rotary positions, and on the last stage the final norm.

    Args:
        config: Megatron's configuration.
        recipe: the run.
        kernels: how the hot operations run.
        pre_process: this is the first stage.
        post_process: this is the last stage.
    """

    def __init__(
        self, config: TransformerConfig, recipe: Recipe, kernels: Kernels, pre_process: bool, post_process: bool
    ):
        super().__init__(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.recompute_layers = recipe.model.recompute_layers
        self.recipe, self.kernels = recipe, kernels

    def add_layers(self) -> None:
        """Build layers and norm; after what comes before them, as checkpoints hold parameters in this order."""
        config, recipe, kernels = self.config, self.recipe, self.kernels
        assert config.num_layers and config.kv_channels
        local_layers = config.num_layers // config.pipeline_model_parallel_size
        spec = layer_spec(recipe.model, kernels, fp8=recipe.training.precision == "fp8")
        self.layers = nn.ModuleList(build_module(spec, config) for _ in range(local_layers))
        if self.post_process:
            self.final_norm = RMSNorm(config, kernels)
        self.rotary = Rotary(config.kv_channels, recipe.model.rotary_base)

    def maybe_recomputed(self, function: Callable[..., Any], *args: Any, kept: bool = False, **kwargs: Any) -> Any:
        """What `function` returns; under `model.recompute_layers` it keeps its inputs alone for the backward pass.

        Args:
            function, args, kwargs: a layer's, and what it is given.
            kept: something (a tape) keeps its activations anyway.
        """
        if self.recompute_layers and not kept and torch.is_grad_enabled():  # nothing in a layer is random
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return function(*args, **kwargs)

    def stream(self, h: Tensor, rotations: Tensor, attend: Sequence[Attend], condition: Tensor | None = None) -> Tensor:
        """Any positions [S, B, D] through this stage's layers, with attention given for each: over a cache, say.

        Args:
            h, rotations, condition: as in `TransformerLayer.stream`.
            attend: of each layer, likewise.
        """
        for layer, attention in zip(self.layers, attend, strict=True):
            h = layer.stream(h, rotations, attention, condition=condition)
        return h
