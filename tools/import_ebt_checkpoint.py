"""A checkpoint of the paper's public code, as weights of this project: `ebt-import CKPT`.

The public code (github.com/alexiglad/EBT) saves with PyTorch Lightning. Its text EBTs of type `default`, `time_embed`
and `adaln` or `adaln_zero` are here `model.conditioning=none`, `time_embed_sequence` and `adaln_sequence`; its baseline
is `model.architecture=transformer`; others are refused. Written are FILE.safetensors and FILE.yaml, a recipe, from
which `ebt-convert import` makes a run.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError, resolve, to_yaml
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole

app = typer.Typer(add_completion=False)

_CONDITIONING = {
    "default": "none", "time_embed": "time_embed_sequence", "adaln": "adaln_sequence", "adaln_zero": "adaln_sequence",
}  # fmt: skip
_WRAPPERS = {"module", "_orig_mod"}  # what DistributedDataParallel and torch.compile put into names
_METRICS = "torchmetrics_dict."  # states of metrics, which are no weights

# What a model depends on and is not built here: hyper-parameter, the values that are.
_SUPPORTED: dict[str, tuple[Any, ...]] = {"modality": ("NLP",), "model_name": ("ebt", "baseline_transformer")}
_SUPPORTED_EBT: dict[str, tuple[Any, ...]] = {
    "ebt_type": tuple(_CONDITIONING),
    "ebt_norm": ("rms",),
    "ebt_act_func": ("silu",),
    "denoising_initial_condition": ("random_noise", "zeros"),
    "normalize_initial_condition": (True,),
    "normalize_initial_condition_only_first_step": (False,),
    "vocab_to_embed_uses_prob_dist": (False,),
    "clamp_futures_grad": (False,),
    "absolute_clamp": (0,),
    "sharpen_predicted_distribution": (0,),
}


def read_checkpoint(path: Path, trust: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a Lightning checkpoint holds by name, without the names of wrappers, and its hyper-parameters.

    Args:
        path: a .ckpt file.
        trust: unpickle whatever it holds, which may run code of whoever made it.

    Raises:
        RecipeError: if it cannot be read, or is not such a checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=not trust)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "" if trust else "; if you trust its maker, --trust reads objects other than tensors"
        raise RecipeError(f"{path} cannot be read: {reason}{hint}") from None
    for key in ("state_dict", "hyper_parameters"):
        if not isinstance(stored, dict) or key not in stored:
            raise RecipeError(f"{path}: {key} is missing: not a Lightning checkpoint of the public code")
    given = stored["hyper_parameters"]
    hyper = vars(given) if isinstance(given, argparse.Namespace) else given
    if not isinstance(hyper, dict):
        raise RecipeError(f"{path}: hyper_parameters is {type(hyper).__name__}, not names and values")
    state = stored["state_dict"].items()
    return {".".join(p for p in key.split(".") if p not in _WRAPPERS): value for key, value in state}, dict(hyper)


def _number(hyper: dict[str, Any], name: str, default: float | None = None) -> float:
    """A hyper-parameter that must be a number; raises RecipeError if it is not, or is missing without a default."""
    value = hyper.get(name, default)
    if isinstance(value, int | float):
        return value
    raise RecipeError(f"hyper-parameter {name}={value}: a number is needed" if name in hyper else
                      f"hyper-parameter {name} is missing")  # fmt: skip


def _shape(weights: dict[str, Tensor], key: str) -> torch.Size:
    if key not in weights:
        raise RecipeError(f"{key} is missing")
    return weights[key].shape


def _take(target: object, hyper: dict[str, Any], **names: str) -> None:
    """Set numbers from hyper-parameters that are there and not None."""
    for field, name in names.items():
        if hyper.get(name) is not None:
            setattr(target, field, type(getattr(target, field) or 0.0)(_number(hyper, name)))


def _describe_thinking(recipe: Recipe, hyper: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Set what only an EBT has."""
    m, t = recipe.model, recipe.thinking
    m.conditioning = _CONDITIONING[hyper.get("ebt_type", "default")]
    steps, more = int(_number(hyper, "mcmc_num_steps", 2)), int(_number(hyper, "randomize_mcmc_num_steps", 0))
    # The last step is repeated: in training at random, at least so often; in evaluation as often as ever.
    least = max(1, int(_number(hyper, "randomize_mcmc_num_steps_min", 0))) if more else 1
    t.min_steps, t.max_steps = steps - 1 + least, steps + more
    if m.conditioning != "none":  # one row for each step
        t.min_steps = t.max_steps = _shape(weights, "model.transformer.time_embeddings.weight")[0]
    if hyper.get("truncate_mcmc"):
        t.loss = "last"
    if hyper.get("no_mcmc_detach"):
        t.gradient = "truncated" if hyper.get("truncate_mcmc") else "full"
    t.step_rule = "probability_descent"  # what normalize_initial_condition does
    t.initial = "zeros" if hyper.get("denoising_initial_condition") == "zeros" else "noise"
    _take(t, hyper, step_size="mcmc_step_size", learn_step_size="mcmc_step_size_learnable",
          step_size_lr_multiplier="mcmc_step_size_lr_multiplier", step_size_scale="randomize_mcmc_step_size_scale",
          initial_std="gaussian_random_noise_scaling")  # fmt: skip
    if hyper.get("langevin_dynamics_noise"):  # 0 switches it off, whatever the weight says; it may have been learned
        _shape(weights, "model.langevin_dynamics_noise_std")
        t.langevin_noise = float(weights["model.langevin_dynamics_noise_std"])
    t.replay.enabled = bool(hyper.get("mcmc_replay_buffer"))


def make_recipe(hyper: dict[str, Any], weights: dict[str, Tensor]) -> Recipe:
    """The recipe that the hyper-parameters describe; sizes are those of the weights.

    Raises:
        RecipeError: naming the hyper-parameter that is missing, no number or not supported.
    """
    thinks = hyper.get("model_name", "ebt") == "ebt"
    for key, values in (_SUPPORTED | (_SUPPORTED_EBT if thinks else {})).items():
        if key in hyper and hyper[key] not in values:
            raise RecipeError(f"hyper-parameter {key}={hyper[key]} is not supported, only "
                              f"{' and '.join(map(str, values))}")  # fmt: skip
    recipe = Recipe(name="imported")
    m, o = recipe.model, recipe.optimizer
    layers = [int(found[1]) for key in weights if (found := re.match(r"model\.transformer\.layers\.(\d+)\.", key))]
    m.num_layers = max(layers, default=-1) + 1
    m.num_attention_heads = int(_number(hyper, "multiheaded_attention_heads"))
    m.hidden_size = _shape(weights, "model.embeddings.weight")[1]
    m.ffn_hidden_size = _shape(weights, "model.transformer.layers.0.feed_forward.w1.weight")[0]
    _take(m, hyper, norm_epsilon="norm_eps")
    if thinks:
        _describe_thinking(recipe, hyper, weights)
    else:
        m.architecture = "transformer"
    o.lr = 1e-3
    _take(o, hyper, lr="peak_learning_rate", weight_decay="weight_decay", beta1="beta1", beta2="beta2",
          clip_grad="gradient_clip_val", warmup_steps="warm_up_steps")  # fmt: skip
    _take(recipe.data, hyper, sequence_length="context_length")
    _take(recipe.training, hyper, steps="max_steps")
    resolve(recipe)
    return recipe


class _Source:
    """Weights of the public code, each to be taken once and in the expected shape."""

    def __init__(self, weights: dict[str, Tensor]):
        self.left = dict(weights)

    def take(self, key: str, *shape: int) -> Tensor:
        """The weight `key`; raises RecipeError if it is missing or of another shape."""
        if key not in self.left:
            raise RecipeError(f"{key} is missing")
        weight = self.left.pop(key)
        if tuple(weight.shape) != shape:
            raise RecipeError(f"{key} is {list(weight.shape)}, expected {list(shape)}")
        return weight


def _interleaved(parts: Iterable[Tensor], blocks: int) -> Tensor:
    """Cut the rows of each part into `blocks`, and alternate: block 0 of each part, block 1 of each part, ..."""
    return torch.stack([part.unflatten(0, (blocks, -1)) for part in parts], 1).flatten(0, 2)


def convert_weights(weights: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The public code's weights under this project's names and in its order of rows.

    Both rotate interleaved pairs, so rows keep their order inside a head.

    Args:
        weights: from `read_checkpoint`.
        recipe: from `make_recipe`.

    Raises:
        RecipeError: naming the first weight that is missing, unknown or of another shape.
    """
    m, source = recipe.model, _Source(weights)
    assert m.num_layers and m.hidden_size and m.ffn_hidden_size and m.num_attention_heads
    width, ffn, heads = m.hidden_size, m.ffn_hidden_size, m.num_attention_heads
    vocab = len(weights["model.embeddings.weight"])
    padding = -vocab % m.vocab_multiple
    adaptive = m.conditioning == "adaln_sequence"

    def table(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(padding, width)])

    def modulation(theirs: str, ours: str, parts: int) -> dict[str, Tensor]:
        return {
            f"{ours}.weight": source.take(f"{theirs}.adaLN_modulation.1.weight", parts * width, width),
            f"{ours}.bias": source.take(f"{theirs}.adaLN_modulation.1.bias", parts * width),
        }

    observed = table(source.take("model.embeddings.weight", vocab, width))
    out = {"final_norm.weight": source.take("model.transformer.norm.weight", width)}
    if m.architecture == "transformer":
        out["embedding.table.weight"] = observed
        out["output.projection.weight"] = table(source.take("model.output.weight", vocab, width))
    else:
        source.left.pop("model.langevin_dynamics_noise_std", None)  # a setting here: see `make_recipe`
        head = "model.transformer.final_layer" + (".linear" if adaptive else "")
        out |= {
            "step_size": source.take("model.alpha"),
            "modality.context.table.weight": observed,
            "modality.prediction_embedding.weight": table(source.take("model.vocab_to_embed.weight", width, vocab).t()),
            "head": source.take(f"{head}.weight", 1, width)[0],
        }
        if m.conditioning != "none":
            steps = recipe.thinking.max_steps
            out["step_embedding"] = source.take("model.transformer.time_embeddings.weight", steps, width)
        if adaptive:
            out |= modulation("model.transformer.final_layer", "final_modulation", 2)
    for i in range(m.num_layers):
        theirs, ours = f"model.transformer.layers.{i}", f"layers.{i}"
        attention = [source.take(f"{theirs}.attention.{w}.weight", width, width) for w in ("wq", "wk", "wv")]
        gate_up = [source.take(f"{theirs}.feed_forward.{w}.weight", ffn, width) for w in ("w1", "w3")]
        out |= {
            f"{ours}.norm1.weight": source.take(f"{theirs}.attention_norm.weight", width),
            f"{ours}.qkv.weight": _interleaved(attention, heads),
            f"{ours}.proj.weight": source.take(f"{theirs}.attention.wo.weight", width, width),
            f"{ours}.norm2.weight": source.take(f"{theirs}.ffn_norm.weight", width),
            f"{ours}.fc1.weight": _interleaved(gate_up, heads),
            f"{ours}.fc2.weight": source.take(f"{theirs}.feed_forward.w2.weight", width, ffn),
        }
        if adaptive:
            out |= modulation(theirs, f"{ours}.modulation", 6)
    if source.left:
        raise RecipeError(f"{next(iter(source.left))} is not a weight of the models that are supported")
    return out


def convert(checkpoint: Path, output: Path, trust: bool = False) -> tuple[Recipe, list[str]]:
    """Write OUTPUT (safetensors) and the recipe beside it, OUTPUT with .yaml.

    Returns:
        The recipe, and the names of what was left out because it is no weight: states of metrics.

    Raises:
        RecipeError: see `read_checkpoint`, `make_recipe` and `convert_weights`.
    """
    from ebt_megatron.checkpoint.checkpoints import fingerprint
    from ebt_megatron.checkpoint.weights import write_weights

    stored, hyper = read_checkpoint(checkpoint, trust)
    left_out = [name for name in stored if name.startswith(_METRICS)]
    for name in left_out:
        del stored[name]
    try:
        recipe = make_recipe(hyper, stored)
        weights = convert_weights(stored, recipe)
    except RecipeError as error:
        raise RecipeError(f"{checkpoint}: {error}") from None
    identity = fingerprint(recipe, {"vocab_size": len(stored["model.embeddings.weight"])})
    identity.pop("thinking.max_steps", None)  # free, where there is no step embedding to say it
    write_weights(output, weights, to_yaml(recipe), identity)
    write_whole(output.with_suffix(".yaml"), to_yaml(recipe))
    return recipe, left_out


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
        recipe, left_out = convert(checkpoint, output, trust)
        console, m = Console(soft_wrap=True, highlight=False), recipe.model
        thinking = f", conditioning {m.conditioning}, thinking steps {recipe.thinking.max_steps}"
        console.print(f"{output}: {m.architecture}, {m.num_layers} layers, {m.num_attention_heads} heads, width "
                      f"{m.hidden_size}{thinking if m.architecture == 'ebt' else ''}")  # fmt: skip
        if left_out:
            console.print(f"left out, states of metrics: {', '.join(left_out)}")
        console.print(f"Next: ebt-convert import {output} --recipe {output.with_suffix('.yaml')} "
                      "--output RUN_DIR 'data.train=[...]' 'data.validation=[...]'")  # fmt: skip

    guarded(work)


if __name__ == "__main__":
    app()
