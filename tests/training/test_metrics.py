"""A run's metrics, by each writer that a recipe can ask for."""

import json
import sys
import time
import types

import pytest

from ebt_megatron.config import RecipeError, load_recipe, to_yaml
from ebt_megatron.training.metrics import MetricsWriter, require_writers

ROW = {"loss": 2.5, "energy_first": None, "phase_seconds": {"data": 0.25}, "bad_steps": 0}
SCALARS = {"loss": 2.5, "phase_seconds/data": 0.25, "bad_steps": 0}


@pytest.fixture
def run(tmp_path):
    """A run's folder."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_recipe(None, ["name=mine", "model.size=xs"])))
    return tmp_path


def written(run, kinds, first_step=0, last_step=3):
    writer = MetricsWriter(run, first_step, print, kinds)
    for step in range(first_step + 1, last_step + 1):
        writer.write({"step": step, **ROW})
    writer.close()


def test_only_what_was_asked_for_is_written(run):
    written(run, ["jsonl"])
    assert {p.name for p in run.iterdir()} == {"recipe.yaml", "metrics.jsonl"}


def test_jsonl_drops_what_a_resumed_run_does_again(run):
    written(run, ["jsonl"])
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "los')  # killed while writing
    written(run, ["jsonl"], first_step=2, last_step=5)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, **ROW} for step in range(1, 6)]


def test_numbers_that_json_has_not_are_null(run):
    writer = MetricsWriter(run, 0, print, ["jsonl"])
    writer.write(
        {"step": 1, "loss": float("nan"), "step_losses": [1.0, float("inf")], "phase_seconds": {"data": -1e999}}
    )
    writer.close()
    line = (run / "metrics.jsonl").read_text()
    refused = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    assert json.loads(line, parse_constant=refused) == {
        "step": 1,
        "loss": None,
        "step_losses": [1.0, None],
        "phase_seconds": {"data": None},
    }


def test_tensorboard_has_every_number(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(run, ["tensorboard"])
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(SCALARS)
    assert [(e.step, e.value) for e in board.Scalars("phase_seconds/data")] == [(s, 0.25) for s in (1, 2, 3)]


def test_wandb_is_one_run_for_a_folder_and_gets_every_number(run, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append(("define", name, step_metric)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish",)),
    )
    started = []
    module = types.ModuleType("wandb")
    module.init = lambda **given: started.append(given) or fake
    monkeypatch.setitem(sys.modules, "wandb", module)
    written(run, ["wandb"], 0, 1)
    written(run, ["wandb"], 1, 2)
    assert started[0] == started[1]
    assert started[0]["name"] == "mine" and started[0]["config"]["model"]["size"] == "xs"
    assert calls[:3] == [("define", "*", "step"), ("log", {"step": 1, **SCALARS}), ("finish",)]


def test_wandb_that_cannot_start_is_one_line(run, monkeypatch):
    module = types.ModuleType("wandb")
    module.init = lambda **given: (_ for _ in ()).throw(RuntimeError("no key\nlog in"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(RecipeError, match=r"wandb cannot start \(no key log in\): set WANDB_MODE=offline"):
        MetricsWriter(run, 0, print, ["wandb"])


def test_wandb_offline(run, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)
    written(run, ["wandb"])
    (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # its own process writes, after finish() has returned
    while b"phase_seconds" not in record.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_missing_package_is_said_before_work_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_writers(["jsonl", "tensorboard"])
    with pytest.raises(RecipeError, match="pip install wandb"):
        require_writers(["jsonl", "wandb"])
