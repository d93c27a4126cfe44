"""Imported weights of video and pictures are the public code's models: energies, predictions, losses, gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from ebt_megatron.checkpoint.weights import read_weights, set_weights
from ebt_megatron.config import RecipeError, load_recipe, to_yaml
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.diffusion import NoiseSchedule
from ebt_megatron.tasks.images import Images
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.video import Video
from ebt_megatron.thinking.plan import Plan
from tests.builders import new_thinker, position_weight, relative_error
from tests.tools.originals import (
    HEADS,
    KINDS,
    LAYERS,
    STEPS,
    TOLERANCE,
    WIDTH,
    Block,
    Norm,
    Trunk,
    adaptive,
    close,
    linear,
    randomize,
    save,
)
from tools.import_ebt_checkpoint import app, convert, convert_weights

COMMON = {
    "model_name": "ebt", "embedding_dim": WIDTH, "num_transformer_blocks": LAYERS, "multiheaded_attention_heads": HEADS,
    "ffn_dim_multiplier": 1.5, "mcmc_step_size": 4.0, "mcmc_step_size_learnable": True, "peak_learning_rate": 1e-4,
}  # fmt: skip
VIDEO = COMMON | {
    "modality": "VID", "mcmc_num_steps": STEPS, "backbone_type": "vae", "vae_normalization": True,
    "sdxl_vae_standardization": True, "context_length": 6, "denoising_initial_condition": "random_noise",
    "mcmc_replay_buffer": True,
}  # fmt: skip
DENOISING = COMMON | {
    "modality": "IMG", "image_task": "denoising", "mcmc_num_steps": 2, "ebt_type": "time_embed",
    "diffusion_steps": 100, "denoise_images_noise_level": 0.1, "denoising_initial_condition": "random_noise",
}  # fmt: skip
DIT = DENOISING | {"model_name": "dit"}
SIDE, LATENTS = 2, 4  # of a frame of 16 x 16 pixels: 2 x 2 places of four numbers each
PATCH, GRID = 2, 3  # pictures of 6 x 6 pixels


# --- the public code's models ----------------------------------------------------------------------


def descend(energies_of, y, alpha, steps, loss):
    """Yield energies before each step and losses after it, detached between the steps."""
    for step in range(steps):
        y = y.detach().requires_grad_()
        energies = energies_of(y, step)
        (gradient,) = torch.autograd.grad(energies.sum(), y, create_graph=True)
        y = y - alpha.clamp(min=1e-4) * gradient
        yield y, energies, loss(y)


class VideoEbt(nn.Module):
    """One token a frame [B, S, 16], the numbers of a frame by channel and then place."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Module()
        self.model.alpha = nn.Parameter(torch.tensor(4.0))
        self.model.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.model.image_encoder = nn.Linear(3, 3)  # stands for a VAE
        self.model.encoder_down_projection = nn.Linear(LATENTS * SIDE**2, WIDTH)
        self.model.transformer = Trunk(kind, 1e-5)
        randomize(self)

    def think(self, frames, y):
        down = self.model.encoder_down_projection
        observed, targets = frames[:, :-1], frames[:, 1:]
        energies = lambda y, step: self.model.transformer(down(observed), down(y), step)  # noqa: E731
        loss = lambda y: F.smooth_l1_loss(y, targets, reduction="none").mean(-1)  # noqa: E731
        return descend(energies, y, self.model.alpha, STEPS, loss)


class VideoBaseline(nn.Module):
    """Transformer++ of frames; its map back has the same weight as the map there if `tied`, and neither a bias."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(1)
        numbers = LATENTS * SIDE**2
        self.model = nn.Module()
        self.model.encoder_down_projection = nn.Linear(numbers, WIDTH, bias=not tied)
        self.model.encoder_up_projection = nn.Linear(WIDTH, numbers, bias=not tied)
        self.model.output = linear(WIDTH, WIDTH)
        trunk = self.model.transformer = nn.Module()
        trunk.layers, trunk.norm = nn.ModuleList(Block(1e-5) for _ in range(LAYERS)), Norm(1e-5)
        randomize(self)
        if tied:
            self.model.encoder_up_projection.weight.data = self.model.encoder_down_projection.weight.data.t().clone()

    def forward(self, observed):
        model, length = self.model, observed.shape[1]
        x, mask = model.encoder_down_projection(observed), torch.ones(length, length).tril().bool()
        for layer in model.transformer.layers:
            x = layer(x, torch.arange(length).double(), mask)
        return model.encoder_up_projection(model.output(model.transformer.norm(x)))


class PictureAttention(nn.Module):
    """All to all; the rows of qkv are all queries, all keys, all values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        p = (torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return self.proj(torch.einsum("bnqk,bknh->bqnh", p, v).flatten(2))


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


class PictureBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = PictureAttention(), nn.Module(), adaptive(6)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(normalized(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.mlp.fc1(normalized(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp.fc2(hidden)


def fixed_positions():
    """[1, GRID^2, WIDTH]: of each axis, columns first, sines and then cosines of a quarter of the width each."""
    rows = []
    for place in range(GRID**2):
        row = []
        for at in (place % GRID, place // GRID):
            angles = [at / 10000 ** (k / (WIDTH // 4)) for k in range(WIDTH // 4)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)[None]


class PictureTrunk(nn.Module):
    """DiT's layers over pictures [B, 3, 6, 6], and an output of `outputs` numbers for each patch."""

    def __init__(self, outputs, bias):
        super().__init__()
        self.x_embedder, self.final_layer = nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(fixed_positions(), requires_grad=False)
        self.blocks = nn.ModuleList(PictureBlock() for _ in range(LAYERS))
        self.final_layer.linear = nn.Linear(WIDTH, outputs, bias=bias)
        self.final_layer.adaLN_modulation = adaptive(2)

    def forward(self, pictures, c):
        x = self.x_embedder.proj(pictures).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.final_layer.linear(normalized(x) * (1 + scale) + shift)


def keep_positions(model):
    randomize(model)
    for module in model.modules():
        if isinstance(module, PictureTrunk):
            module.pos_embed.data = fixed_positions()


class Denoiser(nn.Module):
    """The EBT: the energy of a picture is the mean over its patches, its condition one learned vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Module()
        self.model.alpha = nn.Parameter(torch.tensor(4.0))
        self.model.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.model.transformer = PictureTrunk(1, bias=False)
        self.model.learned_adaln_condition = nn.Embedding(1, WIDTH)
        keep_positions(self)

    def think(self, noised, clean):
        c = self.model.learned_adaln_condition.weight
        energies = lambda y, step: self.model.transformer(y, c.expand(len(y), -1))[..., 0].mean(1)  # noqa: E731
        loss = lambda y: F.smooth_l1_loss(patches(y), patches(clean), reduction="none").mean(-1)  # noqa: E731
        return descend(energies, noised, self.model.alpha, 2, loss)


class Diffuser(nn.Module):
    """The DiT: noise, and variances besides if `variances`, channel by channel of each pixel of a patch."""

    def __init__(self, variances):
        super().__init__()
        torch.manual_seed(1)
        self.model, self.parts = nn.Module(), 1 + variances
        dit = self.model.diffusion_transformer = PictureTrunk(self.parts * 3 * PATCH**2, bias=True)
        dit.t_embedder = nn.Module()
        dit.t_embedder.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        keep_positions(self)

    def forward(self, pictures, level):
        """The noise of each patch, by place and then channel, [B, GRID^2, 12]."""
        dit = self.model.diffusion_transformer
        angles = level[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        c = dit.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(pictures))
        return dit(pictures, c).unflatten(-1, (PATCH**2, self.parts, 3))[..., 0, :].flatten(-2)


# --- data on both sides ------------------------------------------------------------------------------


def random(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patches(pictures):
    """[B, 3, 6, 6] -> [B, GRID^2, 12], by place in the patch and then channel."""
    grid = pictures.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))  # B, channel, row, y, column, x
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def ours_of(frames):
    """[B, S, channel * place] -> [B, S, place * channel]."""
    return frames.unflatten(-1, (LATENTS, -1)).mT.flatten(-2)


def imported(original, folder, hyper, dtype):
    """The original's weights in our model, through a .ckpt file."""
    convert(save(original, folder / "last.ckpt", hyper), folder / "weights.safetensors")
    recipe = load_recipe(folder / "weights.yaml", ["model.kernels=reference"])
    initialize(recipe.parallel, 0)
    task = Video(recipe, [SIDE**2, LATENTS]) if hyper["modality"] == "VID" else Images(recipe, [GRID**2, 3 * PATCH**2])
    model = build_model(recipe, task).to(dtype)
    set_weights(folder / "weights.safetensors", model, read_weights(folder / "weights.safetensors")[0])
    return model, recipe


def compare_gradients(model, original, recipe, dtype, ours_alone=()):
    expected = convert_weights({k: p.grad for k, p in original.named_parameters() if p.grad is not None}, recipe)
    for name, parameter in model.named_parameters():
        if name in ours_alone:
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


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_denoising(dtype, tmp_path):
    original = Denoiser().to(dtype)
    clean, noised = random(2, 3, 6, 6).to(dtype), random(2, 3, 6, 6, seed=6).to(dtype)
    model, recipe = imported(original, tmp_path, DENOISING, dtype)
    steps = list(original.think(noised, clean))
    sample = Sample(torch.zeros(2, 2, dtype=torch.int64), patches(clean), torch.arange(2),
                    start=patches(noised).transpose(0, 1))  # fmt: skip
    close(compare_thinking(steps, model, recipe, sample, dtype), patches(steps[-1][0].detach()), dtype)
    compare_gradients(model, original, recipe, dtype)
    assert (steps[-1][0] - noised).abs().max() > 0.01, "the picture moves"


@pytest.mark.parametrize("variances", [False, True])
def test_the_dit_beside_it(variances, tmp_path):
    original, dtype = Diffuser(variances).double(), torch.float64
    pictures, noise, level = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=6), torch.tensor([99, 7])
    model, recipe = imported(original, tmp_path, DIT, dtype)
    theirs, conditions = original(pictures, level), torch.stack([level, torch.zeros_like(level)], 1)
    start = patches(pictures).transpose(0, 1)
    close(model.predicted(conditions, start).transpose(0, 1), theirs.detach(), dtype)
    (theirs - patches(noise)).square().mean(-1).sum().backward()
    model(conditions, patches(noise), None, start).sum().backward()
    compare_gradients(model, original, recipe, dtype, ours_alone=("condition.vector",))


def test_settings_of_video_become_a_recipe(tmp_path):
    original = VideoEbt("time_embed")
    hyper = VIDEO | {"ebt_type": "time_embed", "denoising_initial_condition": "most_recent_embedding",
                     "randomize_mcmc_num_steps": 2, "randomize_mcmc_num_steps_min": 2}  # fmt: skip
    described, left_out = convert(save(original, tmp_path / "last.ckpt", hyper), tmp_path / "w.safetensors")
    recipe, t = described.recipe, described.recipe.thinking
    assert (recipe.data.modality, recipe.data.sequence_length, recipe.model.conditioning) == (
        "video", 5, "time_embed_sequence")  # fmt: skip
    assert (t.initial, t.step_size, t.min_steps, t.max_steps) == ("observed", 4.0, STEPS + 1, STEPS + 2)
    assert to_yaml(load_recipe(tmp_path / "w.yaml")) == to_yaml(recipe)
    assert list(left_out) == ["the frozen encoder of frames"]
    weights, metadata = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(weights["step_embedding"][STEPS - 1 :], weights["step_embedding"][-1:].expand(3, -1))
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
    assert described.prepare == "images --height 6 --width 6 --encoder pixels --patch 2 --scale 1"


def test_pictures_from_the_command_line_to_an_evaluation(tmp_path):
    """Of data that were multiplied by the scale they were trained with; others are refused."""
    from data_prep import images
    from ebt_megatron.evaluate import evaluate
    from ebt_megatron.session import open_run
    from tests.data_prep.media import invoke
    from tools.convert import app as convert_app

    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (60, 6, 6, 3), np.uint8))
    for name, more in (("right", ("--scale", 1)), ("wrong", ())):
        done = invoke(images.main, "--input", tmp_path / "a.npz", "--output", tmp_path / name, "--height", 6, "--width",
                      6, "--encoder", "pixels", "--patch", 2, "--validation-fraction", 0.3, *more)  # fmt: skip
        assert done.exit_code == 0, done.output
    weights = tmp_path / "w.safetensors"
    done = CliRunner().invoke(app, [str(save(Denoiser(), tmp_path / "last.ckpt", DENOISING)), "--output", str(weights)])
    assert done.exit_code == 0 and "ebt-prepare images --height 6 --width 6" in done.output

    def make_run(data):
        return CliRunner().invoke(convert_app, [
            "import", str(weights), "--recipe", str(tmp_path / "w.yaml"), "--output", str(tmp_path / "run"),
            f"data.train=[{tmp_path / data}/train]", f"data.validation=[{tmp_path / data}/validation]",
            "training.global_batch_size=4", "training.micro_batch_size=2", "training.validation_samples=4",
        ])  # fmt: skip

    done = make_run("wrong")
    assert done.exit_code != 0 and "latent_scale=1, this run has latent_scale=none" in " ".join(done.output.split())
    done = make_run("right")
    assert done.exit_code == 0, done.output
    with open_run(tmp_path / "run") as opened:
        result = evaluate(opened, steps=2, example=False)
    assert all(math.isfinite(row["loss"]) for row in result["thinking"])


QKV, DOWN = "model.transformer.blocks.1.attn.qkv.bias", "model.encoder_down_projection.bias"


@pytest.mark.parametrize(("original", "hyper", "changes", "message"), [
    (VideoEbt, VIDEO | {"backbone_type": "dinov2"}, {}, "backbone_type=dinov2 is not supported, only vae"),
    (VideoEbt, VIDEO | {"vae_normalization": False}, {}, "vae_normalization=False is not supported"),
    (VideoEbt, VIDEO, {DOWN: None, DOWN.replace("bias", "weight"): None}, "encoder_down_projection.weight is missing"),
    (VideoEbt, VIDEO, {DOWN: torch.zeros(3)}, rf"{DOWN} is \[3\], expected \[32\]"),
    (Denoiser, DENOISING | {"image_task": "t2i"}, {}, "image_task=t2i is not supported, only denoising"),
    (Denoiser, DENOISING, {QKV: None}, f"{QKV} is missing"),
    (Denoiser, DENOISING, {"model.transformer.pos_embed": torch.zeros(1, 9, WIDTH)}, "pos_embed is not the fixed"),
    (Denoiser, DENOISING, {"model.image_encoder.weight": torch.zeros(3)}, "image_encoder.weight is not a weight of"),
    (Denoiser, DENOISING | {"model_name": "unet"}, {}, "model_name=unet is not supported, only ebt and dit"),
    (Denoiser, DENOISING | {"modality": "AUD"}, {}, "modality=AUD is not supported, only NLP and VID and IMG"),
])  # fmt: skip
def test_what_is_not_supported_is_named(original, hyper, changes, message, tmp_path):
    model = original("default") if original is VideoEbt else original()
    path = save(model, tmp_path / "last.ckpt", hyper, **changes)
    with pytest.raises(RecipeError, match=message) as error:
        convert(path, tmp_path / "w.safetensors")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("w.*"))
