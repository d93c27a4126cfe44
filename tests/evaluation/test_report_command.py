"""`ebt-report`: every modality has a report of its own, made from run directories."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from ebt_megatron import evaluate, report
from ebt_megatron.data_prep.images import PictureSource
from ebt_megatron.data_prep.video import VideoSource
from ebt_megatron.evaluation.video_evaluation import evaluated
from ebt_megatron.parallel.setup import shutdown
from ebt_megatron.training.run import Run
from tests.data.test_latents import prepare
from tests.data_prep.media import moving_square, write_videos
from tests.tasks.latents import pictures_recipe, recipe


def saved(made, data, folder, *overrides):
    """A run of random weights."""
    run = Run(
        made(
            f"data.train=[{data}/train]",
            f"data.validation=[{data}/validation]",
            f"training.output_dir={folder}",
            f"name={folder.name}",
            *overrides,
        )
    )
    run.begin()
    assert not (run.write_checkpoint(None) or run.checkpoints.wait())
    run.close()
    shutdown()
    return str(folder)


def reported(tmp_path, *runs):
    result = CliRunner().invoke(report.app, [*runs, "--output", str(tmp_path / "report")])
    return result, {p.name for p in (tmp_path / "report").glob("*")}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("films")
    return prepare(write_videos(folder, 4, 30), folder / "out", VideoSource(frames=6, height=16, width=16))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    np.savez(folder / "a.npz", images=moving_square(40, 16, 16), labels=np.arange(40) % 2)
    return prepare(folder, folder / "out", PictureSource(16, 16))


def test_of_video_it_shows_losses_and_clips(films, tmp_path):
    sizes = ("data.sequence_length=5",)
    runs = [
        saved(recipe, films, tmp_path / "ebt", *sizes),
        saved(recipe, films, tmp_path / "plain", *sizes, "model.architecture=baseline"),
    ]
    result, files = reported(tmp_path, *runs)
    assert result.exit_code == 0, result.output
    assert {"report.html", "report.md", "clips.gif"} <= files
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Held out: validation" in text and "| ebt |" in text and "| plain |" in text
    assert "the last frame again" in text and "after 3 frames" in text
    kept = tmp_path / "ebt" / "evaluation-validation.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"step": 7, "repeat_last_loss": 1e6}))
    assert evaluated(tmp_path / "ebt", "validation", f"{films}/validation")["step"] == 0


def test_of_pictures_it_shows_what_is_denoised_and_what_is_made(pictures, tmp_path):
    denoiser = saved(pictures_recipe, pictures, tmp_path / "denoiser")
    maker = saved(pictures_recipe, pictures, tmp_path / "maker", "thinking.initial=noise", "model.conditioning=none")
    result, _ = reported(tmp_path, denoiser)
    assert result.exit_code == 2 and f"ebt-evaluate {denoiser} --suite" in " ".join(result.output.split())
    done = CliRunner().invoke(evaluate.app, [denoiser, "--suite", "--steps", "2", "training.validation_samples=4"])
    assert done.exit_code == 0, done.output
    result, files = reported(tmp_path, denoiser, maker)
    assert result.exit_code == 0, result.output
    assert {"report.html", "report.md", "made.png", "level-400.png"} <= files


def test_it_is_about_one_modality(films, pictures, tmp_path):
    runs = [
        saved(recipe, films, tmp_path / "ebt", "data.sequence_length=5"),
        saved(pictures_recipe, pictures, tmp_path / "pictures"),
    ]
    result, files = reported(tmp_path, *runs)
    assert result.exit_code == 2 and "a report is about one modality" in result.output and not files
