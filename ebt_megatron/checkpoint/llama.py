"""Transformer++ under the names and in the order of a Llama, which stock `transformers` loads; and back.

Both are RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU, without biases. They differ in the
order of rows. Transformer++ keeps queries, key and value of a group together, rotates neighbouring rows (2i, 2i + 1)
and lets gate and up rows alternate in blocks. Llama has one matrix each, and rotates rows i and i + H / 2. Rows of the
vocabulary that are padding stay behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.config import Recipe

_LAYER = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "proj.weight": "self_attn.o_proj.weight",
    "fc2.weight": "mlp.down_proj.weight",
}
_TABLES = {"embedding.table.weight": "model.embed_tokens.weight", "output.projection.weight": "lm_head.weight"}
_NORM = {"final_norm.weight": "model.norm.weight"}


def is_llama_shaped(recipe: Recipe) -> bool:
    """Whether a recipe's model is one that Llama's code computes: a Transformer++ of text."""
    plain = not recipe.model.conditioning.startswith("adaln")  # its modulations would have no place
    return recipe.model.architecture != "ebt" and recipe.data.modality == "text" and plain


def _sizes(recipe: Recipe) -> tuple[int, int, int, int]:
    """Key groups, query heads of a group, the size of a head, and blocks of gate and up rows."""
    model = recipe.model
    assert model.num_attention_heads and model.num_query_groups and model.hidden_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    return groups, heads // groups, model.hidden_size // heads, heads


def llama_config(recipe: Recipe, vocab_size: int, end: int) -> dict[str, Any]:
    """What `config.json` says of such a model.

    Args:
        recipe: resolved.
        vocab_size: tokens, without padding.
        end: the token that separates texts.
    """
    model = recipe.model
    groups, _, head, heads = _sizes(recipe)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "max_position_embeddings": recipe.data.sequence_length,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "dtype": "float32" if recipe.training.precision == "fp32" else "bfloat16",
    }


def _halves(rows: Tensor) -> Tensor:
    """Heads [N, H, D] whose neighbouring rows are rotated -> halves that are."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)


def _pairs(rows: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2)


def to_llama(weights: dict[str, Tensor], recipe: Recipe, vocab_size: int) -> dict[str, Tensor]:
    """Whole weights of a Transformer++ of text as a Llama's."""
    groups, queries, head, blocks = _sizes(recipe)
    out = {theirs: weights[ours][:vocab_size] for ours, theirs in _TABLES.items()}
    out |= {theirs: weights[ours] for ours, theirs in _NORM.items()}
    for layer in range(recipe.model.num_layers or 0):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        out |= {theirs + name: weights[ours + mine] for mine, name in _LAYER.items()}
        grouped = weights[f"{ours}qkv.weight"].unflatten(0, (groups, queries + 2, head))
        q, k, v = grouped.split([queries, 1, 1], 1)
        out[f"{theirs}self_attn.q_proj.weight"] = _halves(q.flatten(0, 1)).flatten(0, 1)
        out[f"{theirs}self_attn.k_proj.weight"] = _halves(k.flatten(0, 1)).flatten(0, 1)
        out[f"{theirs}self_attn.v_proj.weight"] = v.flatten(0, 2)
        gate, up = weights[f"{ours}fc1.weight"].unflatten(0, (blocks, 2, -1)).unbind(1)
        out[f"{theirs}mlp.gate_proj.weight"], out[f"{theirs}mlp.up_proj.weight"] = gate.flatten(0, 1), up.flatten(0, 1)
    return out


def from_llama(weights: dict[str, Tensor], recipe: Recipe, rows: int) -> dict[str, Tensor]:
    """The inverse of `to_llama`; padding is zeros.

    Args:
        weights: a Llama's.
        recipe: of the Transformer++.
        rows: of the vocabulary's tables, padding included.
    """
    groups, queries, head, blocks = _sizes(recipe)
    out = {ours: weights[theirs] for ours, theirs in _NORM.items()}
    for ours, theirs in _TABLES.items():
        table = weights[theirs]
        out[ours] = torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])
    for layer in range(recipe.model.num_layers or 0):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        out |= {ours + mine: weights[theirs + name] for mine, name in _LAYER.items()}

        def part(name: str, shape: Sequence[int], theirs: str = theirs) -> Tensor:
            return weights[f"{theirs}self_attn.{name}_proj.weight"].unflatten(0, tuple(shape))

        q = _pairs(part("q", (groups * queries, head))).unflatten(0, (groups, queries))
        k = _pairs(part("k", (groups, head)))[:, None]
        out[f"{ours}qkv.weight"] = torch.cat([q, k, part("v", (groups, 1, head))], 1).flatten(0, 2)
        both = [weights[f"{theirs}mlp.{name}_proj.weight"].unflatten(0, (blocks, -1)) for name in ("gate", "up")]
        out[f"{ours}fc1.weight"] = torch.stack(both, 1).flatten(0, 2)
    return out
