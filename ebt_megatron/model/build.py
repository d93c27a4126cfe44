"""From a recipe to a model: the one place that chooses classes by architecture and modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule

from ebt_megatron import kernels
from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.fp8 import require_products
from ebt_megatron.model.initialization import initialize_weights
from ebt_megatron.model.text import TextModality, TextOutput, TokenEmbedding
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.parallel.setup import transformer_config


@dataclass(frozen=True)
class SampleShape:
    """What the data says about samples that the model must know.

    Attributes:
        vocab_size: text: number of tokens.
    """

    vocab_size: int = 0


def padded(vocab_size: int, multiple: int) -> int:
    """The vocabulary's size in the tables: the same for every tensor-parallel size that divides `multiple`."""
    return -(-vocab_size // multiple) * multiple


def build_model(recipe: Recipe, shape: SampleShape) -> MegatronModule:
    """This pipeline stage's part of the recipe's model, with layout-free initial weights.

    Args:
        recipe: the run; Megatron's process groups must exist.
        shape: facts of the data.

    Raises:
        RecipeError: for a modality that has no model, or fp8 where torch or the device has no products in it.
    """
    if recipe.data.modality != "text":
        raise RecipeError(f"data.modality={recipe.data.modality}: there is no model for it yet, only for text")
    config = transformer_config(recipe)
    config.has_cond_embedder = recipe.model.conditioning.startswith("adaln")
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    ops = kernels.select(recipe.model.kernels)
    if recipe.training.precision == "fp8":
        require_products(ops, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    vocab = shape.vocab_size, padded(shape.vocab_size, recipe.model.vocab_multiple)
    model: MegatronModule
    if recipe.model.architecture == "ebt":
        modality = TextModality(config, recipe, *vocab, ops) if first else None
        model = EnergyTransformer(config, recipe, ops, modality, first, last)
    else:
        embedding = TokenEmbedding(config, *vocab, recipe.model.initialization) if first else None
        output = TextOutput(config, *vocab) if last else None
        model = TransformerLM(config, recipe, ops, embedding, output, first, last)
    initialize_weights(model, recipe.training.seed)
    return model
