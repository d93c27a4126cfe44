"""The suite of pictures: features are what the networks compute; probes and detectors find what is there."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebt_megatron.config import RecipeError
from ebt_megatron.data.captions import NOT_TOLD
from ebt_megatron.data.decoder import Decoder
from ebt_megatron.evaluation import ood_detection, picture_report, picture_suite, probe
from ebt_megatron.evaluation.interface import SuiteOptions
from tests import builders
from tests.tasks import latents

KINDS = {"EBT": ("model.conditioning=none",), "DiT": ("model.architecture=baseline",)}


def loader(count, labels=None):
    """What a probe needs of one: pictures whose class shifts their numbers, or has nothing to do with them."""
    batch = latents.pictures(count)
    if labels is None:
        batch.samples = batch.samples + 2 * batch.beside["labels"][:, None, None]
    else:
        batch.beside["labels"] = labels
    batch.counts = torch.ones(count, dtype=torch.bool)
    manifest = SimpleNamespace(classes=["a", "b", "c"])
    return SimpleNamespace(
        blend=range(count),
        validation_samples=min(count, 16),
        read=lambda at: batch.part(0, len(at)),
        sources=[SimpleNamespace(manifest=manifest)],
    )


def opened(kind, *overrides):
    """A run of a small random model."""
    recipe = latents.pictures_recipe(*KINDS[kind], *overrides)
    task = latents.task(recipe)
    scale = 20 * torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    task.decoder = Decoder(scale, torch.full((48,), 128.0), 8, 8, 4)
    model = builders.build(recipe, torch.float32, task)
    return SimpleNamespace(
        recipe=recipe,
        task=task,
        model=model,
        state=builders.state(recipe),
        objective=builders.objective(model, recipe, task),
        data={"train": loader(200), "validation": loader(60)},
    )


@pytest.mark.parametrize("told", [(), latents.CAPTIONS], ids=["classes", "captions"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_means_of_what_layers_put_out(kind, told):
    run, batch = opened(kind, *told), latents.pictures(4)
    unconditional = replace(
        batch,
        beside={
            "labels": torch.full((4,), run.task.classes),
            "captions": torch.full_like(batch.beside["captions"], NOT_TOLD),
        },
        counts=torch.ones(4, dtype=torch.bool),
    )
    seen = []
    hooks = [layer.register_forward_hook(lambda m, given, out: seen.append(out)) for layer in run.model.layers]
    run.objective.evaluate(run.task.sample(unconditional, torch.device("cpu"), 50), 1)
    for hook in hooks:
        hook.remove()
    found = probe.features(run.task, run.model, batch, 50)
    assert found.shape == (2, 4, 32) and not torch.allclose(found[0], found[1], atol=1e-3)
    assert torch.allclose(found, torch.stack(seen).mean(1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_finds_classes_where_there_are_any(kind):
    run = opened(kind)
    found = probe.probe(run, [0, 99], training=200, test=60)
    assert min(found[key] for key in ("features", "last layer", "untrained", "numbers")) > 0.8
    assert found["layer"] in (1, 2) and found["level"] in (0, 99)
    shuffled = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 200))
    run.data = {"train": loader(200, shuffled), "validation": loader(60, shuffled[:60])}
    assert probe.probe(run, [0], 200, 60)["features"] < 0.6


def test_what_is_told_from_pixels_is_told():
    decoder = Decoder(torch.eye(48), torch.zeros(48), 8, 8, 4)
    flat, noisy = torch.full((1, 4, 48), 100.0), 100 + 50 * torch.randn(1, 4, 48)
    even, uneven = (ood_detection.plain_scores(decoder, t) for t in (flat, noisy))
    assert even == {"mean pixel": 100, "variance of pixels": 0, "difference of neighbours": 0}
    assert uneven["variance of pixels"] == pytest.approx(2500, rel=0.3) and uneven["difference of neighbours"] > 40


def test_energies_are_those_of_the_picture_and_of_where_thinking_ends():
    run, batch = opened("EBT", "images.classes=false"), latents.pictures(3)
    scores = ood_detection.model_scores(run, batch, [50])
    sample = run.task.sample(batch, torch.device("cpu"), 50)

    def energy(pictures):
        _, modulations = run.model.context(run.model.modality.context(sample.observed), 4, None)
        return run.model.predict(run.model.modality(pictures), modulations, 4, None, 0, False).sum(0)

    states = []
    run.objective.evaluate(sample, 3, lambda prediction: states.append(prediction.y.transpose(0, 1)))
    with torch.no_grad():
        first, last = energy(sample.start.transpose(0, 1)), energy(states[-1])
        assert torch.allclose(scores["energy of the picture"], energy(batch.samples), atol=1e-5)
    assert torch.allclose(scores["final energy, level 50"], last, atol=1e-5)
    assert torch.allclose(scores["energy drop, level 50"], first - last, atol=1e-5)


@pytest.mark.parametrize("learned", ["false", "true"])
def test_a_dits_score_is_its_loss_of_the_noise(learned):
    run = opened("DiT", "images.classes=false", f"images.learn_sigma={learned}")
    batch = latents.pictures(3)
    sample = run.task.sample(batch, torch.device("cpu"), 50)
    with torch.no_grad():
        noise = run.model.predicted(sample.observed, sample.start)[..., :2].transpose(0, 1)
    expected = (noise - sample.targets).square().mean((1, 2))
    assert torch.allclose(ood_detection.model_scores(run, batch, [50])["denoising loss, level 50"], expected, atol=1e-6)


def test_strangers_are_told_by_what_is_strange_in_them():
    run, own, others = opened("EBT"), latents.pictures(50), latents.pictures(50, first=50)
    alike = ood_detection.ood_detection(run, own, others, [50, 99])
    others.samples = 4 * others.samples
    different = ood_detection.ood_detection(run, own, others, [50, 99])
    assert alike.keys() == different.keys() and all(0.3 < value < 0.7 for value in alike.values())
    error = "reconstruction error, level 99"
    assert different["variance of pixels"] > 0.95 and different[error] > alike[error] + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_suite_has_all_parts_and_shows_them(kind, monkeypatch, tmp_path):
    run = opened(kind, "images.lowest_level=0", "images.highest_level=30")

    @contextmanager
    def open_run(*given):
        yield run

    monkeypatch.setattr(picture_suite, "open_run", open_run)
    monkeypatch.setattr(picture_suite, "_others", lambda run, folder: latents.pictures(20, first=99))
    numbers = picture_suite.evaluate_pictures(tmp_path, [], SuiteOptions(steps=5, shifts={"tiles": "somewhere"}))
    assert list(numbers["denoising"]) == ["30", "61"]
    taken = [row["passes"] for row in numbers["denoising"]["61"]["passes"]]
    assert taken == ([1, 2, 3, 4, 5] if kind == "EBT" else [1, 2, 3, 5])
    every, best = (picture_report.tables({kind: numbers}, every=every) for every in (True, False))
    assert [table.title.partition(":")[0] for table in every] == [
        "Denoising held-out pictures from level 30",
        "Denoising held-out pictures from level 61",
        "Linear probe",
        "Telling tiles from held-out pictures",
    ]
    assert [row[1] for row in every[0].rows] == ["-", *map(str, taken)]
    assert {row[1] for row in best[0].rows} >= {"-", "1", "3", str(max(taken))} - ({"3"} if kind == "DiT" else set())
    assert len(picture_report.curves({kind: numbers}).axes) == 4
    with pytest.raises(RecipeError, match="--baseline is for text"):
        picture_suite.evaluate_pictures(tmp_path, [], SuiteOptions(baselines=[tmp_path]))
