"""What every study does: names models, trains each as often as asked, and repeats nothing that is done."""

import json
import sys

import pytest
import typer

from benchmarks import study
from benchmarks.seeds import Interval, over_seeds
from benchmarks.study import evaluated, train
from benchmarks.thinking import BASELINES, THINKERS, Thinking


def test_an_unknown_model_is_refused_and_none_means_all(tmp_path):
    thinking = Thinking(tmp_path, 10, tmp_path, {}, 8)
    assert thinking.chosen([]) == list(thinking.models) and set(thinking.models) >= {*THINKERS, *BASELINES}
    with pytest.raises(typer.BadParameter, match="no model 'S3': choose of S1; "):
        thinking.chosen(["S1", "S3"])


def test_the_first_seed_of_all_models_comes_first(tmp_path, monkeypatch):
    thinking, asked = Thinking(tmp_path, 10, tmp_path, {}, 8), []
    monkeypatch.setattr(thinking, "run", lambda recipe: asked.append(recipe) or {"n": len(asked)})
    monkeypatch.setattr(thinking, "said", lambda result: "")
    done = thinking.train_all(["S2", "Transformer++"], 2)
    assert done == {"S2": [{"n": 1}, {"n": 3}], "Transformer++": [{"n": 2}, {"n": 4}]}
    assert [r.training.seed for r in asked] == [1234, 1234, 1235, 1235]
    assert [r.training.output_dir for r in asked][2:] == [str(tmp_path / "s2-1"), str(tmp_path / "transformerpp-1")]
    assert asked[0].training.steps == 10 and asked[0].training.micro_batch_size == 8


def test_what_is_done_is_not_repeated(tmp_path, monkeypatch):
    commands, reached = [], [4]

    def command(module, folder, *arguments):
        commands.append(module)
        if module == "ebt_megatron.train":
            (tmp_path / "metrics.jsonl").write_text(f'{{"step": {reached[0]}}}\n')
        if module == "ebt_megatron.evaluate":
            (tmp_path / "evaluation.json").write_text(json.dumps({"loss": 1.0}))

    monkeypatch.setattr(study, "command", command)
    recipe = Thinking(tmp_path, 10, tmp_path, {}, 8).recipe("S2", 0)
    recipe.training.output_dir = str(tmp_path)
    with pytest.raises(study.Stopped, match="step 4 of 10"):
        train(recipe)
    assert commands.pop() == "ebt_megatron.train", "what was told to end is not evaluated"
    reached[0] = 10
    for _ in range(2):
        assert train(recipe) == ({"loss": 1.0}, [{"step": 10}])
    assert commands == ["ebt_megatron.train", "ebt_megatron.evaluate"]
    (tmp_path / "b.json").write_text("{}")
    assert evaluated(tmp_path / "b.json", tmp_path) == {} and len(commands) == 2


def test_a_command_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with code 1") as error:
        evaluated(tmp_path / "a.json", tmp_path)
    assert not isinstance(error.value, study.Stopped)


def test_intervals_are_of_every_number_in_a_tree():
    both = over_seeds([{"a": [1.0], "b": "x", "c": 0}, {"a": [3.0], "b": "x", "c": 0}], left_out=("c",))
    assert both == {"a": [{"mean": 2.0, "half": pytest.approx(12.706)}], "b": "x"}
    assert Interval.of([2.0]).text() == "2.000" and Interval(0.5, 0.25).text(0, 100) == "50 ± 25"
