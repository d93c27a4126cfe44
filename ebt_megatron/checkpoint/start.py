"""Weights to begin a run with: those of a run, of an exported model, or of a Llama of transformers.

A model takes weights of its own architecture as they are. An energy-based model takes a Transformer++'s into its
context stream, and into the output on it, where thinking starts. What the Transformer++ lacks is drawn as ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from ebt_megatron.checkpoint.checkpoints import chosen
from ebt_megatron.checkpoint.exported import WEIGHTS, in_our_names, is_exported
from ebt_megatron.checkpoint.history import located
from ebt_megatron.checkpoint.llama import from_llama, llama_config
from ebt_megatron.checkpoint.weights import checkpoint_weights, read_weights
from ebt_megatron.config import Recipe, RecipeError

# Where in an energy-based model a Transformer++'s weights belong; the first that it has.
_CONTEXT = {
    "embedding.": ("modality.context.", "modality."),
    "output.": ("modality.output.",),
    "final_norm.": ("context_norm.",),
}
# What two models need not have in common: it says nothing of the weights that they share.
_FREE = ("model.architecture", "model.energy_head", "model.conditioning", "thinking.")


def start_from(source: Path, model: Any, recipe: Recipe, identity: dict[str, Any], vocab_size: int) -> str:
    """Fill a model with trained weights; all ranks call it together, in any layout. Every rank reads all weights.

    Args:
        source: a run or a checkpoint in it, a folder of `ebt-convert export`, or of a Llama's safetensors.
        model: this pipeline stage, drawn.
        recipe: the run's.
        identity: of its data, `Session.identity`.
        vocab_size: tokens, without padding; 0 where there are none.

    Returns:
        What was taken and what was drawn, in words.

    Raises:
        RecipeError: on every rank, naming the first weight that does not fit; nothing is changed then.
    """
    state = {v.key: v for v in model.sharded_state_dict(prefix="").values() if isinstance(v, ShardedTensor)}
    shapes: dict[str, tuple[int, ...]] = {}
    for stage in _gathered({name: tuple(value.global_shape) for name, value in state.items()}):
        shapes |= stage
    weights = _weights(source, recipe, identity, shapes, vocab_size)
    places = {name: _place(name, shapes) for name in weights}
    for name, place in places.items():
        if place is None:
            hint = ": set thinking.initial=context" if name.startswith("output.") else ""
            raise RecipeError(f"training.start_from={source}: {name} has no place in the recipe's model{hint}")
        if tuple(weights[name].shape) != shapes[place]:
            raise RecipeError(
                f"training.start_from={source}: {name} is {list(weights[name].shape)}, the recipe's model has "
                f"{list(shapes[place])} ({place})"
            )
    with torch.no_grad():
        for name, place in places.items():
            if part := state.get(str(place)):
                own = (slice(at, at + n) for at, n in zip(part.global_offset, part.local_shape, strict=True))
                part.data.copy_(weights[name][tuple(own)])
    drawn = sorted(set(shapes) - set(places.values()))
    return f"{len(places)} weights of {source}; drawn: {', '.join(drawn) or 'none'}"


def _gathered(own: Any) -> list[Any]:
    """Every rank's object, in the order of ranks."""
    out = [own] * dist.get_world_size()
    dist.all_gather_object(out, own)
    return out


def _place(name: str, known: Iterable[str]) -> str | None:
    """Where a weight belongs in a model of these weights, or None."""
    if name in known and not name.startswith("final_norm."):
        return name
    for prefix, others in _CONTEXT.items():
        if name.startswith(prefix):
            found = [other + name.removeprefix(prefix) for other in others]
            return next((place for place in found if place in known), name if name in known else None)
    return None


def _weights(
    source: Path, recipe: Recipe, identity: dict[str, Any], shapes: dict[str, tuple[int, ...]], vocab_size: int
) -> dict[str, Tensor]:
    """Whole weights by name, of a model that fits the recipe's."""
    tables = [
        shape[0] for name, shape in shapes.items() if name.endswith(("context.table.weight", "embedding.table.weight"))
    ]
    if is_exported(source) and (source / "recipe.yaml").exists():
        weights, metadata = read_weights(source / WEIGHTS)
        _compare(source, json.loads(metadata.get("fingerprint", "{}")), identity)
        return in_our_names(source, weights, recipe, tables[0] if tables else 0)
    if (located(source)[0] / "recipe.yaml").exists():
        folder = chosen(source)
        _compare(source, dist_checkpointing.load_common_state_dict(str(folder))["fingerprint"], identity)
        return checkpoint_weights(folder)
    return _llama(source, recipe, tables, vocab_size)


def _compare(source: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for key, value in theirs.items():
        if not key.startswith(_FREE) and key in ours and ours[key] != value:
            raise RecipeError(
                f"training.start_from={source}: it was trained with {key}={value}, this run has {key}={ours[key]}"
            )


def _llama(source: Path, recipe: Recipe, tables: list[int], vocab_size: int) -> dict[str, Tensor]:
    """Of a Llama as transformers saves it, checked against the recipe key by key."""
    where = f"training.start_from={source}"
    files = sorted(source.glob("*.safetensors"))
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: neither a run, an exported model nor a model of transformers ({error})") from None
    if config.get("model_type") != "llama" or not files:
        kind = config.get("model_type")
        raise RecipeError(f"{where}: a model of type {kind} with {len(files)} safetensors files: a Llama's are read")
    if not tables:
        raise RecipeError(f"{where}: a Llama's weights are for data.modality=text")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config["rope_theta"] = config.get("rope_theta", rotary.get("rope_theta", 10_000.0))
    config["rope_type"] = rotary.get("rope_type", "default")
    wanted = llama_config(recipe, vocab_size, 0) | {"rope_type": "default"}
    for key in ("tie_word_embeddings", "max_position_embeddings", "architectures", "model_type", "dtype"):
        del wanted[key]
    for key, value in wanted.items():
        if not key.endswith("_token_id") and config.get(key, value) != value:
            raise RecipeError(f"{where}: its config.json says {key}={config[key]}, this run's model has {value}")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= {name: weight.float() for name, weight in read_weights(file)[0].items()}
    if config.get("tie_word_embeddings"):
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    try:
        return from_llama(weights, recipe, tables[0])
    except KeyError as error:
        raise RecipeError(f"{where}: {error.args[0]} is missing") from None
