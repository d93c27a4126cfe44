"""What the tasks over latents share: what they refuse, and their decoder."""

from __future__ import annotations

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.data.decoder import Decoder
from ebt_megatron.data.description import Description


def check_latents(recipe: Recipe) -> None:
    """Refuse what is made for logits.

    Raises:
        RecipeError: naming the key and the fix.
    """
    thinking, modality = recipe.thinking, recipe.data.modality
    for key, given, fix in (
        ("thinking.replay.enabled", thinking.replay.enabled, "false"),
        ("thinking.regenerate", thinking.regenerate > 0, "0"),
        ("thinking.logits_dtype=bfloat16", thinking.logits_dtype != "float32", "float32"),
        ("data.document_mask", recipe.data.document_mask, "false"),
    ):
        if given:
            raise RecipeError(f"{key} is about text, data.modality is {modality}: set {key.split('=')[0]}={fix}")


def decoder_of(source: Description) -> Decoder | None:
    """What shows the latents of `source`, where it is linear; else None."""
    return Decoder.read(source.sidecar())
