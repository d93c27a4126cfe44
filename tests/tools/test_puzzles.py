"""`ebt-puzzles`: questions in, answers out, each checked by the rules."""

import csv

import pytest
from typer.testing import CliRunner

from ebt_megatron.data_prep.puzzles import PuzzleSettings, prepare_puzzles
from ebt_megatron.data_prep.rules import rules_of
from ebt_megatron.parallel import setup
from ebt_megatron.tools import puzzles
from tests import shared_models
from tests.tasks.test_puzzles import PUZZLE, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzles")
    prepare_puzzles(folder / "data", PuzzleSettings(size=4, count=4, validation=4, range="5-8"))
    return shared_models.untrained(recipe, folder / "data", folder / "run")


def call(*arguments):
    done = CliRunner().invoke(puzzles.app, [str(a) for a in arguments])
    setup.shutdown()
    return done


SOLVABLE = "1.3434122.434321"  # two cells are asked for


def test_answers_are_written_and_checked(run, tmp_path):
    given, wanted = tmp_path / "questions.csv", tmp_path / "answers.csv"
    given.write_text(f"id,question\n1,{SOLVABLE}\n2,{'.' * 16}\n")
    done = call(run, "--input", given, "--output", wanted, "--steps", 3, "--starts", 2)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(wanted.open()))
    assert [row["question"] for row in rows] == [SOLVABLE, "." * 16]
    import numpy as np

    for row in rows:
        question, answer = (np.array([int(c) for c in row[n].replace(".", "0")]) for n in ("question", "answer"))
        assert row["problem"] == rules_of(PUZZLE).problem(question, answer) and row["steps"] == "3"
        assert (answer[question != 0] == question[question != 0]).all() and float(row["energy"])
    assert rows[1]["problem"] and f"{sum(not r['problem'] for r in rows)} of 2 solved" in done.output


def test_questions_are_a_column_or_a_question_in_each_line(run, tmp_path):
    given = tmp_path / "questions.txt"
    given.write_text(f"{SOLVABLE}\n{SOLVABLE}\n")
    assert puzzles.questions_of(given) == [SOLVABLE] * 2
    given.write_text(f"rating,quizzes\n1,{SOLVABLE}\n2,{SOLVABLE}\n")  # as `ebt-prepare puzzles` names it, too
    assert puzzles.questions_of(given) == [SOLVABLE] * 2


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "holds no puzzle|no column"), ("a,b\n1,2\n", "no column 'question'"), ("question\n12\n", "puzzle 1 ")],
)
def test_bad_input_is_one_line(text, named, run, tmp_path):
    import re

    given = tmp_path / "questions.csv"
    given.write_text(text)
    done = call(run, "--input", given, "--output", tmp_path / "answers.csv")
    assert done.exit_code == 2 and re.search(named, done.output) and not (tmp_path / "answers.csv").exists()
