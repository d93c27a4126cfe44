"""docs/extending.md: a modality is one module and one recipe; it trains, resumes and is evaluated."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.functional import smooth_l1_loss
from typer.testing import CliRunner

from ebt_megatron.config import load_recipe
from ebt_megatron.core.own_modules import look_in
from ebt_megatron.data.loader import Loader
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.evaluate import app as evaluate_app
from ebt_megatron.evaluation.evaluate import evaluate
from ebt_megatron.parallel.setup import shutdown
from ebt_megatron.session import open_run
from ebt_megatron.tools.shards import app
from ebt_megatron.train import app as train_app
from ebt_megatron.training.hooks import train_to_end
from ebt_megatron.training.run import Run
from examples.points.points import write_points

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "points"
DOCUMENT = ROOT / "docs" / "extending.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")
    write_points(folder / "train", 960, 12, seed=0)
    write_points(folder / "validation", 32, 12, seed=1)
    return folder


def train(data, output, *overrides):
    recipe = load_recipe(
        HERE / "points.yaml",
        [
            f"data.train=[{data}/train]",
            f"data.validation=[{data}/validation]",
            f"training.output_dir={output}",
            *overrides,
        ],
    )
    run = Run(recipe)
    train_to_end(run)
    shutdown()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def repeated(data):
    """The loss of repeating the last point."""
    points = next(
        iter(Loader(load_recipe(HERE / "points.yaml", [f"data.train=[{data}/train]"]), "train", 0, 1))
    ).samples
    return smooth_l1_loss(points[:, :-1], points[:, 1:]).item()


@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_it_trains_and_is_evaluated(architecture, data, tmp_path):
    halfway, end = train(data, tmp_path, f"model.architecture={architecture}")
    assert end < halfway and end < 0.8 * repeated(data)
    with open_run(tmp_path) as run:
        row = evaluate(run)["thinking"][1 if architecture == "ebt" else 0]
    assert row["loss"] == pytest.approx(end, rel=1e-5) and row["distance"] == pytest.approx(2 * row["loss"] ** 0.5)


def test_a_module_beside_the_recipe_is_found_by_every_command_from_any_folder(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "melody.py").write_text((HERE / "points.py").read_text().replace("examples.points.points", "melody"))
    recipe = (HERE / "points.yaml").read_text().replace("examples.points.points", "melody")
    (project / "melody.yaml").write_text(recipe)

    def forget():
        monkeypatch.setattr(
            sys, "path", [folder for folder in sys.path if folder not in map(str, (project, elsewhere))]
        )
        sys.modules.pop("melody", None)
        importlib.invalidate_caches()

    forget()
    monkeypatch.chdir(project)  # where data are prepared, and looked at
    assert CliRunner().invoke(app, ["verify", str(project)]).exit_code == 2, "there is nothing"
    look_in(project)
    importlib.import_module("melody").write_points(project / "data", 64, 12, seed=0)
    forget()
    assert CliRunner().invoke(app, ["verify", "data"]).exit_code == 0
    forget()
    monkeypatch.chdir(elsewhere)
    data = f"data.train=[{project}/data]", f"data.validation=[{project}/data]"
    few = "training.steps=2", "training.save_interval=2", "training.validation_interval=2", "training.output_dir=run"
    done = CliRunner().invoke(train_app, [str(project / "melody.yaml"), *data, *few])
    assert done.exit_code == 0, done.output
    forget()
    done = CliRunner().invoke(evaluate_app, ["run"])
    assert done.exit_code == 0 and "distance" in done.output, done.output
    forget()


def test_it_goes_on_where_it_stopped(data, tmp_path):
    whole = train(data, tmp_path / "whole")[-1]
    train(data, tmp_path / "halves", "training.steps=60", "optimizer.decay_steps=120")
    assert [p.name for p in (tmp_path / "halves" / "checkpoints").glob("step-*")] == ["step-00000060"]
    assert train(data, tmp_path / "halves")[-1] == whole


def test_its_kind_of_sample_is_a_kind_like_any_other(data, capsys):
    folder = str(data / "train")
    for command in ("verify", "stats", "sample"):
        assert CliRunner().invoke(app, [command, folder]).exit_code == 0
    manifest = read_manifest(folder)
    (data / "lines").mkdir()
    replace(manifest, kind="examples.points.points:LINES").write(data / "lines")
    refused = CliRunner().invoke(app, ["verify", str(data / "lines")])
    assert refused.exit_code == 2 and "there is no kind of sample 'examples.points.points:LINES'" in refused.output


@pytest.mark.parametrize("name", ["points.py", "points.yaml"])
def test_the_document_shows_these_files(name):
    assert (HERE / name).read_text().strip() in DOCUMENT.read_text()
