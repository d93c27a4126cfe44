"""A study's plan becomes runs, and rows of runs become fits and ratios."""

import json

import numpy as np
import pytest
import yaml

from benchmarks import scaling
from benchmarks.fits import Law
from benchmarks.scaling import Plan, Scaling, fitted
from ebt_megatron.config import RecipeError, load_recipe

STUDY = {
    "name": "s",
    "axis": "data",
    "values": [1e5, 2e5, 4e5, 8e5],
    "seeds": 2,
    "data": "d",
    "models": {"EBT": {"recipe": "text/quickstart_context"}, "T": {"recipe": "text/quickstart_transformer"}},
    "baseline": "T",
}


def plan(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (STUDY | changes).items() if value is not None}))
    return Plan.read(path)


@pytest.mark.parametrize(
    ("axis", "values", "wanted"),
    [
        ("data", [1e5, 2e5, 4e5, 8.192e5], {"training.steps": 800}),
        ("width", [32, 64, 96, 192], {"model.hidden_size": 192, "model.num_attention_heads": 4, "optimizer.lr": 0.5}),
        ("depth", [1, 2, 3, 6], {"model.num_layers": 6, "training.steps": 800}),
        ("batch", [2, 4, 8, 32], {"training.global_batch_size": 32, "training.steps": 200, "optimizer.lr": 2.0}),
        ("epochs", [1, 2, 4, 8], {"data.unique_samples": 6400, "training.steps": 6400}),
    ],
)
def test_a_value_of_an_axis_is_a_recipe(axis, values, wanted, tmp_path):
    study = Scaling(plan(tmp_path, axis=axis, values=values, tokens=None if axis == "data" else 819200), tmp_path)
    recipe = study.recipe(scaling.label("T", values[-1]), 0)
    for key, value in wanted.items():
        section, name = key.split(".")
        found = getattr(getattr(recipe, section), name)
        base = load_recipe("text/quickstart_transformer", []).optimizer.lr if key == "optimizer.lr" else 1
        assert found == pytest.approx(value * base, rel=1e-3), key


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"axis": "heads"}, "axis=heads: choose one of data, width"),
        ({"values": [1e5, 2e5]}, "need four at least"),
        ({"values": [4, 3, 2, 1]}, "give them rising"),
        ({"baseline": "x"}, "choose one of EBT, T"),
        ({"axis": "depth"}, "needs tokens"),
        ({"budget": 3}, "is no study"),
    ],
)
def test_what_is_no_study_is_refused(change, line, tmp_path):
    with pytest.raises(RecipeError, match=line):
        plan(tmp_path, **change)


LAWS = {"T": Law(2.0, (1.7,), (0.35,)), "EBT": Law(2.0, (1.8,), (0.5,))}


def rows(noise=0.0):
    draw, out = np.random.default_rng(0), []
    for model, law in LAWS.items():
        for x in np.geomspace(1e5, 6.4e6, 7).repeat(3):
            loss = float(law(np.array([x / 1e5]))[0] * np.exp(draw.normal(0, noise)))
            out.append({"model": model, "value": x, "x": x, "loss": loss})
    return out


def test_fits_ratios_and_the_largest_run_predicted():
    found = fitted(rows(0.002), "T")
    assert found["fits"]["T"]["exponent"] == pytest.approx(0.35, rel=0.1)
    assert found["fits"]["EBT"]["predicted"] == pytest.approx(found["fits"]["EBT"]["held out"], abs=0.02)
    shared = found["ratios"]["EBT"]["shared"]
    assert shared["low"] < 0.5 / 0.35 < shared["high"] and shared["low"] > 1


def test_a_study_ended_in_between_comes_to_the_same_and_repeats_nothing(tmp_path, monkeypatch):
    done, broken = {}, {"after": 5}

    def train(recipe):
        folder = recipe.training.output_dir
        if folder not in done:
            if len(done) == broken["after"]:
                broken["after"] = -1
                raise KeyboardInterrupt
            done[folder] = 2.0 + 1.7 * recipe.training.steps**-0.35 + recipe.training.seed % 2 / 1e3
        row = {"steps": 1, "loss": done[folder]}
        return {"thinking": [row], "trained_steps": 1, "parameters": 1}, []

    monkeypatch.setattr(scaling, "train", train)
    monkeypatch.setattr(Scaling, "flops", lambda self, recipe: 1.0)
    study = Scaling(plan(tmp_path), tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyboardInterrupt):
        study.conduct(study.chosen([]), 2, tmp_path / "out")
    study.conduct(study.chosen([]), 2, tmp_path / "out")
    assert len(done) == 16
    lines = (tmp_path / "runs" / "s.jsonl").read_text().splitlines()
    assert len(lines) == 16 and json.loads(lines[0])["model"] == "EBT"
    (text,) = (path.read_text() for path in (tmp_path / "out").glob("s-cpu-*.md"))
    assert "Exponent over T's" in text and "| EBT |" in text
