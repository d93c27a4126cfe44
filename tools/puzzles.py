"""Puzzles solved by a trained run: `ebt-puzzles RUN --input questions.csv --steps 16 --starts 8`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries, say, user_path
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.core.files import write_whole
from ebt_megatron.data_prep.puzzles import QUESTION

app = typer.Typer()
COLUMNS = ("question", "answer", "problem", "steps", "energy", "confidence")


def questions_of(path: Path) -> list[str]:
    """The questions of a CSV file with a column of them, named as `ebt-prepare puzzles` knows it, or one in each line.

    Raises:
        DataError: for a file that cannot be read, or has none.
    """
    try:
        rows = list(csv.reader(io.StringIO(path.read_text())))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    found = [column for column, name in enumerate(names) if name in QUESTION]
    if found:
        column, rows = found[0], rows[1:]
    elif names and all(len(row) <= 1 for row in rows):
        column = 0
    else:
        raise DataError(f"{path} has no column 'question': its first line must name it, or each line be a question")
    questions = [row[column].strip() if column < len(row) else "" for row in rows if row]
    if not questions:
        raise DataError(f"{path} holds no puzzle")
    return questions


def solved(run_dir: Path, overrides: list[str], questions: list[str], **how: Any) -> list[tuple[str, ...]]:
    """Rows of COLUMNS: each question, its answer, what is wrong with it (nothing: it is solved), and how it was found.

    Args:
        run_dir: a training.output_dir of puzzles; its data are not needed.
        overrides: of its recipe: key=value.
        questions: digits, row by row, 0 or a dot where they ask.
        how: as `PuzzleModel.solve`.

    Raises:
        RecipeError: for a run of something else, or what it cannot do.
        DataError: for a question that is none, or libraries of the rules that are missing.
    """
    from ebt_megatron.api.puzzles import PuzzleModel
    from ebt_megatron.data_prep.rules import rules_of
    from ebt_megatron.session import open_run
    from ebt_megatron.tasks import task_as
    from ebt_megatron.tasks.puzzles import Puzzles

    with open_run(run_dir, overrides, splits=()) as run:
        task_as(run.task, Puzzles)
        model = PuzzleModel(run)
        rules = rules_of(model.puzzle)
        out: list[tuple[str, ...]] = []
        for question, solution in zip(questions, model.solve(questions, **how), strict=True):
            given = model.puzzle.parsed(question)
            assert given is not None  # it was solved
            problem = rules.problem(given, solution.grid.flatten())
            numbers = str(solution.steps), f"{solution.energy:.4f}", f"{solution.confidence:.4f}"
            out.append((question, solution.text, problem, *numbers))
    return out


@app.command()
def main(
    run_dir: Path = typer.Argument(..., parser=user_path, help="A training.output_dir of a run of puzzles."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. thinking.langevin_noise=0.3."),
    input: Path = typer.Option(..., parser=user_path, help="CSV with a column 'question', or a question in each line."),
    output: Path = typer.Option(
        "answers.csv",
        parser=user_path,
        help="CSV to write, with columns question, answer, "
        "problem (nothing, where the answer keeps the rules), steps, energy, confidence.",
    ),
    steps: int = typer.Option(16, min=1, help="Thinking steps, or passes of a recurrent network, at most."),
    starts: int = typer.Option(1, min=1, help="More than 1: so many starts at noise; the lowest energy is kept."),
    until: str | None = typer.Option(None, help="End sooner: 'grid stays', 'energy rises' or 'energy settles'."),
    seed: int = typer.Option(0, min=0, help="Of the starts."),
) -> None:
    """Solve puzzles, and check the answers by the rules."""

    def work() -> None:
        if not output.absolute().parent.is_dir():
            raise RecipeError(f"--output {output}: {output.parent} is not a folder")
        quiet_libraries()
        questions = questions_of(input)
        rows = solved(run_dir, overrides or [], questions, steps=steps, starts=starts, until=until, seed=seed)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        write_whole(output, text.getvalue())
        right = sum(not row[2] for row in rows)
        say(f"{output}: {right} of {len(rows)} solved")

    guarded(work)


if __name__ == "__main__":
    app()
