"""Puzzles to shards: made by seed or read, each with one answer; what is none is refused in a line."""

import random

import numpy as np
import pytest

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.puzzles import BLANK
from ebt_megatron.data_prep import puzzles as command
from ebt_megatron.data_prep.puzzles import PuzzleSettings, prepare_puzzles, split_puzzles
from ebt_megatron.data_prep.sudoku import sudoku
from tests.data_prep.media import invoke, said

ANSWER = "1234341221434321"
QUESTION = "1234000021430000"  # its other lines can be exchanged
ONE = "1234341021430000"


def made(output, **settings):
    wanted = {"size": 4, "count": 20, "validation": 8, "harder": 6, "clues": "6-8", "harder_clues": "4-5"} | settings
    return prepare_puzzles(output, PuzzleSettings(**wanted))


def rows(folder):
    return np.array(list(ShardFolder(str(folder)).rows()))


def test_made_puzzles_have_one_answer_and_as_many_clues_as_asked(tmp_path):
    manifests = made(tmp_path)
    rules = sudoku(4)
    for split, (count, least, most) in {"train": (20, 6, 8), "validation": (8, 6, 8), "harder": (6, 4, 5)}.items():
        found = rows(tmp_path / split)
        assert len(found) == count == manifests[split].samples
        for question, answer in found:
            assert rules.problem(question, answer) == "" and least <= (question != BLANK).sum() <= most
    assert manifests["train"].encoder["symbols"] == 4 and manifests["train"].shape == [2, 16]


def test_a_seed_says_which(tmp_path):
    made(tmp_path / "a"), made(tmp_path / "b"), made(tmp_path / "c", seed=1)
    a, b, c = (rows(tmp_path / name / "train") for name in "abc")
    assert (a == b).all() and (a != c).any()


def test_a_puzzle_does_not_depend_on_those_before_it():
    rules = sudoku(6)
    first = rules.puzzle(random.Random(3), (10, 14))
    for seed in range(5):
        rules.puzzle(random.Random(seed), (10, 14))
    again = rules.puzzle(random.Random(3), (10, 14))
    assert all((x == y).all() for x, y in zip(first, again, strict=True))


def csv(tmp_path, *lines, head="question,answer,rating"):
    path = tmp_path / "sudoku.csv"
    path.write_text("\n".join((head, *lines)) + "\n")
    return path


def test_puzzles_of_a_file(tmp_path):
    every = [sudoku(4).puzzle(random.Random(i), (4, 8)) for i in range(24)]
    lines = [
        ",".join("".join(map(str, grid)) for grid in pair).replace("0", ".") + f",{i / 2}"
        for i, pair in enumerate(every)
    ]
    settings = PuzzleSettings(size=4, validation=4, harder_clues="1-4")
    manifests = prepare_puzzles(tmp_path / "out", settings, [str(csv(tmp_path, *lines))])
    few = sum((question != BLANK).sum() <= 4 for question, _ in every)
    assert few and manifests["harder"].samples == few and manifests["validation"].samples == 4
    assert manifests["train"].samples == 20 - few
    harder = ShardFolder(str(tmp_path / "out" / "harder"))
    for (question, _), rating in zip(harder.rows(), harder.gather_beside("ratings", np.arange(few)), strict=True):
        assert (question != BLANK).sum() <= 4 and (question == every[int(2 * rating)][0]).all()


def test_a_split_has_none_of_another():
    puzzles = np.array([sudoku(4).puzzle(random.Random(i), (4, 8)) for i in range(40)])
    parts = split_puzzles(puzzles, PuzzleSettings(size=4, validation=8, harder_clues="4-5"))
    taken = [i for part in parts.values() for i in part]
    assert len(set(taken)) == len(taken) == len(puzzles)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"{QUESTION},{ANSWER},1", "it has several answers"),
        (f"2{ONE[1:]},{ANSWER},1", "contradicts the clue 2 in row 1, column 1"),
        (f"{'0' * 15}1,{'1' * 16},1", "its answer breaks the rules"),
        (f"{ONE[:-1]},{ANSWER}", "line 2 of .* its question has 15 cells, 16 are needed"),
        (f"{ONE},{ANSWER[:-1]}0", "line 2 of .* its symbols are not 1 to 4"),
        (f"9{ONE[1:]},{ANSWER}", "line 2 of .* its symbols are not 1 to 4"),
        (f"{ONE},{ANSWER},hard", "line 2 of .* has no number as its rating"),
        (f"x{ONE[1:]},{ANSWER}", "line 2 of .* is no sudoku of 4 x 4"),
    ],
)
def test_what_is_no_puzzle(line, problem, tmp_path):
    settings = PuzzleSettings(size=4, validation=0)
    with pytest.raises(DataError, match=problem):
        prepare_puzzles(tmp_path / "out", settings, [str(csv(tmp_path, line))])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--count", 3, "--size", 5], "size 5: choose one of 4, 6, 9"),
        (["--count", 3, "--size", 4, "--clues", "9"], ""),
        (["--count", 3, "--size", 4, "--clues", "8-6"], "give LEAST-MOST, from 1 to 15"),
        (["--count", 3, "--kind", "chess"], "there is sudoku"),
        ([], "either --input, to read puzzles, or --count"),
    ],
)
def test_options(options, problem, tmp_path):
    result = invoke(command.main, "--output", tmp_path / "out", "--validation", 0, *options)
    assert (result.exit_code == 0) == (not problem) and problem in said(result)


def test_a_file_without_names_of_columns(tmp_path):
    with pytest.raises(DataError, match="no columns question and answer"):
        prepare_puzzles(tmp_path / "out", PuzzleSettings(size=4), [str(csv(tmp_path, f"{ONE},{ANSWER}", head="a,b"))])
