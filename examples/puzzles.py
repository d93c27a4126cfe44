"""The puzzles quickstart: Sudoku of 6 x 6 by an energy of the whole grid, beside two baselines; a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from examples.steps import OVERRIDE, PROCESSES, Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA, RUNS = Path("data/sudoku6"), Path("runs/puzzles")
MODELS = {"ebt": "EBT", "recurrent": "recurrent", "feed_forward": "feed-forward"}
SPLITS = {"validation": "as trained on", "harder": "fewer clues than trained on"}
SIDE = 6
UPDATES = "training.steps=1200"  # the recipes' 2,000 solve more, and take longer than a quickstart should
EVALUATED = "training.validation_samples=250"  # puzzles of each kind, half of what there is
PUZZLES = {  # how they are made
    "sudoku6": f"--kind sudoku --size {SIDE} --count 4000 --range 10-14 --harder-range 8-9",
    "sudoku9": "--kind sudoku --size 9 --count 6000 --validation 300 --harder 300 --range 36-48 --harder-range 30-34",
    "mazes": "--kind maze --size 11 --count 8000 --range 5-7 --harder-range 9-11",
    "graphs": "--kind graph --size 12 --count 8000 --range 4-8 --harder-range 10-12",
}
NEXT_STEPS = """make bench-puzzles
python -m benchmarks.puzzles --puzzles sudoku9 --seeds 1
python -m benchmarks.puzzles --puzzles mazes --seeds 1
python -m benchmarks.puzzles --puzzles graphs --seeds 1"""


def prepare(step: Steps, processes: int, name: str = "sudoku6") -> None:
    """Puzzles, of PUZZLES, as shards in data/NAME; they are made unless they are there."""
    folder = Path("data") / name
    if not (folder / "harder" / "manifest.json").exists():
        where = "--output", str(folder), "--workers", str(processes), "--resume"
        step("prepare", "1. make puzzles", "ebt_megatron.data_prep.puzzles", *PUZZLES[name].split(), *where)


def curves(suites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Solved against steps, as trained on and harder, and against FLOPs; `suites` by the model's name."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.6), layout="constrained")
    panels = [("validation", "steps"), ("harder", "steps"), ("validation", "flops")]
    for axes, (split, by) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for name, of in suites.items():
            rows = of[split]["steps"]
            axes.plot([row[by] for row in rows], [100 * row["solved"] for row in rows], marker="o", label=name)
        axes.set(xscale="log", xlabel="thinking steps" if by == "steps" else "FLOPs a puzzle", title=SPLITS[split])
        axes.grid(alpha=0.3)
        if by == "steps":
            axes.axvline(2, color="grey", linestyle=":")
    figure.axes[0].set_ylabel("solved whole, %")
    figure.axes[0].legend()
    return figure


def filling_in(followed: Mapping[str, Any], steps: int) -> Figure:
    """A puzzle after a step: clues bold, right symbols green, wrong ones red, as strong as they are believed."""
    from matplotlib.figure import Figure

    figure = Figure((3.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[], aspect="equal")
    energy = followed["energies"][steps - 1] if steps else None
    axes.set_title("the question" if energy is None else f"step {steps}, energy {energy:.1f}")
    for line in range(1, SIDE):
        axes.axhline(line, color="grey", linewidth=2 if line % 2 == 0 else 0.4)
        axes.axvline(line, color="grey", linewidth=2 if line % 3 == 0 else 0.4)
    for cell, clue in enumerate(followed["clues"]):
        place = cell % SIDE + 0.5, cell // SIDE + 0.5
        if clue:
            axes.text(*place, str(clue), ha="center", va="center", fontsize=16, weight="bold")
        elif steps:
            symbol, p = followed["grids"][steps - 1][cell], followed["probabilities"][steps - 1][cell]
            colour = "green" if symbol == followed["answer"][cell] else "red"
            axes.text(*place, str(symbol), ha="center", va="center", fontsize=16, color=colour, alpha=max(0.15, p))
    return figure


def moving(followed: Mapping[str, Any]) -> bytes:
    """The puzzle filling in, as an animated GIF."""
    from PIL import Image

    frames = []
    for steps in range(len(followed["grids"]) + 1):
        drawn = io.BytesIO()
        filling_in(followed, steps).savefig(drawn, dpi=80)
        frames.append(Image.open(drawn).convert("P"))
    out = io.BytesIO()
    shown = [900] * (len(frames) - 1) + [4000]  # milliseconds
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0)
    return out.getvalue()


def write_report(runs: Path) -> dict[str, Path]:
    """The report of the trained runs in a folder."""
    from ebt_megatron.evaluation.page import Page
    from ebt_megatron.evaluation.puzzle_suite import puzzle_tables

    suites = {label: json.loads((runs / name / "suite.json").read_text()) for name, label in MODELS.items()}
    page = Page("Where thinking pays: Sudoku of 6 x 6, on this machine")
    page.figure("solved", "Puzzles solved whole; dotted: the steps that were trained.", lambda: curves(suites))
    followed = suites["EBT"]["followed"]
    caption = "A puzzle filling in, a step at a time: bold what is given, green what is right, as sure as it is strong."
    page.picture("filling-in.gif", moving(followed), caption)
    for label, numbers in suites.items():
        for table in puzzle_tables(numbers):
            table.title = f"{label}, {table.title}"
            page.table(table)
    page.text("How to go on", NEXT_STEPS)
    return page.write(runs / "report")


def main(
    runs: Path = typer.Option(RUNS, help="Where the runs go."),
    override: list[str] = OVERRIDE,
    processes: int = PROCESSES,
) -> None:
    """Make puzzles, train an energy and two baselines, and write the report."""

    def work(step: Steps) -> None:
        prepare(step, processes)
        for number, name in enumerate(MODELS, 2):
            output = f"training.output_dir={runs / name}"
            step.train(number, name, f"recipes/puzzles/sudoku6_{name}.yaml", processes, output, UPDATES, *override)
        for number, name in enumerate(MODELS, 2 + len(MODELS)):
            if not (runs / name / "suite.json").exists():
                step.evaluate(number, name, runs / name, EVALUATED, "--suite", "--shift", f"harder={DATA / 'harder'}")
        step.done(write_report(runs), NEXT_STEPS)

    Steps.run("make puzzles", work)


if __name__ == "__main__":
    typer.run(main)
