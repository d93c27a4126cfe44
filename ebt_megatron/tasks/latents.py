"""What the tasks over latents share: what they refuse, and what their encoder and decoder are."""

from __future__ import annotations

from typing import Any

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.decoder import Decoder
from ebt_megatron.data.description import Description


def check_latents(recipe: Recipe) -> None:
    """Refuse what is made for logits.

    Raises:
        RecipeError: naming the key and the fix.
    """
    thinking, modality = recipe.thinking, recipe.data.modality
    for key, given, fix in (
        ("thinking.regenerate", thinking.regenerate > 0, "0"),
        ("thinking.logits_dtype=bfloat16", thinking.logits_dtype != "float32", "float32"),
        ("data.document_mask", recipe.data.document_mask, "false"),
        (f"data.learn_from={recipe.data.learn_from}", recipe.data.learn_from != "all", "all"),
    ):
        if given:
            raise RecipeError(f"{key} is about text, data.modality is {modality}: set {key.split('=')[0]}={fix}")


def encoder_of(source: Description) -> dict[str, Any]:
    """What the manifest of `source` says of the encoder of its frames.

    Raises:
        DataError: where it does not say what made the latents, of which size, and what they were normalised by, or
            samples have another number of patches.
    """
    encoder, shape = source.manifest.encoder, source.manifest.shape
    missing = [key for key in ("sha256", "height", "width", "patch", "mean", "std") if key not in encoder]
    if missing:
        raise DataError(
            f"{source.folder}/manifest.json does not say {', '.join(missing)} of its encoder: prepare the data again"
        )
    wrong = [key for key in ("height", "width", "patch") if not (isinstance(encoder[key], int) and encoder[key] > 0)]
    if wrong:
        said = ", ".join(f"{key} {encoder[key]!r}" for key in wrong)
        raise DataError(
            f"{source.folder}/manifest.json says {said} of its encoder, which is no size: prepare the data again"
        )
    rows, columns = (encoder[side] // encoder["patch"] for side in ("height", "width"))
    if rows * columns != shape[-2]:
        raise DataError(
            f"{source.folder} has samples of {shape[-2]} patches, and its encoder makes {rows} x {columns} "
            "of a frame: prepare the data again"
        )
    return encoder


def decoder_of(source: Description) -> Decoder | None:
    """What shows the latents of `source`, where it is linear; else None."""
    return Decoder.read(source.sidecar())
