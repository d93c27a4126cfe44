"""A checkpoint of the paper's public code, as weights of this project: `ebt-import CKPT`.

The public code (github.com/alexiglad/EBT) saves with PyTorch Lightning. Read are its EBTs of text and video, its
Transformer++ of both, its EBTs of pictures (denoising, and from captions) and the DiTs beside them; others are refused.
Written are FILE.safetensors and FILE.yaml, a recipe, from which `ebt-convert import` makes a run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError, to_yaml
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole
from ebt_megatron.tools.public_code import pictures, sequences
from ebt_megatron.tools.public_code.settings import Described, Hyper
from ebt_megatron.tools.public_code.source import Source, read_checkpoint

app = typer.Typer()


class Family(NamedTuple):
    """How checkpoints of a modality are read.

    Attributes:
        describe: (hyper-parameters, weights) -> the recipe, and what else they say.
        weights_of: (weights, recipe) -> the weights under our names.
    """

    describe: Callable[[Hyper, Source], Described]
    weights_of: Callable[[Source, Recipe], dict[str, Tensor]]


FAMILIES = {
    "NLP": Family(sequences.describe_text, sequences.weights_of_text),
    "VID": Family(sequences.describe_video, sequences.weights_of_video),
    "IMG": Family(pictures.describe, pictures.weights_of),
}
_OURS = {"text": "NLP", "video": "VID", "images": "IMG"}
# Names of what is no weight of the model: metrics' states, and the frozen encoders, which prepare the data.
_METRICS = {"torchmetrics_dict.": "states of metrics"}
_FROZEN = {
    "model.image_encoder.": "the frozen encoder of pictures",
    "model.text_encoder.": "the frozen one of captions",
}


def convert_weights(weights: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The public code's weights under this project's names and in its order of rows.

    Args:
        weights: from `read_checkpoint`.
        recipe: that the checkpoint describes.

    Raises:
        RecipeError: naming the first weight that is missing, unknown or of another shape.
    """
    source = Source(weights)
    out = FAMILIES[_OURS[recipe.data.modality]].weights_of(source, recipe)
    source.finish()
    return out


def convert(checkpoint: Path, output: Path, trust: bool = False) -> tuple[Described, dict[str, list[str]]]:
    """Write OUTPUT (safetensors) and the recipe beside it, OUTPUT with .yaml.

    Returns:
        What the checkpoint describes, and the names of what was left out, by what it is.

    Raises:
        RecipeError: see `read_checkpoint` and `convert_weights`; naming a hyper-parameter that is missing, no number
            or not supported.
    """
    from ebt_megatron.checkpoint.checkpoints import fingerprint
    from ebt_megatron.checkpoint.weights import write_weights

    stored, hyper = read_checkpoint(checkpoint, trust)
    try:
        modality = hyper.get("modality", "NLP")
        if modality not in FAMILIES:
            raise RecipeError(f"hyper-parameter modality={modality} is not supported, only {' and '.join(FAMILIES)}")
        left_out: dict[str, list[str]] = {}
        for name in list(stored):
            for prefix, what in (_METRICS if modality == "NLP" else _METRICS | _FROZEN).items():
                if name.startswith(prefix):
                    left_out.setdefault(what, []).append(name)
                    del stored[name]
        described = FAMILIES[modality].describe(hyper, Source(stored))
        weights = convert_weights(stored, described.recipe)
    except RecipeError as error:
        raise RecipeError(f"{checkpoint}: {error}") from None
    identity = fingerprint(described.recipe, described.identity)
    identity.pop("thinking.max_steps", None)  # free, where there is no step embedding to say it
    write_weights(output, weights, to_yaml(described.recipe), identity)
    write_whole(output.with_suffix(".yaml"), to_yaml(described.recipe))
    return described, left_out


@app.command()
def main(
    checkpoint: Path = typer.Argument(..., help="A .ckpt file of the public code."),
    output: Path = typer.Option(..., help="FILE.safetensors to write, with the recipe FILE.yaml beside it."),
    trust: bool = typer.Option(False, "--trust", help="Unpickle any object: only for files of makers you trust."),
) -> None:
    """Turn a checkpoint of the paper's public code into weights and a recipe of this project."""

    def work() -> None:
        if output.suffix != ".safetensors":
            raise RecipeError(f"--output {output}: give a name that ends in .safetensors")
        quiet_libraries()
        described, left_out = convert(checkpoint, output, trust)
        console, recipe = Console(soft_wrap=True, highlight=False), described.recipe
        m = recipe.model
        thinking = f", conditioning {m.conditioning}, thinking steps {recipe.thinking.max_steps}"
        console.print(
            f"{output}: {recipe.data.modality}, {m.architecture}, {m.num_layers} layers, "
            f"{m.num_attention_heads} heads, width {m.hidden_size}"
            f"{thinking if m.architecture == 'ebt' else ''}"
        )
        for what, names in left_out.items():
            console.print(f"left out, {what}: {', '.join(names) if len(names) < 10 else f'{len(names)} tensors'}")
        if described.prepare:
            console.print(f"Its data: ebt-prepare {described.prepare} --input ... --output ...")
        console.print(
            f"Next: ebt-convert import {output} --recipe {output.with_suffix('.yaml')} "
            "--output RUN_DIR 'data.train=[...]' 'data.validation=[...]'"
        )

    guarded(work)


if __name__ == "__main__":
    app()
