"""Pictures of the public code, denoised or made from captions: a bidirectional EBT, and the DiT (arXiv 2212.09748).

Their fixed positions have sines before cosines, ours cosines before sines, on either axis. Nothing else in these
layers knows one hidden channel from another (their norms have no weights), so all of them are put in our order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError, resolve
from ebt_megatron.tools.public_code.settings import (
    Described,
    Hyper,
    Supported,
    describe_thinking,
    describe_training,
    number,
    require,
)
from ebt_megatron.tools.public_code.source import Source, interleaved

_TRUNK = {"ebt": "model.transformer", "baseline": "model.diffusion_transformer"}
_NAMES = {"ebt": "ebt", "dit": "baseline"}
_SUPPORTED: Supported = {"model_name": tuple(_NAMES), "image_task": ("denoising", "t2i")}
_EBT: Supported = {"clamp_futures_grad": (False,), "mcmc_replay_buffer": (False,)}
_INITIAL = {"random_noise": 1.0, "zeros": 0.0}  # the deviation of the noise that thinking starts at, of the code's
_PROJECTOR = "model.text_embeddings_projector"
_WAVES = 256  # of a DiT's level
_VAE = 8  # pixels of a latent's side


def describe(hyper: Hyper, source: Source) -> Described:
    """What a checkpoint of pictures says; raises RecipeError for what is not supported."""
    require(hyper, _SUPPORTED)
    recipe = Recipe(name="imported")
    m, t, denoises = recipe.model, recipe.thinking, hyper.get("image_task", "t2i") == "denoising"
    m.architecture = _NAMES[hyper.get("model_name", "ebt")]
    trunk = _TRUNK[m.architecture]
    m.hidden_size, channels, patch, _ = _patches(source, trunk)
    m.num_layers = source.count(f"{trunk}.blocks")
    m.num_attention_heads = int(number(hyper, "multiheaded_attention_heads"))
    m.ffn_hidden_size = source.shape(f"{trunk}.blocks.0.mlp.fc1.weight")[0]
    m.conditioning, m.norm_epsilon = "none", 1e-6
    if m.architecture == "ebt":
        require(hyper, _EBT)
        describe_thinking(recipe, hyper, source)
        t.initial = "observed"
        if not denoises:
            require(hyper, {"denoising_initial_condition": tuple(_INITIAL)})
            std = _INITIAL[hyper.get("denoising_initial_condition") or "random_noise"]
            t.initial, t.initial_std = "noise", std * number(hyper, "gaussian_random_noise_scaling", 1)
        t.langevin_in_evaluation = not hyper.get("no_langevin_during_eval")
    else:
        recipe.images.learn_sigma = _outputs(source, trunk, channels, patch) == 2
        recipe.images.sigma_loss, recipe.images.sigma_output, recipe.images.dit_levels = "bits", "signed", "range"
    recipe.images.condition_vector = m.architecture == "ebt" and denoises  # their learned_adaln_condition
    _describe_levels(recipe, hyper, denoises)
    describe_training(recipe, hyper)
    patches = source.shape(f"{trunk}.pos_embed")[1]
    recipe.data.modality, recipe.data.sequence_length = "images", patches
    resolve(recipe)
    scale, side = (1, patch) if denoises else (0.18215, patch * _VAE)
    size = side * math.isqrt(patches)
    encoder = "pixels" if denoises else "vae --model sd-vae-ft-ema --captions ... --caption-encoder clip:..."
    identity = {
        "picture": [patches, channels * patch**2],
        "classes": 0,
        "latent_scale": scale,
        "images.learn_sigma": recipe.images.learn_sigma,
    }
    if not recipe.images.condition_vector:
        identity["images.condition_vector"] = False
    if m.architecture == "baseline":
        identity["images.sigma_output"] = "signed"
    return Described(
        recipe, identity, f"images --height {size} --width {size} --patch {side} --scale {scale} --encoder {encoder}"
    )


def _describe_levels(recipe: Recipe, hyper: Hyper, denoises: bool) -> None:
    """Set the noise, and what the model is told."""
    images, levels = recipe.images, int(number(hyper, "diffusion_steps", None if denoises else 1000))
    images.schedule_steps = int(levels / number(hyper, "denoise_images_noise_level", 1)) if denoises else levels
    images.beta_first, images.beta_last = 0.1 / images.schedule_steps, 20 / images.schedule_steps
    images.highest_level = levels - 1
    drawn = hyper.get("randomize_denoise_images_noise_level") or recipe.model.architecture != "ebt"
    images.lowest_level = 0 if drawn else levels - 1
    images.see_level = False
    if not denoises:
        images.captions, images.class_dropout = True, 0.0


def _patches(source: Source, trunk: str) -> tuple[int, ...]:
    """Width, channels and the sides of a patch of the patches' linear map, which is a convolution there."""
    shape = source.shape(f"{trunk}.x_embedder.proj.weight")
    if len(shape) != 4:
        raise RecipeError(f"{trunk}.x_embedder.proj.weight is {list(shape)}, expected that of a convolution")
    return tuple(shape)


def _order(width: int) -> Tensor:
    """Which of their hidden channels each of ours is: sine and cosine change places, on either axis."""
    quarter = torch.arange(width).view(4, -1)
    return quarter[[1, 0, 3, 2]].flatten()


def _check_positions(positions: Tensor, order: Tensor) -> None:
    from ebt_megatron.model.condition import positions_2d

    side = math.isqrt(positions.shape[1])
    known = side**2 == positions.shape[1]
    if not known or (positions[0, :, order] - positions_2d(side, side, len(order))).abs().max() > 1e-4:
        raise RecipeError("pos_embed is not the fixed sines and cosines of a square picture")


def weights_of(source: Source, recipe: Recipe) -> dict[str, Tensor]:
    """Our names and order of rows and columns; raises RecipeError for what is missing or of another shape."""
    m, trunk = recipe.model, _TRUNK[recipe.model.architecture]
    width, channels, patch, _ = _patches(source, trunk)
    order = _order(width)
    if f"{trunk}.pos_embed" in source.left:  # of gradients it has none
        positions = source.take(f"{trunk}.pos_embed", 1, recipe.data.sequence_length, width)
        _check_positions(positions, order)
    out = {}
    embedding = "modality" if m.architecture == "ebt" else "embedding"
    # Columns by channel and then place in the patch, as columns by place and then channel.
    columns = source.take(f"{trunk}.x_embedder.proj.weight", width, channels, patch, patch).permute(0, 2, 3, 1)
    out[f"{embedding}.weight"] = columns.flatten(1)[order]
    out[f"{embedding}.bias"] = source.take(f"{trunk}.x_embedder.proj.bias", width)[order]
    for i in range(m.num_layers or 0):
        out |= _layer(source, f"{trunk}.blocks.{i}", f"layers.{i}", recipe, order)
    out |= _modulation(source, f"{trunk}.final_layer", "final_modulation", 2, order)
    if m.architecture == "ebt":
        source.left.pop("model.langevin_dynamics_noise_std", None)  # a setting here: see `describe_thinking`
        out["head"] = source.take(f"{trunk}.final_layer.linear.weight", 1, width)[0][order]
        out["step_size"] = source.take("model.alpha")
        return out | _condition(source, recipe, "modality.condition", width)
    return out | _noise(source, trunk, channels, patch, order) | _condition(source, recipe, "condition", width)


def _condition(source: Source, recipe: Recipe, ours: str, width: int) -> dict[str, Tensor]:
    """What pictures are told besides the level: nothing, which is a vector of an EBT, or a caption's vector."""
    if recipe.images.captions:
        made = source.linear(_PROJECTOR, "out", width, source.shape(f"{_PROJECTOR}.weight")[1])
        return {
            f"{ours}.captions.not_told": torch.zeros(width),  # never learned: no caption is left out in training
            f"{ours}.captions.out": made["out.weight"],
            f"{ours}.captions.out_bias": made["out.bias"],
        }
    if recipe.model.architecture == "ebt":
        return {f"{ours}.vector": source.take("model.learned_adaln_condition.weight", 1, width)[0]}
    return {}


def _outputs(source: Source, trunk: str, channels: int, patch: int) -> int:
    """1: noise; 2: where between its bounds the variance of a random step is, too."""
    return 1 + (source.shape(f"{trunk}.final_layer.linear.weight")[0] > channels * patch**2)


def _noise(source: Source, trunk: str, channels: int, patch: int, order: Tensor) -> dict[str, Tensor]:
    """A DiT's level and output: noise and, where it learned variances, v."""
    width, head, parts = len(order), f"{trunk}.final_layer.linear", _outputs(source, trunk, channels, patch)
    linear = source.linear(head, "head", parts * channels * patch**2, width)
    theirs = f"{trunk}.t_embedder.mlp"
    level = source.linear(f"{theirs}.0", "in", width, _WAVES) | source.linear(f"{theirs}.2", "out", width, width)

    def outputs(rows: Tensor) -> Tensor:
        """Rows by place in a patch, output and channel, as rows by output, place and channel."""
        return rows.unflatten(0, (patch**2, parts, channels)).transpose(0, 1).flatten(0, 2)

    return {
        "head": outputs(linear["head.weight"])[:, order],
        "head_bias": outputs(linear["head.bias"]),
        "condition.level_in": level["in.weight"],
        "condition.level_in_bias": level["in.bias"],
        "condition.level_out": level["out.weight"],
        "condition.level_out_bias": level["out.bias"],
    }


def _modulation(source: Source, theirs: str, ours: str, parts: int, order: Tensor) -> dict[str, Tensor]:
    """Reorder a modulation's rows, which act on hidden channels; its columns are the condition's own."""
    made = source.modulation(theirs, ours, parts, len(order))
    return {name: w.unflatten(0, (parts, -1))[:, order].flatten(0, 1) for name, w in made.items()}


def _layer(source: Source, theirs: str, ours: str, recipe: Recipe, order: Tensor) -> dict[str, Tensor]:
    m, width = recipe.model, len(order)
    assert m.ffn_hidden_size and m.num_attention_heads
    heads, ffn = m.num_attention_heads, m.ffn_hidden_size
    out = source.linear(f"{theirs}.attn.qkv", f"{ours}.qkv", 3 * width, width)
    out = {name: interleaved(w.chunk(3), heads) for name, w in out.items()}
    out |= source.linear(f"{theirs}.mlp.fc1", f"{ours}.fc1", ffn, width)
    out |= {f"{ours}.{name}.weight": out[f"{ours}.{name}.weight"][:, order] for name in ("qkv", "fc1")}
    after = source.linear(f"{theirs}.attn.proj", f"{ours}.proj", width, width)
    after |= source.linear(f"{theirs}.mlp.fc2", f"{ours}.fc2", width, ffn)
    out |= {name: w[order] for name, w in after.items()}
    return out | _modulation(source, theirs, f"{ours}.modulation", 6, order)
