"""`ebt-report`: every modality has a report of its own, made from run directories."""

import json
import re

import pytest
from typer.testing import CliRunner

from ebt_megatron import evaluate, report
from ebt_megatron.evaluation.video_evaluation import evaluated
from tests import shared_models
from tests.tasks.latents import pictures_recipe, recipe


def saved(*given):
    return str(shared_models.untrained(*given))


def reported(tmp_path, *runs):
    result = CliRunner().invoke(report.app, [*runs, "--output", str(tmp_path / "report")])
    return result, {p.name for p in (tmp_path / "report").glob("*")}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    pytest.importorskip("av")
    return shared_models.film_shards(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return shared_models.picture_shards(tmp_path_factory.mktemp("pictures"))


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
    assert re.search(r"\| the last frame again \| - \| [\d.]+ \| \+0.0 % \| [\d.]+ \|", text), "with its PSNR"
    assert "after 3 frames" in text
    assert "Where this comes from" in text and "trained by" in text
    kept = tmp_path / "ebt" / "evaluation-validation.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"step": 7, "repeat_last_loss": 1e6}))
    assert evaluated(tmp_path / "ebt", "validation", f"{films}/validation")["step"] == 0


def test_the_terminal_shows_what_learns_nothing_beside_the_losses(films, tmp_path):
    run = saved(recipe, films, tmp_path / "ebt", "data.sequence_length=5")
    done = CliRunner().invoke(evaluate.app, [run, "--steps", "2", "training.validation_samples=4"])
    numbers = json.loads((tmp_path / "ebt" / "evaluation.json").read_text())
    rows = [
        f"  {r['steps']} steps: loss {r['loss']:.4f}, energy {r['energy']:.4f}, PSNR {r['psnr']:.2f} dB"
        for r in numbers["thinking"]
    ]
    said = done.output.splitlines()
    assert all(line.startswith(row) for line, row in zip(said, rows, strict=False))  # how it descends comes after
    assert said[len(rows) :] == [
        f"the last frame again: loss {numbers['repeat_last_loss']:.4f}, PSNR {numbers['repeat_last_psnr']:.2f} dB",
        f"extrapolation: loss {numbers['extrapolation_loss']:.4f}, PSNR {numbers['extrapolation_psnr']:.2f} dB",
    ]


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
