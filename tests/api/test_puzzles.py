"""`ebt_megatron.load` of puzzles: solved from texts or arrays, followed step by step, and the energies of answers."""

import numpy as np
import pytest
import torch

import ebt_megatron as ebt
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.data_prep.puzzles import PuzzleSettings, prepare_puzzles
from ebt_megatron.evaluation import puzzles as measures
from ebt_megatron.inference.puzzles import RULES, asked, last_steps, think
from ebt_megatron.parallel import setup
from tests import shared_models
from tests.tasks.test_puzzles import recipe

BASELINE = "model.architecture=baseline"
RUNS = {"EBT": (), "recurrent": (BASELINE, "puzzles.passes=2"), "feed-forward": (BASELINE,)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzles")
    prepare_puzzles(folder, PuzzleSettings(size=4, count=12, validation=12, range="5-8"))
    return folder


@pytest.fixture(scope="module")
def models(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: shared_models.untrained(recipe, shards, folder / name, *more) for name, more in RUNS.items()}
    yield {name: ebt.load(path) for name, path in runs.items()}
    setup.shutdown()


@pytest.fixture(scope="module")
def questions(models):
    (_, sample), *_ = measures.batches(models["EBT"].run, None, 12)
    return sample.observed


def text_of(grid):
    return "".join(map(str, grid.tolist()))


@pytest.mark.parametrize("name", RUNS)
def test_a_solution_is_what_thinking_ends_with(name, models, questions):
    model, steps = models[name], 1 if name == "feed-forward" else 5
    solutions = model.solve(questions, steps=5)
    found = think(model.run, asked(questions), steps)
    grids = torch.where(questions == 0, found.grids[-1] + 1, questions)
    assert [s.text for s in solutions] == [text_of(grid) for grid in grids]
    assert {s.steps for s in solutions} == {steps} and all(np.isnan(s.energy) == (name != "EBT") for s in solutions)
    assert solutions[0].grid.shape == (4, 4) and solutions[0].confidence < 0
    texts = [text_of(q).replace("0", ".") for q in questions]
    assert [s.text for s in model.solve(texts, steps=5)] == [s.text for s in solutions]
    assert model.solve(texts[3], steps=5)[0].text == solutions[3].text


@pytest.mark.parametrize("rule", RULES)
def test_thinking_may_end_by_a_rule(rule, models, questions):
    model = models["EBT"]
    found = think(model.run, asked(questions), 12)
    solutions = model.solve(questions, steps=12, until=rule)
    last = last_steps(found, rule)
    assert [s.steps for s in solutions] == (last + 1).tolist()
    at = [int(found.grids[n, i, 0]) + 1 if questions[i, 0] == 0 else int(questions[i, 0]) for i, n in enumerate(last)]
    assert [int(s.grid[0, 0]) for s in solutions] == at


def test_of_several_starts_the_lowest_energy_is_kept(models, questions):
    model = models["EBT"]
    one, several = (model.solve(questions, steps=3, starts=n, seed=3) for n in (2, 6))
    assert all(b.energy <= a.energy for a, b in zip(one, several, strict=True))
    assert any(b.energy < a.energy for a, b in zip(one, several, strict=True))
    assert [s.text for s in model.solve(questions, steps=3, starts=6, seed=3)] == [s.text for s in several]


def test_thinking_is_followed_and_ends_with_the_solution(models, questions):
    thoughts = list(models["EBT"].think(questions[0], steps=4))
    assert (
        len(thoughts) == 4 and thoughts[-1].grid.tolist() == models["EBT"].solve(questions[0], steps=4)[0].grid.tolist()
    )
    given = questions[0].view(4, 4).numpy() != 0
    assert (thoughts[0].grid[given] == questions[0].view(4, 4).numpy()[given]).all()
    assert (thoughts[0].probabilities[given] == 1).all() and not np.isnan(thoughts[0].energy)


def test_an_answer_has_an_energy(models, questions):
    model = models["EBT"]
    answers = [s.text for s in model.solve(questions)]
    energies = model.energy(questions, answers)
    assert energies.shape == (12,) and np.allclose(model.energy(questions[3:5], answers[3:5]), energies[3:5], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda m: m["EBT"].solve("12"), r"puzzle 1 \('12'\) is no sudoku of 4 x 4: give 16 digits"),
        (lambda m: m["EBT"].solve(["0" * 16, "x" * 16]), "puzzle 2 "),
        (lambda m: m["EBT"].solve("²" * 16), "give 16 digits or dots"),
        (lambda m: m["EBT"].solve(np.full((2, 16), 5)), "symbols 1 to 4"),
        (lambda m: m["EBT"].solve(np.zeros((2, 15), int)), "16 cells each"),
        (lambda m: m["EBT"].solve("0" * 16, steps=0), "steps=0"),
        (lambda m: m["EBT"].solve("0" * 16, until="tired"), "until=tired: choose one of grid stays"),
        (lambda m: m["recurrent"].solve("0" * 16, until="energy rises"), "has no energy"),
        (lambda m: m["recurrent"].solve("0" * 16, starts=2), "starts=2"),
        (lambda m: m["recurrent"].energy("0" * 16, "1" * 16), "does not think"),
        (lambda m: m["EBT"].energy("0" * 16, "0" * 16), "a symbol in every cell"),
        (lambda m: list(m["EBT"].think(["0" * 16] * 2)), "one at a time"),
    ],
)
def test_what_cannot_be_is_one_line(wrong, named, models):
    with pytest.raises((DataError, RecipeError), match=named):
        wrong(models)
