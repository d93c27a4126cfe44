"""What says whether a made picture shows its caption."""

import numpy as np
import pytest

from benchmarks import captions as captions_benchmark
from benchmarks.captions import Captions


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Of pictures whose class is which of ten rows is bright, as bright as chance has it."""
    monkeypatch.setattr(captions_benchmark, "FITTED", 400)
    monkeypatch.setattr(captions_benchmark, "HELD_OUT", 100)
    draw = np.random.default_rng(1)
    labels = np.arange(500) % 10
    images = draw.integers(0, 40, (500, 10, 10)).astype(np.uint8)
    images[np.arange(500), labels] += draw.integers(100, 200, (500, 1)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    return Captions(tmp_path, 400, tmp_path / "a.npz"), images, labels


def test_real_pictures_show_their_class_and_vary_as_they_do(study):
    study, images, labels = study
    judge = study.judge
    assert judge.real > 0.95
    real = np.stack([images[labels == label][:32] for label in range(10)])[..., None].repeat(3, -1)
    said = judge.of(real)
    assert said["shown"] > 0.95 and said["variety"] == pytest.approx(1, rel=0.1)


def test_a_mean_shows_its_class_and_has_no_variety_and_another_class_is_not_shown(study, monkeypatch):
    study, images, labels = study
    judge = study.judge
    means = np.stack([np.repeat(images[labels == label].mean(0)[None], 8, 0) for label in range(10)])[..., None]
    assert judge.of(means) == pytest.approx({"shown": 1, "variety": 0}, abs=1e-9)
    assert judge.of(means[::-1])["shown"] == 0
    run = {"said": {"0": judge.of(means)}, "made": means.repeat(3, -1)}
    monkeypatch.setattr(study, "run", lambda recipe: run)
    monkeypatch.setattr(study, "flops", lambda recipe: 1.0)
    text = study.markdown(study.results(["EBT"], 2))
    assert "| EBT | 400 | 3 | 0 | 100.0 ± 0.0 | 0.0 ± 0.0 |" in text and "classifier" in text
    assert study.plot({}).startswith(b"\x89PNG")
