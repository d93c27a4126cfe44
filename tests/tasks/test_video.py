"""Video: exact gradients in every mode, the same losses on every layout, and what validation says of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.decoder import Decoder
from ebt_megatron.data_prep.encoders import new_encoder
from ebt_megatron.objectives.validation import validate
from ebt_megatron.tasks.frames import FrameTokens
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.video import Video, VideoMeter
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.cases import slow
from tests.distributed_utils import run_ranks
from tests.tasks import latents

MODES = {
    "S1": (Plan((0.5, 0.5), "detached"), ("thinking.initial=observed",)),
    "S2": (
        Plan((0, 0, 1.0), "detached"),
        ("thinking.langevin_noise=0.5", "thinking.step_size_scale=2", "model.conditioning=none"),
    ),
    "S2, noise on the embedding": (
        Plan((0, 0, 1.0), "detached"),
        ("thinking.langevin_noise=0.5", "thinking.langevin_on=embedding", "model.conditioning=none"),
    ),
    "full, noise on the embedding": (
        Plan((0.2, 0.3, 0.5), "full"),
        ("thinking.langevin_noise=0.5", "thinking.langevin_on=embedding"),
    ),
    "full": (Plan((0.2, 0.3, 0.5), "full"), ("thinking.langevin_noise=0.5", "thinking.step_size_scale=2")),
    "truncated": (Plan((0.2, 0.3, 0.5), "truncated"), ("thinking.step_size_scale=2",)),
    "reuse": (Plan((0.5, 0.5), "detached"), ("thinking.reuse=true", "thinking.step_size_scale=2")),
    "from the context": (
        Plan((0.2, 0.3), "detached", 0.5),
        ("thinking.initial=context", "thinking.reuse=true"),
    ),
    "from the context, full, changes": (
        Plan((0.2, 0.3), "full", 0.5),
        ("thinking.initial=context", "video.predicts=change"),
    ),
    "from the context, truncated": (
        Plan((0.2, 0.3), "truncated", 0.5),
        (
            "thinking.initial=context",
            "video.tokens_per_side=2",
            "thinking.langevin_noise=0.5",
        ),
    ),
    "2 x 2 tokens": (
        Plan((0.5, 0.5), "detached"),
        ("video.tokens_per_side=2", "thinking.initial=observed", "thinking.step_size_scale=2"),
    ),
    "2 x 2 tokens, full": (Plan((0.2, 0.3, 0.5), "full"), ("video.tokens_per_side=2", "thinking.langevin_noise=0.5")),
    "2 x 2 tokens, reuse": (Plan((0.5, 0.5), "detached"), ("video.tokens_per_side=2", "thinking.reuse=true")),
}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_double_backward(mode):
    plan, overrides = MODES[mode]
    recipe = latents.recipe(*overrides)
    batch = latents.sample(recipe, latents.clips(2))
    runs = []
    for engine in (builders.double_backward, builders.dual_stream):
        model = builders.build(recipe, task=latents.task(recipe))
        runs.append((engine(model, recipe, batch, plan), builders.gradients(model)))
    (expected, reference), (thought, ours) = runs
    assert builders.relative_error(thought.losses, expected.losses) < 1e-12
    for name, gradient in reference.items():
        assert gradient.abs().max() > 0, name
        assert builders.relative_error(ours[name], gradient) < 1e-10, name


def test_a_token_is_a_square_of_patches():
    frames = torch.arange(2 * 3 * 24 * 2).view(2, 3, 24, 2)  # of 4 x 6 patches
    tokens = FrameTokens(4, 6, 2, 2)
    split = tokens.split(frames)
    assert split.shape == (2, 12, tokens.size) and torch.equal(tokens.join(split), frames)
    second = frames[1, 2].view(4, 6, 2)[:2, 3:]  # the upper right
    assert torch.equal(split[1, 9], second.flatten())
    assert torch.equal(FrameTokens(4, 6, 2).split(frames), frames.flatten(2))


def test_tokens_of_a_frame_see_it_whole_and_no_later_one():
    recipe = latents.recipe("video.tokens_per_side=2", "model.conditioning=none")
    model = builders.build(recipe, task=latents.task(recipe))
    batch = latents.sample(recipe, latents.clips(1))
    observed = batch.observed.requires_grad_()
    context = model.modality.context(observed)
    _, key_values = model.context(context, context.shape[0], None)
    x = model.modality.prediction(batch.targets, batch.sample_ids, recipe.thinking, 0).embed()
    energies = model.predict(x, key_values, len(x), None, 0, tangent=False)
    (seen,) = torch.autograd.grad(energies[9, 0], observed)  # the second token of the third frame
    assert seen.any(-1)[0].tolist() == [True] * 12 + [False] * 12


def test_a_transformer_of_changes_starts_at_the_last_frame():
    recipe = latents.recipe("model.architecture=baseline", "video.predicts=change")
    model = builders.build(recipe, task=latents.task(recipe))
    batch = latents.sample(recipe, latents.clips(2))
    torch.nn.init.zeros_(model.output.weight), torch.nn.init.zeros_(model.output.bias)
    losses = model(batch.observed, batch.targets, None, batch.start)
    expected = F.smooth_l1_loss(batch.observed, batch.targets, reduction="none").mean(-1).T
    assert torch.allclose(losses, expected)


def test_one_map_reads_observed_and_predicted_frames():
    recipe = latents.recipe()
    model = builders.build(recipe, task=latents.task(recipe))
    assert [n for n, _ in model.modality.named_parameters()] == ["weight", "bias"]
    batch = latents.sample(recipe, latents.clips(2))
    prediction = model.modality.prediction(
        batch.observed, batch.sample_ids, recipe.thinking, 0, batch.observed.transpose(0, 1)
    )
    assert torch.allclose(prediction.embed(), model.modality.context(batch.observed))


def test_where_predictions_start():
    recipe = latents.recipe()
    model, batch = builders.build(recipe, task=latents.task(recipe)), latents.sample(recipe, latents.clips(2))

    def start(*overrides):
        recipe = latents.recipe(*overrides)
        batch = latents.sample(recipe, latents.clips(2))
        return builders.new_descent(model, recipe, batch).prediction.y

    assert torch.equal(start("thinking.initial=observed").transpose(0, 1), batch.observed)
    assert not start().any()
    assert start("thinking.initial=noise", "thinking.initial_std=2").std() == pytest.approx(2, rel=0.2)
    noisy = latents.recipe("thinking.initial=noise", "thinking.initial_std=2")
    fresh = builders.new_descent(model, noisy, batch).prediction.y.clone()
    batch.start = torch.cat([torch.full_like(fresh[:, :1], torch.nan), fresh[:, 1:] + 5], 1)
    replayed = builders.new_descent(model, noisy, batch).prediction.y
    assert torch.equal(replayed[:, :1], fresh[:, :1]) and torch.equal(replayed[:, 1:], fresh[:, 1:] + 5)


RECIPES = {
    "S1": ("thinking.max_steps=2", "thinking.initial=observed"),
    "S2": (
        "thinking.loss=last",
        "thinking.learn_step_size=false",
        "thinking.step_size_scale=2",
        "thinking.langevin_noise=0.5",
        "thinking.initial_std=1",
        "thinking.replay.enabled=true",
        "model.conditioning=none",
    ),
    "2 x 2 tokens": ("thinking.max_steps=2", "video.tokens_per_side=2"),
    "from the context": (
        "thinking.max_steps=2",
        "thinking.initial=context",
        "video.predicts=change",
    ),
    "Transformer++": ("model.architecture=baseline",),
    "Transformer++ of changes": ("model.architecture=baseline", "video.predicts=change", "video.tokens_per_side=2"),
}


@pytest.fixture(scope="module")
def single():
    return latents.several(RECIPES, (), latents.clips)


@pytest.mark.parametrize("layout", ["TP 2 + SP", "PP 2", slow("DP 2")])
def test_losses_do_not_depend_on_the_layout(layout, single):
    ranks = run_ranks(latents.several, 2, RECIPES, latents.LAYOUTS[layout], latents.clips)
    for name, losses in single.items():
        assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
        assert ranks[0][name] == pytest.approx(losses, rel=1e-5), name


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_validation_knows_losses_by_position_and_simple_predictors(architecture, side):
    recipe = latents.recipe(f"model.architecture={architecture}", f"video.tokens_per_side={side}")
    task = latents.task(recipe)
    task.decoder = Decoder(50 * torch.eye(2), torch.full((2,), 128.0), 2, 2, 1)
    model = builders.build(recipe, torch.float32, task)
    objective = builders.objective(model, recipe, task)
    batch = latents.clips(4)
    batch.counts = torch.tensor([True, True, True, False])
    result = validate(objective, [batch], 3)
    measures, frames = result.measures, batch.samples[:3].flatten(2)
    by_position = measures["loss_by_position"]
    steps = 3 if architecture == "ebt" else 1
    assert [sum(row) / len(row) for row in by_position["steps"]][:steps] == pytest.approx(
        result.losses.tolist(), rel=1e-5
    )
    repeated = F.smooth_l1_loss(frames[:, :-1], frames[:, 1:])
    assert measures["repeat_last_loss"] == pytest.approx(repeated.item())
    straight = 2 * frames[:, 1:-1] - frames[:, :-2]
    expected = F.smooth_l1_loss(straight, frames[:, 2:], reduction="none").mean((0, 2))
    assert by_position["extrapolation"][1:] == pytest.approx(expected.tolist(), rel=1e-5)
    assert len(measures["psnr"]) == 3 and measures["psnr"][0] > 0


def test_a_frame_repeated_exactly_has_no_error():
    meter = VideoMeter(1, 4, FrameTokens(1, 2, 3), None, torch.device("cpu"))
    still = torch.randn(2, 1, 6).expand(2, 5, 6)
    meter.watch(Sample(still[:, :-1], still[:, 1:], torch.arange(2)), torch.tensor([True, True]))
    assert meter.results(8, True)["repeat_last_loss"] == 0


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (
            "thinking.regenerate=4",
            "thinking.regenerate is about text, data.modality is video: set thinking.regenerate=0",
        ),
        ("thinking.logits_dtype=bfloat16", "set thinking.logits_dtype=float32"),
        ("video.tokens_per_side=3", "video.tokens_per_side=3 does not divide frames of 2 x 2 patches"),
        ("video.tokens_per_side=2 model.conditioning=time_embed_sequence", "set video.tokens_per_side=1"),
        ("video.output_maps=2", "video.output_maps=2 is about Transformer"),
        ("video.map_biases=false", "video.map_biases=False is about Transformer"),
    ],
)
def test_what_does_not_do_is_refused(override, why):
    with pytest.raises(RecipeError, match=why):
        latents.task(latents.recipe(*override.split()))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"mean": None, "std": None}, "manifest.json does not say mean, std of its encoder: prepare the data again"),
        ({"patch": 0}, "says patch 0 of its encoder, which is no size"),
        ({"height": 32}, "has samples of 4 patches, and its encoder makes 4 x 2 of a frame"),
    ],
)
def test_a_manifest_that_does_not_say_what_its_latents_are_is_refused(changed, why):
    encoder = {"sha256": "0", "height": 16, "width": 16, "patch": 8, "mean": [0.0], "std": [1.0]} | changed
    told = {key: value for key, value in encoder.items() if value is not None}
    source = SimpleNamespace(folder="films", manifest=SimpleNamespace(encoder=told, shape=[7, 4, 2]))
    with pytest.raises(DataError, match=why):
        Video.from_data(latents.recipe(), source)


def test_an_encoder_without_its_statistics_is_refused(tmp_path):
    np.savez(tmp_path / "encoder.npz", settings=json.dumps({"kind": "pixels"}))
    with pytest.raises(DataError, match="does not say what samples were normalised by"):
        Decoder.read(tmp_path / "encoder.npz")


def test_a_decoder_gives_the_frames_of_its_encoder(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    for kind in ("pixels", "pca"):
        encoder = new_encoder(kind, 16, 24, 4)
        if not encoder.fitted:
            encoder.fit(frames)
        encoder.normalise_by(np.full(encoder.channels, 0.1), np.full(encoder.channels, 0.5))
        encoder.save(tmp_path / "encoder.npz")
        samples = encoder.to_samples(encoder.encode(frames))
        shown = Decoder.read(tmp_path / "encoder.npz").pictures(torch.from_numpy(samples.astype(np.float32)))
        assert np.abs(shown.numpy() - encoder.to_frames(samples)).max() <= 0.51  # it rounds
