"""Imported weights of video and pictures are the public code's models: energies, predictions, losses, gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from ebt_megatron.checkpoint.weights import read_weights, set_weights
from ebt_megatron.config import RecipeError, load_recipe, to_yaml
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.diffusion import NoiseSchedule
from ebt_megatron.tasks.frames import FrameTokens
from ebt_megatron.tasks.images import Images
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.video import Video
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.tools.import_ebt_checkpoint import app, convert, convert_weights
from tests.builders import new_thinker, position_weight, relative_error
from tests.tools.latent_originals import (
    GRID,
    LATENTS,
    PATCH,
    SIDE,
    Denoiser,
    Diffuser,
    Diffusion,
    VideoBaseline,
    VideoEbt,
    patches,
    pictures_of,
)
from tests.tools.learning import LEARNING, float64, learn_both  # noqa: F401
from tests.tools.originals import HEADS, KINDS, LAYERS, STEPS, TOLERANCE, WIDTH, close, save

COMMON = {
    "model_name": "ebt",
    "embedding_dim": WIDTH,
    "num_transformer_blocks": LAYERS,
    "multiheaded_attention_heads": HEADS,
    "ffn_dim_multiplier": 1.5,
    "mcmc_step_size": 4.0,
    "mcmc_step_size_learnable": True,
    "peak_learning_rate": 1e-4,
}
VIDEO = COMMON | {
    "modality": "VID",
    "mcmc_num_steps": STEPS,
    "backbone_type": "vae",
    "vae_normalization": True,
    "sdxl_vae_standardization": True,
    "context_length": 6,
    "denoising_initial_condition": "random_noise",
    "mcmc_replay_buffer": True,
}
DENOISING = COMMON | {
    "modality": "IMG",
    "image_task": "denoising",
    "mcmc_num_steps": 2,
    "ebt_type": "time_embed",
    "diffusion_steps": 100,
    "denoise_images_noise_level": 0.1,
    "denoising_initial_condition": "random_noise",
}
MAKING = DENOISING | {"image_task": "t2i", "langevin_dynamics_noise": 0.0}
CLIP = {"kind": "clip", "shape": [6], "sha256": "v"}
DIT = DENOISING | {"model_name": "dit"}


# --- data on both sides ------------------------------------------------------------------------------


def random(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours_of(frames):
    """[B, S, channel * place] -> [B, S, place * channel]."""
    return frames.unflatten(-1, (LATENTS, -1)).mT.flatten(-2)


def imported(original, folder, hyper, dtype):
    """The original's weights in our model, through a .ckpt file."""
    convert(save(original, folder / "last.ckpt", hyper), folder / "weights.safetensors")
    recipe = load_recipe(folder / "weights.yaml", ["model.kernels=reference"])
    initialize(recipe.parallel, 0)
    if hyper["modality"] == "VID":
        task = Video(recipe, FrameTokens(SIDE, SIDE, LATENTS))
    else:
        task = Images(recipe, [GRID**2, 3 * PATCH**2], captions=CLIP)
    model = build_model(recipe, task).to(dtype)
    set_weights(folder / "weights.safetensors", model, read_weights(folder / "weights.safetensors")[0])
    return model, recipe


def compare_gradients(model, original, recipe, dtype, ours_alone=()):
    expected = convert_weights({k: p.grad for k, p in original.named_parameters() if p.grad is not None}, recipe)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(ours_alone)):
            continue
        assert expected[name].abs().max() > 0, name
        error = relative_error(parameter.grad, expected[name])
        assert error < 20 * TOLERANCE[dtype], (name, error)


def compare_thinking(steps, model, recipe, sample, dtype):
    """Energies and losses of every step, where it ends, and the gradient of every weight."""
    weight = position_weight(sample, dtype)
    sum((weight.t() * losses).sum() / len(steps) for *_, losses in steps).backward()
    thinker = new_thinker(model, recipe, sample, Plan.of(recipe.thinking, len(steps)))
    thought = thinker.train()
    for i, (_, energies, losses) in enumerate(steps):
        ours = thought.energies[i].t() if energies.dim() == 2 else thought.energies[i].sum(0)
        close(ours, energies.detach(), dtype)
        close(thought.losses[i].t(), losses.detach(), dtype)
    return thinker.descent.prediction.y.transpose(0, 1)


ALONE = ("captions.not_told",)  # which the public code has not, and which learns nothing where captions are all told


# --- what is compared -----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_video(kind, dtype, tmp_path):
    original, frames, start = VideoEbt(kind).to(dtype), random(2, 6, 16).to(dtype), random(2, 5, 16, seed=6).to(dtype)
    model, recipe = imported(original, tmp_path, VIDEO | {"ebt_type": kind}, dtype)
    steps = list(original.think(frames, start))
    ours = ours_of(frames)
    sample = Sample(ours[:, :-1], ours[:, 1:], torch.arange(2), start=ours_of(start).transpose(0, 1))
    close(compare_thinking(steps, model, recipe, sample, dtype), ours_of(steps[-1][0].detach()), dtype)
    compare_gradients(model, original, recipe, dtype)
    assert (steps[-1][0] - start).abs().max() > 0.1, "the prediction moves"


def test_noise_on_embedded_frames(tmp_path):
    original, frames, start = VideoEbt("default").double(), random(2, 6, 16), random(2, 5, 16, seed=6)
    original.model.langevin_dynamics_noise_std.data.fill_(0.5)
    model, recipe = imported(original, tmp_path, VIDEO | {"langevin_dynamics_noise": 0.3}, torch.float64)
    ours = ours_of(frames)
    sample = Sample(ours[:, :-1], ours[:, 1:], torch.arange(2), start=ours_of(start).transpose(0, 1))
    prediction = new_thinker(model, recipe, sample, Plan.of(recipe.thinking, STEPS)).descent.prediction
    noise = [prediction.plain().noise(step, "embedding").transpose(0, 1) for step in range(STEPS)]
    assert noise[0].std().item() == pytest.approx(0.5, rel=0.2) and not torch.equal(noise[0], noise[1])
    steps = list(original.think(frames, start, noise))
    close(compare_thinking(steps, model, recipe, sample, torch.float64), ours_of(steps[-1][0].detach()), torch.float64)
    compare_gradients(model, original, recipe, torch.float64)


@pytest.mark.parametrize("tied", [False, True])
def test_the_baseline_of_video(tied, tmp_path):
    original, frames = VideoBaseline(tied).double(), random(2, 6, 16)
    model, _ = imported(original, tmp_path, VIDEO | {"model_name": "baseline_transformer"}, torch.float64)
    theirs, ours = original(frames[:, :-1]), ours_of(frames)
    with torch.no_grad():
        loss = model(ours[:, :-1], ours[:, 1:])
    torch.testing.assert_close(model.output.y.transpose(0, 1), ours_of(theirs), rtol=1e-10, atol=1e-10)
    expected = F.smooth_l1_loss(theirs, frames[:, 1:], reduction="none").mean(-1)
    torch.testing.assert_close(loss.t(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["video", "denoising", "t2i"])
def test_training_goes_on_as_there(family, tmp_path, float64):  # noqa: F811
    if family == "video":
        original, frames, start = VideoEbt("adaln").double(), random(2, 6, 16), random(2, 5, 16, seed=6)
        hyper, ours = VIDEO | {"ebt_type": "adaln", "gradient_clip_val": 0.27}, ours_of(frames)
        sample = Sample(ours[:, :-1], ours[:, 1:], torch.arange(2), start=ours_of(start).transpose(0, 1))
        think = lambda: original.think(frames, start)  # noqa: E731
    else:
        captions = random(2, 6, seed=7) if family == "t2i" else None
        original, clean, noised = Denoiser(family == "t2i").double(), random(2, 3, 6, 6), random(2, 3, 6, 6, seed=6)
        hyper, nothing = DENOISING | {"image_task": family, "gradient_clip_val": 0.06}, random(2, 2) * 0
        observed = nothing if captions is None else torch.cat([nothing, captions], 1)
        sample = Sample(observed, patches(clean), torch.arange(2), start=patches(noised).transpose(0, 1))
        think = lambda: original.think(noised, clean, captions)  # noqa: E731
    model, recipe = imported(original, tmp_path, hyper | LEARNING, torch.float64)
    weight, count = position_weight(sample, torch.float64), recipe.thinking.max_steps

    def theirs():
        return sum((weight.t() * losses).sum() / count for *_, losses in think())

    def here():
        thought = new_thinker(model, recipe, sample, Plan.of(recipe.thinking, count)).train()
        return sum((weight * losses).sum() / count for losses in thought.losses)

    learn_both(original, model, recipe, theirs, here, constant=ALONE)


@pytest.mark.parametrize("tied", [False, True])
def test_training_of_the_baseline_of_video_goes_on_as_there(tied, tmp_path, float64):  # noqa: F811
    original, frames = VideoBaseline(tied).double(), random(2, 6, 16)
    hyper = VIDEO | LEARNING | {"model_name": "baseline_transformer", "gradient_clip_val": 0.2}
    model, recipe = imported(original, tmp_path, hyper, torch.float64)
    assert (recipe.video.output_maps, recipe.video.map_biases) == (2, not tied)
    ours = ours_of(frames)

    def here():
        loss = model(ours[:, :-1], ours[:, 1:]).mean()
        loss.backward()
        return loss

    learn_both(original, model, recipe, lambda: F.smooth_l1_loss(original(frames[:, :-1]), frames[:, 1:]), here)


@pytest.mark.parametrize("task", ["denoising", "t2i"])
@pytest.mark.parametrize("variances", [False, True])
def test_training_of_the_dit_goes_on_as_there(variances, task, tmp_path, float64):  # noqa: F811
    captions, level = random(2, 6, seed=7) if task == "t2i" else None, torch.tensor([0, 7])
    original, diffusion = Diffuser(variances, captions is not None).double(), Diffusion(1000)
    clean, noise = patches(random(2, 3, 6, 6)).clamp(-1, 1), patches(random(2, 3, 6, 6, seed=6))
    hyper = DIT | LEARNING | {"image_task": task, "diffusion_steps": 100 if task == "denoising" else 1000}
    model, recipe = imported(original, tmp_path, hyper | {"gradient_clip_val": 0.8}, torch.float64)
    noised, conditions = diffusion.noised(clean, noise, level), torch.stack([level, level * 0], 1)
    if captions is not None:
        conditions = torch.cat([conditions.double(), captions], 1)

    def theirs():
        out = original(pictures_of(noised), level, captions)
        return diffusion.loss(clean, noise, level, *(out if variances else [out]))

    def here():
        loss = model(conditions, noise, None, noised.transpose(0, 1)).mean()
        loss.backward()
        return loss

    learn_both(original, model, recipe, theirs, here, constant=ALONE)


@pytest.mark.parametrize(
    ("task", "dtype"), [("denoising", torch.float32), ("denoising", torch.float64), ("t2i", torch.float64)]
)
def test_pictures(task, dtype, tmp_path):
    captions = random(2, 6, seed=7).to(dtype) if task == "t2i" else None
    original = Denoiser(captions is not None).to(dtype)
    clean, noised = random(2, 3, 6, 6).to(dtype), random(2, 3, 6, 6, seed=6).to(dtype)
    model, recipe = imported(original, tmp_path, DENOISING | {"image_task": task}, dtype)
    steps = list(original.think(noised, clean, captions))
    nothing = torch.zeros(2, 2, dtype=dtype)
    observed = nothing if captions is None else torch.cat([nothing, captions], 1)
    sample = Sample(observed, patches(clean), torch.arange(2), start=patches(noised).transpose(0, 1))
    close(compare_thinking(steps, model, recipe, sample, dtype), patches(steps[-1][0].detach()), dtype)
    compare_gradients(model, original, recipe, dtype, ours_alone=ALONE if task == "t2i" else ())
    assert (steps[-1][0] - noised).abs().max() > 0.01, "the picture moves"


@pytest.mark.parametrize(("variances", "task"), [(False, "denoising"), (True, "denoising"), (True, "t2i")])
def test_the_dit_beside_it(variances, task, tmp_path):
    captions = random(2, 6, seed=7) if task == "t2i" else None
    original, dtype = Diffuser(variances, captions is not None).double(), torch.float64
    pictures, noise, level = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=6), torch.tensor([99, 7])
    model, recipe = imported(original, tmp_path, DIT | {"image_task": task}, dtype)
    theirs, conditions = original(pictures, level, captions), torch.stack([level, torch.zeros_like(level)], 1)
    if captions is not None:
        conditions = torch.cat([conditions.double(), captions], 1)
    start = patches(pictures).transpose(0, 1)
    ours = model.predicted(conditions, start).transpose(0, 1)
    if variances:  # theirs are from -1, the lower bound, to 1, the upper
        assert (recipe.images.learn_sigma, recipe.images.sigma_loss) == (True, "bits")
        assert (recipe.images.dit_levels, recipe.images.lowest_level) == ("range", 0)
        close(ours, torch.cat([theirs[0], (theirs[1] + 1) / 2], -1).detach(), dtype)
        (theirs[0] - patches(noise)).square().mean(-1).sum().backward()
        (ours.chunk(2, -1)[0] - patches(noise)).square().mean(-1).sum().backward()
    else:
        close(ours, theirs.detach(), dtype)
        (theirs - patches(noise)).square().mean(-1).sum().backward()
        model(conditions, patches(noise), None, start).sum().backward()
    compare_gradients(model, original, recipe, dtype, ours_alone=ALONE)


def test_settings_of_video_become_a_recipe(tmp_path):
    original = VideoEbt("time_embed")
    hyper = VIDEO | {
        "ebt_type": "time_embed",
        "denoising_initial_condition": "most_recent_embedding",
        "randomize_mcmc_num_steps": 2,
        "randomize_mcmc_num_steps_min": 2,
        "randomize_mcmc_num_steps_final_landscape": True,
    }
    described, left_out = convert(save(original, tmp_path / "last.ckpt", hyper), tmp_path / "w.safetensors")
    recipe, t = described.recipe, described.recipe.thinking
    assert (recipe.data.modality, recipe.data.sequence_length, recipe.model.conditioning) == (
        "video",
        5,
        "time_embed_sequence",
    )
    assert (t.initial, t.step_size, t.min_steps, t.max_steps) == ("observed", 4.0, STEPS + 1, STEPS + 2)
    assert to_yaml(load_recipe(tmp_path / "w.yaml")) == to_yaml(recipe)
    assert list(left_out) == ["the frozen encoder of pictures"] and t.replay.enabled
    weights, metadata = read_weights(tmp_path / "w.safetensors")
    assert t.landscapes == len(weights["step_embedding"]) == STEPS, "the last landscape is one, however often it comes"
    assert '"frame": [4, 4], "latent_scale": 0.18215' in metadata["fingerprint"]
    assert "--height 16 --width 16 --encoder vae" in described.prepare and "--scale 0.18215" in described.prepare


def test_settings_of_pictures_become_a_recipe(tmp_path):
    described, _ = convert(save(Denoiser(), tmp_path / "last.ckpt", DENOISING), tmp_path / "w.safetensors")
    recipe, images = described.recipe, described.recipe.images
    assert (recipe.thinking.initial, recipe.thinking.max_steps, recipe.model.conditioning) == ("observed", 2, "none")
    assert (recipe.model.norm_epsilon, recipe.data.sequence_length, images.see_level) == (1e-6, 9, False)
    assert (images.schedule_steps, images.lowest_level, images.highest_level) == (1000, 99, 99)
    kept = torch.prod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:100])
    assert NoiseSchedule(images).kept[99].item() == pytest.approx(kept.item())
    assert described.prepare == "images --height 6 --width 6 --patch 2 --scale 1 --encoder pixels"
    described, left_out = convert(save(Denoiser(True), tmp_path / "t.ckpt", MAKING), tmp_path / "w.safetensors")
    recipe, images = described.recipe, described.recipe.images
    assert (recipe.thinking.initial, recipe.thinking.initial_std, images.captions) == ("noise", 1, True)
    assert "--height 48 --width 48 --patch 16 --scale 0.18215" in described.prepare
    assert list(left_out) == ["the frozen one of captions"]


def test_pictures_from_the_command_line_to_an_evaluation(tmp_path):
    """Of data that were multiplied by the scale they were trained with; others are refused."""
    from ebt_megatron.data_prep import images
    from ebt_megatron.evaluation.evaluate import evaluate
    from ebt_megatron.session import open_run
    from ebt_megatron.tools.convert import app as convert_app
    from tests.data_prep.media import invoke

    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (60, 6, 6, 3), np.uint8))
    for name, more in (("right", ("--scale", 1)), ("wrong", ())):
        done = invoke(
            images.main,
            "--input",
            tmp_path / "a.npz",
            "--output",
            tmp_path / name,
            "--height",
            6,
            "--width",
            6,
            "--encoder",
            "pixels",
            "--patch",
            2,
            "--validation-fraction",
            0.3,
            *more,
        )
        assert done.exit_code == 0, done.output
    weights = tmp_path / "w.safetensors"
    done = CliRunner().invoke(app, [str(save(Denoiser(), tmp_path / "last.ckpt", DENOISING)), "--output", str(weights)])
    assert done.exit_code == 0 and "ebt-prepare images --height 6 --width 6" in done.output

    def make_run(data):
        return CliRunner().invoke(
            convert_app,
            [
                "import",
                str(weights),
                "--recipe",
                str(tmp_path / "w.yaml"),
                "--output",
                str(tmp_path / "run"),
                f"data.train=[{tmp_path / data}/train]",
                f"data.validation=[{tmp_path / data}/validation]",
                "training.global_batch_size=4",
                "training.micro_batch_size=2",
                "training.validation_samples=4",
            ],
        )

    done = make_run("wrong")
    assert done.exit_code != 0 and "latent_scale=1, this run has latent_scale=none" in " ".join(done.output.split())
    done = make_run("right")
    assert done.exit_code == 0, done.output
    with open_run(tmp_path / "run") as opened:
        result = evaluate(opened, steps=2, example=False)
    assert all(math.isfinite(row["loss"]) for row in result["thinking"])


QKV, DOWN = "model.transformer.blocks.1.attn.qkv.bias", "model.encoder_down_projection.bias"


@pytest.mark.parametrize(
    ("original", "hyper", "changes", "message"),
    [
        (VideoEbt, VIDEO | {"backbone_type": "dinov2"}, {}, "backbone_type=dinov2 is not supported, only vae"),
        (VideoEbt, VIDEO | {"vae_normalization": False}, {}, "vae_normalization=False is not supported"),
        (
            VideoEbt,
            VIDEO,
            {DOWN: None, DOWN.replace("bias", "weight"): None},
            "encoder_down_projection.weight is missing",
        ),
        (VideoEbt, VIDEO, {DOWN: torch.zeros(3)}, rf"{DOWN} is \[3\], expected \[32\]"),
        (
            VideoEbt,
            VIDEO | {"embedding_dim": 16, "image_dims": [16, 16]},
            {DOWN: None, DOWN.replace("bias", "weight"): None},
            "embedding_dim=16 is the size of a frame's latent",
        ),
        (Denoiser, DENOISING | {"image_task": "t2i"}, {}, "text_embeddings_projector.weight is missing"),
        (
            Denoiser,
            DENOISING | {"image_task": "paint"},
            {},
            "image_task=paint is not supported, only denoising and t2i",
        ),
        (Denoiser, DENOISING, {QKV: None}, f"{QKV} is missing"),
        (Denoiser, DENOISING, {"model.transformer.pos_embed": torch.zeros(1, 9, WIDTH)}, "pos_embed is not the fixed"),
        (Denoiser, DENOISING, {"model.other.weight": torch.zeros(3)}, "model.other.weight is not a weight of"),
        (Denoiser, DENOISING | {"model_name": "unet"}, {}, "model_name=unet is not supported, only ebt and dit"),
        (Denoiser, DENOISING | {"modality": "AUD"}, {}, "modality=AUD is not supported, only NLP and VID and IMG"),
    ],
)
def test_what_is_not_supported_is_named(original, hyper, changes, message, tmp_path):
    model = original("default") if original is VideoEbt else original()
    path = save(model, tmp_path / "last.ckpt", hyper, **changes)
    with pytest.raises(RecipeError, match=message) as error:
        convert(path, tmp_path / "w.safetensors")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("w.*"))
