"""A run's model as a folder that needs no run, by `ebt-convert export`; `checkpoint/exported.py` has its files."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ebt_megatron.checkpoint.checkpoints import chosen
from ebt_megatron.checkpoint.exported import CONFIG, SECTION, WEIGHTS
from ebt_megatron.checkpoint.history import located
from ebt_megatron.checkpoint.llama import is_llama_shaped, llama_config, to_llama
from ebt_megatron.checkpoint.weights import checkpoint_weights, write_weights
from ebt_megatron.config import ParallelConfig, Recipe, RecipeError, load_recipe, to_yaml
from ebt_megatron.core.files import write_whole
from ebt_megatron.data.description import Description
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.sharing.card import FIGURE, figure, model_card

DESCRIPTION = "data_description"
_RUN = ("checkpoints", "metrics.jsonl")  # what is in a run's folder, and not to be written over


@dataclass(frozen=True)
class Saved:
    """The weights of a run's checkpoint.

    Attributes:
        run: the run's folder.
        checkpoint: the checkpoint's.
        weights: whole, by name; the optimizer's fp32 weights where the run trained in lower precision.
        recipe: the run's.
        fingerprint: what the weights must have in common with a model that uses them.
        step, tokens: how far they were trained.
    """

    run: Path
    checkpoint: Path
    weights: dict[str, Tensor]
    recipe: Recipe
    fingerprint: dict[str, Any]
    step: int
    tokens: int

    @classmethod
    def read(cls, source: Path) -> Saved:
        """Read the checkpoint that a path means: a run's newest good one, that of RUN/best, or a folder's.

        Raises:
            RecipeError: if there is no good checkpoint, or no recipe beside it.
        """
        from megatron.core import dist_checkpointing

        run, _ = located(source := source.resolve())
        if not (run / "checkpoints").is_dir() or not (run / "recipe.yaml").exists():
            raise RecipeError(f"{source} is neither a run (recipe.yaml, checkpoints/) nor a checkpoint inside one")
        initialize(ParallelConfig(), seed=0)
        folder = chosen(source)
        common = dist_checkpointing.load_common_state_dict(str(folder))
        recipe = load_recipe(run / "recipe.yaml")
        tokens = common["extra"].get("tokens", 0)
        return cls(run, folder, checkpoint_weights(folder), recipe, common["fingerprint"], common["step"], tokens)


def portable(recipe: Recipe) -> Recipe:
    """A recipe on one process that names no path of the machine it was trained on."""
    out = deepcopy(recipe)
    out.data.train, out.data.validation, out.data.train_weights = [], [], []
    out.data.cache_dir = out.data.cache_gb = None
    out.training.output_dir, out.training.cuda_graphs = ".", False
    out.parallel = ParallelConfig()
    return out


def export_folder(source: Path, output: Path) -> Saved:
    """Write a run's model as a folder.

    Args:
        source: a run's folder (its newest good checkpoint is taken), or a checkpoint's.
        output: the folder; an exported model that is there is written over.

    Raises:
        RecipeError: as `Saved.read`, where the run keeps no description of its data, or the folder holds a run.
        DataError: where the description is damaged.
    """
    if any((output / name).exists() for name in _RUN):
        raise RecipeError(f"{output} is a run's folder: give another one to export to")
    saved = Saved.read(source)
    described = saved.run / DESCRIPTION
    if not (described / "manifest.json").exists():
        raise RecipeError(f"{described} is missing, which an earlier version did not write: resume the run once")
    recipe, data = portable(saved.recipe), Description(str(described))
    data.copy_to(output)
    write_whole(output / "recipe.yaml", to_yaml(recipe))
    config, weights = _config(saved, recipe, data), saved.weights
    if config["model_type"] == "llama":
        weights = to_llama(weights, recipe, data.manifest.vocab_size)
    if data.manifest.tokenizer:
        _describe_tokenizer(output, data, recipe)
    write_weights(output / WEIGHTS, weights, to_yaml(recipe), saved.fingerprint, saved.step)
    shown = figure(saved.run, recipe, saved.step)
    if shown:
        write_whole(output / FIGURE, shown)
    card = model_card(saved.run, recipe, data.manifest, saved.step, saved.tokens, bool(shown))
    write_whole(output / "README.md", card)
    write_whole(output / CONFIG, json.dumps(config, indent=1) + "\n")  # last: a folder with it is complete
    return saved


def _config(saved: Saved, recipe: Recipe, data: Description) -> dict[str, Any]:
    """What config.json says: a Llama's, or an EBT's own with the sizes that other programs look for."""
    manifest = data.manifest
    ours = {"step": saved.step, "tokens": saved.tokens, "modality": recipe.data.modality, "name": recipe.name}
    if is_llama_shaped(recipe) and manifest.tokenizer:
        config = llama_config(recipe, manifest.vocab_size, manifest.tokenizer["end_of_text"])
        return config | {SECTION: ours}
    model = asdict(recipe.model)
    config = {
        "architectures": ["EBTForCausalLM"],
        "model_type": "ebt",
        "vocab_size": manifest.vocab_size,
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_attention_heads"],
        "max_position_embeddings": recipe.data.sequence_length,
        "dtype": "float32" if recipe.training.precision == "fp32" else "bfloat16",
    }
    if manifest.tokenizer:
        end = manifest.tokenizer["end_of_text"]
        config |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return config | {SECTION: ours}


def _describe_tokenizer(output: Path, data: Description, recipe: Recipe) -> None:
    """Write what transformers reads beside tokenizer.json."""
    from tokenizers import Tokenizer

    recorded = data.manifest.tokenizer
    end = Tokenizer.from_file(str(output / recorded["file"])).id_to_token(recorded["end_of_text"])
    if recorded["file"] != "tokenizer.json":
        write_whole(output / "tokenizer.json", (output / recorded["file"]).read_bytes())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": recipe.data.sequence_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    write_whole(output / "tokenizer_config.json", json.dumps(about, indent=1) + "\n")
