"""Text and video of the public code: one causal Transformer, which reads tokens or frames.

Both rotate interleaved pairs, so rows keep their order inside a head.
"""

from __future__ import annotations

from typing import Any

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
    take,
)
from ebt_megatron.tools.public_code.source import Source, interleaved

_CONDITIONING = {
    "default": "none",
    "time_embed": "time_embed_sequence",
    "adaln": "adaln_sequence",
    "adaln_zero": "adaln_sequence",
}
_TRUNK = "model.transformer"
_STEPS = f"{_TRUNK}.time_embeddings.weight"
_DOWN_BIAS = "model.encoder_down_projection.bias"
_ANSWER = "[[Answer]]: "  # what it finetunes on comes after it
_LATENTS = 4  # channels of the VAE, which has a number of each for 8 x 8 pixels
_MODELS = ("ebt", "baseline_transformer")
_EBT: Supported = {
    "ebt_type": tuple(_CONDITIONING),
    "ebt_norm": ("rms",),
    "ebt_act_func": ("silu",),
    "clamp_futures_grad": (False,),
}
_TEXT: Supported = _EBT | {
    "denoising_initial_condition": ("random_noise", "zeros"),
    "normalize_initial_condition": (True,),
    "normalize_initial_condition_only_first_step": (False,),
    "vocab_to_embed_uses_prob_dist": (False,),
    "absolute_clamp": (0,),
    "sharpen_predicted_distribution": (0,),
}
_FRAMES: Supported = {"backbone_type": ("vae",), "vae_normalization": (True,), "custom_image_normalization": (False,)}
# Where thinking starts, and the deviation of the noise there, of the public code's 1.
_INITIAL = {"random_noise": ("noise", 1.0), "zeros": ("noise", 0.0), "most_recent_embedding": ("observed", 0.0)}


def describe_text(hyper: Hyper, source: Source) -> Described:
    """What a checkpoint of text says; raises RecipeError for what is not supported."""
    recipe, thinks = _describe(hyper, source, _TEXT)
    recipe.model.hidden_size = source.shape("model.embeddings.weight")[1]
    if thinks:
        t = recipe.thinking
        t.step_rule = "probability_descent"  # what normalize_initial_condition does
        t.initial, std = _INITIAL[hyper.get("denoising_initial_condition") or "random_noise"]
        t.initial_std = std * number(hyper, "gaussian_random_noise_scaling", 1)
        t.replay.enabled = bool(hyper.get("mcmc_replay_buffer"))
    take(recipe.data, hyper, sequence_length="context_length")
    finetunes = hyper.get("execution_mode") == "finetune"
    recipe.data.learn_from = "answers" if finetunes else "text"
    resolve(recipe)
    prepare = f"text --answers-after '{_ANSWER}'" if finetunes else ""
    return Described(recipe, {"vocab_size": len(source.left["model.embeddings.weight"])}, prepare)


def describe_video(hyper: Hyper, source: Source) -> Described:
    """What a checkpoint of video says; raises RecipeError for what is not supported."""
    require(hyper, _FRAMES)
    recipe, thinks = _describe(hyper, source, _EBT | {"denoising_initial_condition": tuple(_INITIAL)})
    down = "model.encoder_down_projection.weight"
    if down not in source.left:
        sides = hyper.get("image_dims") or (224, 224)
        if hyper.get("embedding_dim") == _LATENTS * (sides[0] // 8) * (sides[1] // 8):
            raise RecipeError(
                f"{down} is missing, because embedding_dim={hyper['embedding_dim']} is the size of a frame's latent "
                "and the public code then has no projection; a video model here always learns one"
            )
    recipe.model.hidden_size, numbers = source.shape(down)
    recipe.data.modality = "video"
    if thinks:
        t = recipe.thinking
        t.langevin_on = "embedding"
        t.replay.enabled = bool(hyper.get("mcmc_replay_buffer"))
        t.initial, t.initial_std = _INITIAL[hyper.get("denoising_initial_condition") or "random_noise"]
    recipe.data.sequence_length = int(number(hyper, "context_length")) - 1
    resolve(recipe)
    scale = 0.18215 if hyper.get("sdxl_vae_standardization") else 1
    size = 8 * round((numbers / _LATENTS) ** 0.5)
    identity: dict[str, Any] = {"frame": [numbers // _LATENTS, _LATENTS], "latent_scale": scale}
    if not thinks:
        recipe.video.output_maps = identity["video.output_maps"] = 2
        if _DOWN_BIAS not in source.left:  # weight_tie_vae_proj, which begins both maps alike
            recipe.video.map_biases = identity["video.map_biases"] = False
    return Described(
        recipe,
        identity,
        f"video --height {size} --width {size} --encoder vae --model sd-vae-ft-mse "
        f"--scale {scale} --frames {recipe.data.sequence_length + 1}",
    )


def _describe(hyper: Hyper, source: Source, ebt: Supported) -> tuple[Recipe, bool]:
    """The recipe as far as text and video are alike, not resolved, and whether it thinks."""
    thinks = hyper.get("model_name", "ebt") == "ebt"
    require(hyper, {"model_name": _MODELS} | (ebt if thinks else {}))
    recipe = Recipe(name="imported")
    m = recipe.model
    m.num_layers = source.count(f"{_TRUNK}.layers")
    m.num_attention_heads = int(number(hyper, "multiheaded_attention_heads"))
    m.ffn_hidden_size = source.shape(f"{_TRUNK}.layers.0.feed_forward.w1.weight")[0]
    take(m, hyper, norm_epsilon="norm_eps")
    if thinks:
        m.conditioning = _CONDITIONING[hyper.get("ebt_type", "default")]
        landscapes = {"mcmc_num_steps": source.shape(_STEPS)[0]} if m.conditioning != "none" else {}
        describe_thinking(recipe, hyper | landscapes, source)
        if m.conditioning != "none" and landscapes["mcmc_num_steps"] < recipe.thinking.max_steps:
            recipe.thinking.landscapes = landscapes["mcmc_num_steps"]
    else:
        m.architecture = "baseline"
    describe_training(recipe, hyper)
    return recipe, thinks


def weights_of_text(source: Source, recipe: Recipe) -> dict[str, Tensor]:
    """Our names and order of rows; raises RecipeError for what is missing or of another shape."""
    m = recipe.model
    width, vocab = m.hidden_size, source.shape("model.embeddings.weight")[0]
    assert width
    padding = -vocab % m.vocab_multiple

    def table(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(padding, width)])

    observed = table(source.take("model.embeddings.weight", vocab, width))
    if m.architecture == "baseline":
        output = table(source.take("model.output.weight", vocab, width))
        return {"embedding.table.weight": observed, "output.projection.weight": output} | _trunk(source, recipe)
    predicted = source.take("model.vocab_to_embed.weight", width, vocab)
    return (
        {
            "modality.context.table.weight": observed,
            "modality.prediction_embedding.weight": table(predicted.t()),
        }
        | _thinking(source, recipe)
        | _trunk(source, recipe)
    )


def weights_of_video(source: Source, recipe: Recipe) -> dict[str, Tensor]:
    """Our names, and frames by patch and then channel; raises RecipeError as `weights_of_text`."""
    width, numbers = source.shape("model.encoder_down_projection.weight")
    ebt = recipe.model.architecture == "ebt"

    def frames(weight: Tensor) -> Tensor:
        """Columns by channel and then place as columns by place and then channel."""
        return weight.unflatten(1, (_LATENTS, -1)).mT.flatten(1)

    down = source.take("model.encoder_down_projection.weight", width, numbers)
    name = "modality" if ebt else "embedding"
    out = {f"{name}.weight": frames(down)}
    if recipe.video.map_biases:
        out[f"{name}.bias"] = source.take(_DOWN_BIAS, width)
    if ebt:
        return out | _thinking(source, recipe) | _trunk(source, recipe)
    up = source.take("model.encoder_up_projection.weight", numbers, width)
    out |= {
        "output.inner": source.take("model.output.weight", width, width),
        "output.weight": frames(up.t()).t().contiguous(),
    }
    if recipe.video.map_biases:
        out["output.bias"] = frames(source.take("model.encoder_up_projection.bias", numbers)[None])[0]
    return out | _trunk(source, recipe)


def _thinking(source: Source, recipe: Recipe) -> dict[str, Tensor]:
    """What an EBT has beside its layers."""
    m, width = recipe.model, recipe.model.hidden_size
    assert width
    source.left.pop("model.langevin_dynamics_noise_std", None)  # a setting here: see `describe_thinking`
    adaptive = m.conditioning == "adaln_sequence"
    head = f"{_TRUNK}.final_layer" + (".linear" if adaptive else "")
    out = {"step_size": source.take("model.alpha"), "head": source.take(f"{head}.weight", 1, width)[0]}
    if m.conditioning != "none":
        out["step_embedding"] = source.take(_STEPS, recipe.thinking.num_landscapes, width)
    if adaptive:
        out |= source.modulation(f"{_TRUNK}.final_layer", "final_modulation", 2, width)
    return out


def _trunk(source: Source, recipe: Recipe) -> dict[str, Tensor]:
    """The layers and the last norm."""
    m = recipe.model
    width, ffn, heads = m.hidden_size, m.ffn_hidden_size, m.num_attention_heads
    assert m.num_layers and width and ffn and heads
    out = {"final_norm.weight": source.take(f"{_TRUNK}.norm.weight", width)}
    for i in range(m.num_layers):
        theirs, ours = f"{_TRUNK}.layers.{i}", f"layers.{i}"
        attention = [source.take(f"{theirs}.attention.{w}.weight", width, width) for w in ("wq", "wk", "wv")]
        gate_up = [source.take(f"{theirs}.feed_forward.{w}.weight", ffn, width) for w in ("w1", "w3")]
        out |= {
            f"{ours}.norm1.weight": source.take(f"{theirs}.attention_norm.weight", width),
            f"{ours}.qkv.weight": interleaved(attention, heads),
            f"{ours}.proj.weight": source.take(f"{theirs}.attention.wo.weight", width, width),
            f"{ours}.norm2.weight": source.take(f"{theirs}.ffn_norm.weight", width),
            f"{ours}.fc1.weight": interleaved(gate_up, heads),
            f"{ours}.fc2.weight": source.take(f"{theirs}.feed_forward.w2.weight", width, ffn),
        }
        if m.conditioning == "adaln_sequence":
            out |= source.modulation(theirs, f"{ours}.modulation", 6, width)
    return out
