"""Puzzles to shards: made by seed or read, each with one answer; what is none is refused in a line."""

import random

import numpy as np
import pytest

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.puzzles import BLANK, Puzzle
from ebt_megatron.data_prep import puzzles as command
from ebt_megatron.data_prep.puzzles import PuzzleSettings, prepare_puzzles, split_puzzles
from ebt_megatron.data_prep.rules import rules_of
from ebt_megatron.data_prep.sudoku import Sudoku
from tests.data_prep.media import invoke, said

ANSWER = "1234341221434321"
QUESTION = "1234000021430000"  # its other lines can be exchanged
ONE = "1234341021430000"


def made(output, **settings):
    wanted = {"size": 4, "count": 20, "validation": 8, "harder": 6, "range": "6-8", "harder_range": "4-5"} | settings
    return prepare_puzzles(output, PuzzleSettings(**wanted))


def rows(folder):
    return np.array(list(ShardFolder(str(folder)).rows()))


def test_made_puzzles_have_one_answer_and_as_many_clues_as_asked(tmp_path):
    manifests = made(tmp_path)
    rules = Sudoku(4)
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
    rules = Sudoku(6)
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
    every = [Sudoku(4).puzzle(random.Random(i), (4, 8)) for i in range(24)]
    lines = [
        ",".join("".join(map(str, grid)) for grid in pair).replace("0", ".") + f",{i / 2}"
        for i, pair in enumerate(every)
    ]
    settings = PuzzleSettings(size=4, validation=4, harder_range="1-4")
    manifests = prepare_puzzles(tmp_path / "out", settings, [str(csv(tmp_path, *lines))])
    few = sum((question != BLANK).sum() <= 4 for question, _ in every)
    assert few and manifests["harder"].samples == few and manifests["validation"].samples == 4
    assert manifests["train"].samples == 20 - few
    harder = ShardFolder(str(tmp_path / "out" / "harder"))
    for (question, _), rating in zip(harder.rows(), harder.gather_beside("ratings", np.arange(few)), strict=True):
        assert (question != BLANK).sum() <= 4 and (question == every[int(2 * rating)][0]).all()


def test_a_split_has_none_of_another():
    puzzles = np.array([Sudoku(4).puzzle(random.Random(i), (4, 8)) for i in range(40)])
    parts = split_puzzles(puzzles, PuzzleSettings(size=4, validation=8, harder_range="4-5"))
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
        (["--count", 3, "--size", 4, "--range", "9"], ""),
        (["--count", 3, "--size", 4, "--range", "8-6"], "give LEAST-MOST clues, from 1 to 15"),
        (["--count", 3, "--kind", "chess"], "choose one of sudoku, maze, graph"),
        (["--count", 3, "--kind", "maze", "--size", 6], "choose an odd one"),
        (["--count", 3, "--kind", "maze", "--size", 9, "--range", "6"], "its rows are odd"),
        (["--count", 3, "--kind", "graph", "--range", "3"], "give LEAST-MOST nodes, from 4 to 9"),
        ([], "either --input, to read puzzles, or --count"),
    ],
)
def test_options(options, problem, tmp_path):
    result = invoke(command.main, "--output", tmp_path / "out", "--validation", 0, *options)
    assert (result.exit_code == 0) == (not problem) and problem in said(result)


def test_a_file_without_names_of_columns(tmp_path):
    with pytest.raises(DataError, match="no columns question and answer"):
        prepare_puzzles(tmp_path / "out", PuzzleSettings(size=4), [str(csv(tmp_path, f"{ONE},{ANSWER}", head="a,b"))])


# --- mazes and graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "trained", "harder"), [("maze", (5, 7), (9, 9)), ("graph", (4, 6), (8, 9))])
def test_networks_are_as_hard_as_asked_and_have_one_answer(kind, trained, harder, tmp_path):
    ranges = {"range": "{}-{}".format(*trained), "harder_range": "{}-{}".format(*harder)}
    prepare_puzzles(tmp_path, PuzzleSettings(kind=kind, size=9, count=20, validation=4, harder=8, **ranges))
    rules = rules_of(Puzzle.of(kind, 9))
    for split, (least, most) in {"train": trained, "validation": trained, "harder": harder}.items():
        for question, answer in rows(tmp_path / split):
            assert rules.problem(question, answer) == "" and least <= rules.extent(question) <= most
            asked = np.flatnonzero(question == BLANK)
            assert (question == answer)[question != BLANK].all() and set(answer[asked]) <= {3, 4}
            wrong = answer.copy()
            wrong[asked[0]] = 7 - wrong[asked[0]]  # the other of 3 and 4
            assert "its answer is not" in rules.problem(question, wrong)


def shown(text):
    return np.array([int(symbol) for symbol in text if symbol != " "])


MAZE = shown("11111 12001 11101 12001 11111")
GRAPH = shown("12111 21111 11121 11211 11111 00400")


@pytest.mark.parametrize(
    ("kind", "question", "problem"),
    [
        ("maze", MAZE, ""),
        ("maze", shown("11111 12001 10101 12001 11111"), "its answer is not the shortest way"),  # straight on
        ("maze", shown("11111 12001 10101 10021 11111"), "it has several answers"),
        ("maze", shown("11111 12011 11111 12001 11111"), "no way leads"),
        ("maze", shown("11111 12001 11101 10001 11111"), "no way leads"),  # one end
        ("maze", shown("11111 12301 11101 12001 11111"), "other cells than walls"),
        ("graph", GRAPH, ""),
        ("graph", shown("12111 11111 11121 11211 11111 00400"), "whether they are joined"),
        ("graph", shown("12111 21111 11121 11211 11111 00000"), "no one node"),
        ("graph", shown("12111 21111 11121 11211 11111 04000"), "its answer is not what can be reached"),
    ],
)
def test_what_is_wrong_with_a_network(kind, question, problem):
    answers = {"maze": shown("11111 12441 11141 12441 11111"), "graph": shown("12111 21111 11121 11211 11111 33443")}
    found = rules_of(Puzzle.of(kind, 5)).problem(question, answers[kind])
    assert problem in found and bool(found) == bool(problem)
