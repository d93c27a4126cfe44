"""Puzzles to shards: made by seed, or read from a file of questions and answers; every one is verified.

    ebt-prepare puzzles --kind sudoku --size 6 --count 4000 --range 10-14 --harder-range 8-9 --output data/sudoku6
    ebt-prepare puzzles --kind maze --size 11 --count 8000 --range 5-7 --harder-range 9-11 --output data/mazes
    ebt-prepare puzzles --input sudoku.csv --output data/sudoku9

OUTPUT has the splits train, validation and harder: Sudoku of fewer clues, larger mazes or graphs than are trained on.
"""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of, write_whole
from ebt_megatron.core.options import dataclass_options, option
from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.data.manifest import Manifest, index_name, read_manifest
from ebt_megatron.data.puzzles import BLANK, BOXES, KINDS, Puzzle
from ebt_megatron.data.shards import clear_shards, shard_infos, shard_name, write_shard
from ebt_megatron.data_prep import options
from ebt_megatron.data_prep.files import content_of, find_files
from ebt_megatron.data_prep.job import Execution, Job
from ebt_megatron.data_prep.pieces import place_of
from ebt_megatron.data_prep.rules import rules_of

SPLITS = ("train", "validation", "harder")
_PER_SHARD = 512
QUESTION, _ANSWER = ("question", "puzzle", "quizzes", "quiz"), ("answer", "solution", "solutions")  # columns' names
_RATING = ("rating", "difficulty")


@dataclass(frozen=True)
class PuzzleSettings:
    """What puzzles to make, or of which size they are.

    Attributes:
        kind: of KINDS.
        size: rows of a grid, or nodes of a graph, at most.
        count, validation, harder: how many of each split to make; of a file `validation` are held out.
        range: "LEAST-MOST" of what says how hard they are (`Rules.measure`), of train and validation.
        harder_range: the same of the split harder; "": there is none.
        seed: of all.
    """

    kind: str = option("sudoku", help=f"What puzzles: {', '.join(KINDS)}.")
    size: int = option(9, help=f"Rows of Sudoku ({', '.join(map(str, BOXES))}) or of a maze (odd); nodes of a graph.")
    count: int = option(0, min=0, help="Puzzles to make and train on.")
    validation: int = option(500, min=0, help="Puzzles held out.")
    range: str = option(
        "", help="LEAST-MOST clues of a Sudoku, rows of a maze, nodes of a graph; default: what is usual for the size."
    )
    harder: int = option(500, min=0, help="Harder puzzles to make, held out.")
    harder_range: str = option("", help="LEAST-MOST of those; default: none are made or held out.")
    seed: int = option(0, min=0, help="Seed of what is made and held out.")

    @property
    def puzzle(self) -> Puzzle:
        """What the puzzles are; raises DataError for a kind or size there is not."""
        return Puzzle.of(self.kind, self.size)

    def range_of(self, split: str) -> tuple[int, int] | None:
        """The least and the most of `Rules.measure` in a split; None: there is none.

        Raises:
            DataError: for what is no range.
        """
        rules = rules_of(self.puzzle)
        given, flag = (self.harder_range, "--harder-range") if split == "harder" else (self.range, "--range")
        if not given:
            return None if split == "harder" else rules.usual
        (low, high), (least, dash, most) = rules.limits, given.partition("-")
        if not (least.isdigit() and (most.isdigit() or not dash) and low <= int(least) <= int(most or least) <= high):
            raise DataError(f"{flag} {given}: give LEAST-MOST {rules.measure}, from {low} to {high}")
        return int(least), int(most or least)

    def counts(self) -> dict[str, int]:
        """How many to make, by split."""
        wanted = {"train": self.count, "validation": self.validation, "harder": self.harder}
        return {split: n for split, n in wanted.items() if n and self.range_of(split)}


def read_puzzles(path: str, puzzle: Puzzle) -> tuple[np.ndarray, np.ndarray]:
    """The puzzles [N, 2, cells] of a CSV file, with columns of questions and answers; blanks are 0 or a dot.

    And their ratings, float32 [N], nan without a column of them.

    Raises:
        DataError: naming the first line that is none.
    """
    try:
        rows = list(csv.reader(io.StringIO(content_of(path).decode())))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    columns = [next((i for i, name in enumerate(names) if name in known), None) for known in (QUESTION, _ANSWER)]
    if None in columns:
        raise DataError(f"{path} has no columns {QUESTION[0]} and {_ANSWER[0]}: its first line must name them")
    rating = next((i for i, name in enumerate(names) if name in _RATING), None)
    ratings = np.full(len(rows) - 1, np.nan, np.float32)
    out = np.empty((len(rows) - 1, 2, puzzle.cells), np.uint8)
    for number, row in enumerate(rows[1:], 2):
        for which, column in enumerate(columns):
            assert column is not None
            text = row[column].strip() if column < len(row) else ""
            cells = puzzle.parsed(text)
            if cells is None:
                raise DataError(
                    f"line {number} of {path} is no {puzzle.name}: its {names[column]} has {len(text)} cells, "
                    f"{puzzle.cells} are needed (--size)"
                )
            out[number - 2, which] = cells
        if out[number - 2].max() > puzzle.symbols or (out[number - 2, 1] == BLANK).any():
            raise DataError(f"line {number} of {path} is no {puzzle.name}: its symbols are not 1 to {puzzle.symbols}")
        if rating is not None:
            try:
                ratings[number - 2] = float(row[rating])
            except (ValueError, IndexError):
                raise DataError(f"line {number} of {path} has no number as its {names[rating]}") from None
    if not len(out):
        raise DataError(f"{path} holds no puzzle")
    return out, ratings


def split_puzzles(puzzles: np.ndarray, settings: PuzzleSettings) -> dict[str, np.ndarray]:
    """Which of [N, 2, cells] go to each split: the harder, of the others some by a hash of the question, the rest."""
    rules = rules_of(settings.puzzle)
    extent = np.array([rules.extent(question) for question in puzzles[:, 0]])
    places = np.array([place_of(settings.seed, question.tobytes()) for question in puzzles[:, 0]])
    out, left = {}, np.ones(len(puzzles), bool)
    for split, most in (("harder", settings.harder), ("validation", settings.validation), ("train", len(puzzles))):
        of = settings.range_of(split) if split == "harder" or settings.range else rules.limits
        if of is None:
            continue
        inside = (extent >= of[0]) & (extent <= of[1])
        found = np.flatnonzero(left & inside)
        taken = np.sort(found[np.argsort(places[found], kind="stable")[:most]])
        out[split], left[taken] = taken, False
        if split == "harder":
            left &= ~inside  # none as hard is trained on
    if not len(out.get("train", ())):
        raise DataError(f"no puzzle of {len(puzzles)} is left to train on: lower --validation, or widen --range")
    return {split: out[split] for split in SPLITS if len(out.get(split, ()))}


Given = tuple[np.ndarray, np.ndarray | None]  # puzzles of a split, and their ratings if they have some


def _write(output: Path, settings: PuzzleSettings, given: dict[str, Given], item: tuple[str, int]) -> None:
    """One shard: of puzzles made here, each by its own seed, or of those given, each verified."""
    split, number = item
    first, rules = number * _PER_SHARD, rules_of(settings.puzzle)
    if given:
        samples, ratings = (None if a is None else a[first : first + _PER_SHARD] for a in given[split])
        assert samples is not None
        for question, answer in samples:
            if problem := rules.problem(question, answer):
                raise DataError(f"the puzzle {''.join(map(str, question))} does not do: {problem}")
    else:
        extent, count = settings.range_of(split), settings.counts()[split]
        assert extent is not None
        seeds = (stable_seed(settings.seed, split, i) for i in range(first, min(first + _PER_SHARD, count)))
        samples, ratings = np.array([rules.puzzle(random.Random(seed), extent) for seed in seeds]), None
    write_shard(output / split, number, "puzzles", samples.astype(np.uint8), ratings=ratings)


def _publish(output: Path, puzzle: Puzzle, counts: dict[str, int], rated: bool, origin: dict[str, Any]) -> None:
    """Manifests, which show that the shards are whole, and what the puzzles are beside them."""
    for split, count in counts.items():
        folder = output / split
        write_whole(folder / "puzzle.json", json.dumps(puzzle.describe()) + "\n")
        about = {
            "file": "puzzle.json",
            "sha256": sha256_of(folder / "puzzle.json"),
            **puzzle.describe(),
            "rated": rated,
        }
        infos = shard_infos(folder, -(-count // _PER_SHARD))
        Manifest("puzzles", [2, puzzle.cells], "uint8", count, infos, origin, encoder=about).write(folder)


def prepare_puzzles(
    output: Path, settings: PuzzleSettings, inputs: list[str] | None = None, execution: Execution = Execution()
) -> dict[str, Manifest]:
    """Make or read puzzles, verify them and write every split.

    Args:
        output: folder for the splits.
        settings: what to make.
        inputs: CSV files or URLs; none: puzzles are made.
        execution: how to run.

    Raises:
        DataError: for settings that do not do, and puzzles that are none.
    """
    puzzle = settings.puzzle
    files = find_files(inputs, (".csv",)).files if inputs else []
    if bool(files) == bool(settings.count):
        raise DataError("give either --input, to read puzzles, or --count, to make so many")
    with Job(output, asdict(settings), files, execution) as job:
        given: dict[str, Given] = {}
        rated = False
        if files and not job.complete:
            puzzles, ratings = (
                np.concatenate(a) for a in zip(*(read_puzzles(f.path, puzzle) for f in files), strict=True)
            )
            once = np.unique(puzzles, axis=0, return_index=True)[1]
            puzzles, ratings = puzzles[once], ratings[once]
            rated = not np.isnan(ratings).any()
            for split, taken in split_puzzles(puzzles, settings).items():
                given[split] = puzzles[taken], ratings[taken] if rated else None
        counts = {split: len(found) for split, (found, _) in given.items()} or settings.counts()
        if not job.complete:
            items = [(split, i) for split, n in counts.items() for i in range(-(-n // _PER_SHARD))]
            if not any(_index(output, item).exists() for item in items) or not execution.resume:
                job.once(lambda: _clear(output))
            job.each("puzzles", partial(_write, output, settings, given), items, partial(_index, output))
            origin = {"source": [f.path for f in files] or "made", **asdict(settings)}
            job.once(lambda: _publish(output, puzzle, counts, rated, origin))
            job.finish()
        manifests = {split: read_manifest(str(output / split)) for split in SPLITS if (output / split).exists()}
        for split, manifest in manifests.items():
            job.console.print(f"{split}: {manifest.samples:,} puzzles of {puzzle.name}, each with one answer")
    return manifests


def _clear(output: Path) -> None:
    for split in SPLITS:
        clear_shards(output / split)


def _index(output: Path, item: tuple[str, int]) -> Path:
    return output / item[0] / index_name(shard_name(item[1]))


@dataclass_options
def main(
    *,
    output: Path = options.OUTPUT,
    input: list[str] = typer.Option([], help="CSV files with columns question and answer; none: puzzles are made."),
    settings: PuzzleSettings,
    execution: Execution,
    dry_run: bool = options.DRY_RUN,
) -> None:
    """Turn puzzles, made or given, into shards."""

    def work() -> None:
        if dry_run:
            what = f"from {len(find_files(input, ('.csv',)).files)} files" if input else f"{settings.counts()} made"
            typer.echo(f"would write {settings.puzzle.name} to {output}, {what}", err=True)
            return
        prepare_puzzles(output, settings, input, execution)

    options.command(work)


if __name__ == "__main__":
    typer.run(main)
