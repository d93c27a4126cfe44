"""From a recipe and its task to a model."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from ebt_megatron import kernels
from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.model.fp8 import require_products
from ebt_megatron.model.initialization import initialize_weights
from ebt_megatron.model.sharding import StageModule
from ebt_megatron.parallel.setup import transformer_config
from ebt_megatron.tasks.interface import Task


def build_model(recipe: Recipe, task: Task) -> StageModule:
    """This pipeline stage's part of the recipe's model, with layout-free initial weights.

    Args:
        recipe: the run; Megatron's process groups must exist.
        task: its modality.

    Raises:
        RecipeError: for fp8 where torch or the device has no products in it, or thinking that starts at a context's
            prediction where there is none.
    """
    config = transformer_config(recipe)
    config.has_cond_embedder = recipe.model.conditioning.startswith("adaln")
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    ops = kernels.select(recipe.model.kernels)
    if recipe.training.precision == "fp8":
        require_products(ops, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    build = task.energy_model if recipe.model.architecture == "ebt" else task.feed_forward_model
    model = build(config, ops, first, last)
    if recipe.model.architecture == "ebt" and recipe.thinking.starts_at_context and not model.starts_thinking:
        raise RecipeError(
            f"thinking.initial=context needs an energy for each position, which data.modality={recipe.data.modality} "
            "has not: set noise"
        )
    initialize_weights(model, recipe.training.seed)
    return model
