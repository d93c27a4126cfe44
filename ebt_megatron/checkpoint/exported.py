"""A model's folder as `ebt-convert export` writes it: all that it takes to use the model, and nothing of its training.

model.safetensors   whole weights; of a Transformer++ of text as a Llama's (`checkpoint/llama.py`)
config.json         what transformers reads: model_type "ebt" or "llama"; and under "ebt_megatron" what we do
recipe.yaml         the recipe, without paths
manifest.json       what its data were, and beside it the tokenizer or encoder
README.md           the model card, and losses.png, which it shows
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ebt_megatron.checkpoint.llama import from_llama
from ebt_megatron.checkpoint.weights import check_fingerprint, read_weights, set_weights
from ebt_megatron.config import Recipe, RecipeError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SECTION = "ebt_megatron"  # of config.json


def is_exported(folder: Path) -> bool:
    """Whether a folder is one of `ebt-convert export`."""
    return (folder / WEIGHTS).exists()


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says; raises RecipeError where it is missing, damaged, or of another program."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        if SECTION not in config:
            raise RecipeError(f"{path} is of a model of another program: give a folder of ebt-convert export")
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path} cannot be read ({error}): export the model again") from None
    return config


def in_our_names(folder: Path, weights: dict[str, Tensor], recipe: Recipe, rows: int) -> dict[str, Tensor]:
    """A folder's weights as our models name them: a Transformer++'s of text are a Llama's there.

    Args:
        folder: of `ebt-convert export`.
        weights: whole, as the file has them.
        recipe: of a model of their sizes.
        rows: of the vocabulary's tables, padding included.

    Raises:
        RecipeError: where one is missing.
    """
    if read_config(folder)["model_type"] != "llama":
        return weights
    try:
        return from_llama(weights, recipe, rows)
    except KeyError as error:
        raise RecipeError(f"{folder / WEIGHTS}: {error.args[0]} is missing: export the model again") from None


def load_weights(folder: Path, model: nn.Module, recipe: Recipe, identity: dict[str, Any]) -> tuple[int, int]:
    """Fill a whole model, on one process, with a folder's weights.

    Args:
        folder: of `ebt-convert export`.
        model: as `recipe` says.
        recipe: the folder's.
        identity: what the weights must have in common with the recipe and the data, `Session.identity`.

    Returns:
        The optimizer steps and the tokens that the weights have had.

    Raises:
        RecipeError: where the folder is damaged, or the layout is not one process.
    """
    if recipe.parallel.tensor * recipe.parallel.pipeline > 1:
        raise RecipeError(f"{folder} is an exported model, which runs on one process: use the run for a layout")
    config = read_config(folder)
    weights, metadata = read_weights(folder / WEIGHTS)
    check_fingerprint(folder / WEIGHTS, metadata, identity)
    table = dict(model.named_parameters()).get("embedding.table.weight")
    rows = 0 if table is None else len(table)
    set_weights(folder / WEIGHTS, model, in_our_names(folder, weights, recipe, rows))
    return config[SECTION]["step"], config[SECTION]["tokens"]
