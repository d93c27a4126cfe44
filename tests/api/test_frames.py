"""`ebt_megatron.load` of films and of pictures: pixels or latents in, the same kind out; one, or a batch."""

import numpy as np
import pytest
import torch

import ebt_megatron as ebt
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.evaluation.pictures import sampled
from ebt_megatron.parallel import setup
from tests import shared_models
from tests.tasks.latents import pictures_recipe, recipe, unless_zero

SIZE = "data.sequence_length=5"
BASELINE = "model.architecture=baseline"
RUNS = {
    "film": (recipe, SIZE),
    "plain film": (recipe, SIZE, BASELINE),
    "denoiser": (pictures_recipe,),
    "DiT": (pictures_recipe, BASELINE),
    "maker": (pictures_recipe, "thinking.initial=noise", "model.conditioning=none"),
    "untold": (pictures_recipe, "thinking.initial=noise", "model.conditioning=none", "images.classes=false"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("runs")
    exact = {"encoder": "pixels"}
    data = {recipe: shared_models.film_shards(folder / "films", **exact)}
    data[pictures_recipe] = shared_models.picture_shards(folder / "pictures", **exact)
    with unless_zero():
        runs = {n: shared_models.untrained(r, data[r], folder / n, *more) for n, (r, *more) in RUNS.items()}
    folders = shared_models.exported(runs, folder / "exported")
    yield {name: ebt.load(path) for name, path in folders.items()}
    setup.shutdown()


def clips(count=3, frames=4):
    x = np.arange(16)
    phase = np.arange(count * frames).reshape(count, frames, 1, 1, 1)
    wave = np.sin((x[:, None, None] + 2 * x[None, :, None]) / 5 + phase / 3 + np.arange(3))
    return ((wave + 1) * 127).astype(np.uint8)


def test_what_is_loaded(models):
    assert repr(models["film"]).startswith("<VideoModel film: EBT of ") and "for video" in repr(models["film"])
    assert repr(models["DiT"]).startswith("<ImageModel DiT: baseline of ") and models["film"].frames == 5


def test_pixels_go_to_latents_and_back(models):
    given = clips()
    latents = models["film"].encode(given)
    assert latents.shape == (3, 4, 4, models["film"].run.task.tokens.channels) and latents.dtype == torch.float32
    assert np.abs(models["film"].decode(latents).astype(int) - given).max() <= 2


@pytest.mark.parametrize("name", ["film", "plain film"])
def test_the_next_frame_is_what_the_model_is_evaluated_by(name, models):
    model = models[name]
    latents = model.encode(clips())
    padded = torch.cat([latents, torch.zeros(3, 2, *latents.shape[2:])], 1)
    made = []
    sample = model.run.task.sample(MicroBatch(torch.arange(3) + (1 << 51), padded), torch.device("cpu"))
    model.run.objective.evaluate(sample, model.steps_of(None), lambda p: made.append(p.y.transpose(0, 1)))
    expected = model.run.task.tokens.join(made[-1])[:, 3]
    assert torch.allclose(model.predict(latents), expected, atol=1e-5)
    if model.thinks:
        assert not torch.allclose(model.predict(latents, steps=5), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["film", "plain film"])
def test_a_clip_goes_on_frame_by_frame_from_what_it_made(name, models):
    model, given = models[name], clips()
    longer = model.rollout(given, 2)
    assert longer.dtype == np.uint8 and longer.shape == (3, 6, 16, 16, 3)
    assert np.abs(longer[:, :4].astype(int) - given).max() <= 2, "what was given"
    latents = model.encode(given)
    several = model.rollout(latents, 2)
    first = model.predict(latents)
    assert torch.allclose(several[:, 4], first) and torch.equal(several[:, :4], latents)
    assert torch.allclose(several[:, 5], model.predict(torch.cat([latents, first[:, None]], 1)), atol=1e-5)
    assert np.array_equal(longer[:, 4], model.decode(first)) and np.array_equal(model.predict(given), longer[:, 4])
    assert np.array_equal(model.rollout(given[1], 2)[:4], longer[1, :4]), "a clip without a batch"
    assert model.predict(given[1]).shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["denoiser", "DiT"])
def test_little_noise_is_taken_off_and_much_is_more(name, models):
    model, given = models[name], clips()[:, 0]
    near, far = (model.denoise(given, level=level) for level in (0, 300))
    assert near.dtype == np.uint8 and near.shape == given.shape
    near_by, far_off = (np.abs(made.astype(float) - given).mean() for made in (near, far))
    assert near_by < 10 < far_off, "untrained: about what was noised comes back"
    latents = model.encode(given)
    assert np.array_equal(model.decode(model.denoise(latents, level=0)), near)
    assert np.array_equal(model.denoise(given[0], level=0), near[0]), "a picture without a batch"


def test_denoising_starts_at_the_noise_trained_with(models):
    for name, level in (("denoiser", 400), ("DiT", models["DiT"].run.task.options.schedule_steps - 1)):
        given = models[name].encode(clips()[:, 0])
        assert torch.equal(models[name].denoise(given), models[name].denoise(given, level=level))
    given = models["denoiser"].encode(clips()[:, 0])
    assert not torch.allclose(*(models["denoiser"].denoise(given, level=99, steps=n) for n in (1, 4)), atol=1e-5)


def test_a_dit_denoises_again_what_it_made(models):
    model, latents, ids = models["DiT"], models["DiT"].encode(clips()[:, 0]), torch.arange(len(clips())) + (1 << 51)
    once, twice = (model.denoise(latents, 50, 3, times=times) for times in (1, 2))
    observed = model.run.task.sample(MicroBatch(ids, latents), torch.device("cpu"), 50).observed
    assert torch.allclose(twice, sampled(model.run, observed, once, ids, 50, 3))
    assert not torch.allclose(twice, once, atol=1e-3)


@pytest.mark.parametrize("name", ["maker", "DiT"])
def test_pictures_are_made_by_class(name, models):
    model = models[name]
    made = model.make([0, 1, 0], steps=3)
    assert made.dtype == np.uint8 and made.shape == (3, 16, 16, 3)
    assert np.array_equal(made[0], model.make([0, 0, 1], steps=3)[0]), "by its place and its class"
    assert not np.array_equal(made, model.make([0, 1, 0], steps=3, guidance=4.0))


def test_a_model_that_is_told_nothing_is_told_how_many(models):
    assert models["untold"].make(2).shape == (2, 16, 16, 3) and models["untold"].make().shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda m: m["film"].predict(clips(frames=6)), "6 frames and 1 to add: the model takes 1 to 5 frames"),
        (lambda m: m["film"].rollout(clips(), 0), "4 frames and 0 to add"),
        (
            lambda m: m["film"].predict(clips()[:, :, :8]),
            "frames are [8, 16, 3], the model's encoder takes [16, 16, 3]",
        ),
        (lambda m: m["film"].predict(torch.zeros(2, 3, 5, 7)), "latents are [5, 7] a frame, the model's are [4, "),
        (lambda m: m["film"].predict(clips()[0, 0]), "is neither one nor a batch of them"),
        (lambda m: m["plain film"].predict(clips(), steps=2), "steps=2: plain film is a baseline, which does not"),
        (lambda m: m["film"].predict(clips(), steps=0), "steps=0: must be at least 1"),
        (lambda m: m["denoiser"].make(2), "denoiser denoises pictures, and makes none: use denoise"),
        (lambda m: m["maker"].denoise(clips()[:, 0]), "maker makes pictures from noise, and does not denoise"),
        (lambda m: m["denoiser"].denoise(clips()[:, 0], level=1000), "level=1000: the model's noise has levels 0 to"),
        (lambda m: m["denoiser"].denoise(clips()[:, 0], times=2), "times=2: at least 1, and of a DiT"),
        (lambda m: m["maker"].make([0, 7]), "told=[0, 7]: maker is told 2 classes, from 0 on"),
        (lambda m: m["maker"].make("a red square"), "told='a red square': maker is told no captions"),
        (lambda m: m["untold"].make([0, 1]), "told=[0, 1]: untold is told nothing: give how many"),
        (lambda m: m["untold"].make(0), "told=0: untold is told nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, line, models):
    with pytest.raises((ebt.RecipeError, ebt.DataError)) as error:
        call(models)
    assert line in str(error.value) and "\n" not in str(error.value)
