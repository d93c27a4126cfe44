"""What thinking about puzzles is worth: measures on grids that are known, and a run from its data to its suite."""

import json
import math

import pytest
import torch

from ebt_megatron.config import load_recipe
from ebt_megatron.core.errors import DataError
from ebt_megatron.data_prep.puzzles import PuzzleSettings, prepare_puzzles
from ebt_megatron.evaluation import puzzles
from ebt_megatron.evaluation.interface import SuiteOptions
from ebt_megatron.evaluation.puzzle_suite import evaluate_puzzle_suite, puzzle_tables
from ebt_megatron.inference.puzzles import Thoughts, of_symbols, think
from ebt_megatron.parallel.setup import shutdown
from ebt_megatron.prediction.cells import GIVEN
from ebt_megatron.session import open_run
from ebt_megatron.training.hooks import train_to_end
from ebt_megatron.training.run import Run

SMALL = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.num_attention_heads=2",
    "data.sequence_length=16",
    "training.global_batch_size=16",
    "training.micro_batch_size=16",
    "training.steps=8",
    "training.save_interval=4",
    "training.validation_interval=4",
    "training.validation_samples=20",
    "training.log_interval=1",
    "optimizer.warmup_steps=2",
    "optimizer.decay_steps=8",
]


def thoughts(*grids):
    """Of one puzzle of four cells, the first given, whose answer is 0 1 2 0."""
    targets = torch.tensor([[GIVEN, 1, 2, 0]])
    logits = of_symbols(torch.tensor(grids)[:, None], 3).float()
    return Thoughts(logits, torch.zeros(len(grids), 1), targets)


def test_a_puzzle_is_solved_when_every_cell_that_is_asked_is_right():
    found = thoughts([2, 1, 2, 1], [2, 1, 2, 0])
    assert found.solved[:, 0].tolist() == [False, True]
    assert found.losses[0, 0].item() == pytest.approx(30 / 3, rel=1e-4) and found.losses[1, 0] < 1e-6


MOVING, RIGHT, WRONG = [0, 0, 0, 0], [0, 1, 2, 0], [0, 1, 2, 1]


def test_thinking_ends_where_two_steps_leave_the_grid_as_it_is():
    stopped = puzzles.stopping([thoughts(MOVING, RIGHT, RIGHT, RIGHT, WRONG)])["grid stays"]
    assert stopped == {"steps": 4.0, "solved": 1.0}
    stopped = puzzles.stopping([thoughts(MOVING, RIGHT, MOVING, WRONG)])["grid stays"]
    assert stopped == {"steps": 4.0, "solved": 0.0}


@pytest.mark.parametrize(
    ("energies", "rises", "settles"),
    [
        ([3.0, 1.0, 2.0, 1.0, 0.0], {"steps": 2.0, "solved": 1.0}, {"steps": 5.0, "solved": 0.0}),
        ([3.0, 2.0, 1.0, 1.0, 0.0], {"steps": 5.0, "solved": 0.0}, {"steps": 4.0, "solved": 1.0}),
    ],
)
def test_thinking_ends_before_a_step_that_raises_the_energy_or_when_it_settles(energies, rises, settles):
    found = thoughts(MOVING, RIGHT, RIGHT, RIGHT, WRONG)
    found.energies = torch.tensor(energies)[:, None]
    stopped = puzzles.stopping([found])
    assert stopped["energy rises"] == rises and stopped["energy settles"] == settles
    found.energies = torch.full_like(found.energies, torch.nan)  # of a baseline
    assert set(puzzles.stopping([found])) == {"grid stays"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzles")
    settings = {"count": 64, "validation": 20, "harder": 12, "range": "6-8", "harder_range": "4-5"}
    prepare_puzzles(folder / "4", PuzzleSettings(size=4, **settings))
    prepare_puzzles(folder / "6", PuzzleSettings(size=6, count=2, validation=0))
    return folder


def train(data, name, output, *overrides):
    given = [f"data.{split}=[{data}/4/{split}]" for split in ("train", "validation")]
    more = f"training.output_dir={output}", *SMALL, *overrides
    run = Run(load_recipe(f"puzzles/sudoku6_{name}", [*given, *more]))
    train_to_end(run)
    shutdown()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation_loss" in row][-1]


@pytest.mark.parametrize("name", ["ebt", "recurrent", "feed_forward"])
def test_a_run_and_its_suite(name, data, tmp_path):
    last = train(data, name, tmp_path)
    options = SuiteOptions(6, 2, (), {"harder": f"{data}/4/harder"})
    numbers = evaluate_puzzle_suite(tmp_path, [], options)
    shutdown()
    assert json.loads(json.dumps(numbers)) and puzzle_tables(numbers)
    of = numbers["validation"]
    assert [row["steps"] for row in of["steps"]] == ([1] if name == "feed_forward" else [1, 2, 3, 4, 6])
    trained = of["steps"][0 if name == "feed_forward" else 1]
    assert trained["cells right"] > 0.2 and numbers["harder"]["puzzles"] == 12
    if name == "ebt":
        assert trained["loss"] == pytest.approx(last["validation_loss"], rel=1e-4)
        assert set(of["starts"]) == {"number", "one start", "lowest energy", "highest confidence", "any"}
        assert of["starts"]["any"] >= of["starts"]["one start"] and not math.isnan(of["one error"]["higher energy"])
        assert len(numbers["followed"]["grids"]) == 16
        flops = [row["flops"] for row in of["steps"]]
        assert flops[1] == pytest.approx(2 * flops[0])


def test_it_goes_on_where_it_stopped(data, tmp_path):
    whole = train(data, "ebt", tmp_path / "whole")["validation_loss"]
    train(data, "ebt", tmp_path / "halves", "training.steps=4")
    assert train(data, "ebt", tmp_path / "halves")["validation_loss"] == whole


def test_energies_after_a_step_are_those_the_next_step_begins_with(data, tmp_path):
    train(data, "ebt", tmp_path, "training.steps=4")
    with open_run(tmp_path) as run:
        _, sample = next(puzzles.batches(run, None, 8))
        thought = run.objective.evaluate(sample, 4)
        found = think(run, sample, 4)
        torch.testing.assert_close(found.energies[1:3], thought.energies[2:].sum(1))
        with pytest.raises(DataError, match="holds sudoku of 6 x 6, the run is of sudoku of 4 x 4"):
            list(puzzles.batches(run, f"{data}/6/train", 2))
