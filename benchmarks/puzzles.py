"""Where thinking pays: an energy of the whole grid, its recurrent twin and feed-forward networks, on puzzles.

    make bench-puzzles                                             # Sudoku of 6 x 6
    python -m benchmarks.puzzles --puzzles mazes --seeds 1

Every model is trained with several seeds, the baselines for as many updates as the energy and for as many FLOPs. Every
run is evaluated on held-out puzzles, and on harder ones than any that were trained on. What is done is not repeated.
Writes benchmarks/results/PUZZLES-cpu-DATE.{json,md,png}; of Sudoku of 6 x 6, puzzles-cpu-DATE.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.seeds import over_seeds, text_of
from benchmarks.study import Model, Study, train
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.machine import machine
from ebt_megatron.data.puzzles import Puzzle
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.tasks.puzzles import Puzzles
from examples.puzzles import PUZZLES, prepare
from examples.steps import Steps

RUNS, RESULTS = Path("runs/bench-puzzles"), Path("benchmarks/results")
BASELINE = "model.architecture=baseline"


def models(puzzles: str) -> dict[str, Model]:
    """What is trained on puzzles of `examples.puzzles.PUZZLES`."""
    recipe = f"puzzles/{puzzles}_ebt"
    recurrent = BASELINE, "puzzles.passes=2"
    out = {
        "EBT": Model(recipe),
        "recurrent": Model(recipe, recurrent),
        "recurrent, equal FLOPs": Model(recipe, recurrent, flops_of="EBT"),
        "feed-forward": Model(recipe, (BASELINE,)),
        "feed-forward, equal FLOPs": Model(recipe, (BASELINE,), flops_of="EBT"),
    }
    # A pass costs 0.95 of what 16 steps of the EBT do.
    wide = "model.num_layers=8", "model.hidden_size=176", "model.ffn_hidden_size=352", "optimizer.lr=1e-3"
    out |= {"feed-forward, inference FLOPs of 16 steps": Model(recipe, (BASELINE, *wide))}
    return out | {name: Model(recipe, overrides) for name, overrides in TRIALS.items()}


# Ways to train the EBT that were tried, beside the recipe's.
TRIALS = {
    "EBT, no starts near the answer": ("thinking.starts_near_answer=0",),
    "EBT, averaged weights": ("optimizer.ema_decay=0.99",),
    "EBT, one to three steps": ("thinking.min_steps=1", "thinking.max_steps=3"),
    "EBT, replay": ("thinking.replay.enabled=true",),
    "EBT, gradient through the steps": ("thinking.gradient=full",),
    "EBT, truncated gradient": ("thinking.gradient=truncated",),
}
SPLITS = ("validation", "harder")
PLATEAU = 0.75  # nats: below, a run has left the loss (0.86) of what a cell's own row, column and box rule out
SHOWN = (1, 2, 3, 4, 8, 16, 32)


def left_plateau(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The first logged step whose last loss is below PLATEAU; None: the run never got there."""
    return next((row["step"] for row in rows if row.get("final_step_loss", row.get("loss", PLATEAU)) < PLATEAU), None)


class Puzzling(Study):
    """How many puzzles are solved, by thinking steps and by FLOPs.

    Args:
        puzzles: a name of `examples.puzzles.PUZZLES`.
        runs, steps: as `Study`.
    """

    first_seed = 0

    def __init__(self, puzzles: str, runs: Path, steps: int | None = None):
        super().__init__(runs, steps)
        self.data, self.models = Path("data") / puzzles, models(puzzles)
        self.name, self.title = "puzzles" if puzzles == "sudoku6" else puzzles, f"Puzzles ({puzzles})"
        data = f"data.train=[{self.data / 'train'}]", f"data.validation=[{self.data / 'validation'}]"
        self.given = *data, "training.micro_batch_size=64"

    def flops(self, recipe: Recipe) -> float:
        """Return the FLOPs that a training takes."""
        puzzle = Puzzle.of_cells(recipe.data.sequence_length)
        return recipe.training.steps * training_flops(recipe, Puzzles(recipe, puzzle).cost())

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Train and evaluate, unless that is done; returns the suite, with when the plateau was left."""
        numbers, rows = train(recipe, "--suite", "--shift", f"harder={self.data / 'harder'}", result="suite.json")
        recipe = load_recipe(Path(recipe.training.output_dir) / "recipe.yaml")
        more = {"left the plateau": left_plateau(rows), "updates": recipe.training.steps, "flops": self.flops(recipe)}
        return {key: value for key, value in numbers.items() if key != "followed"} | more

    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """The runs of one model and their means."""
        return {"runs": results, "mean": over_seeds(results, ("name", "left the plateau"))}

    def results(self, names: Sequence[str], seeds: int) -> dict[str, Any]:
        """What was found by model; runs of models that are not asked for are shown where they are done."""
        models = {}
        for name in self.models:
            done = [s for s in range(seeds) if name in names or (self.folder(name, s) / "suite.json").exists()]
            if done:
                runs = [self.run(self.recipe(name, seed)) for seed in done]
                models[name] = self.summary(name, runs, self.recipe(name, done[0]))
        return {"machine": machine(), "seeds": seeds, "models": models}

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """What the runs come to."""
        out = []
        found = {name: of["runs"] for name, of in results["models"].items()}
        means = {name: of["mean"] for name, of in results["models"].items()}
        for split in SPLITS:
            rows = []
            for name, runs in found.items():
                given = [row["steps"] for row in runs[0][split]["steps"]]
                by_step = dict(zip(given, means[name][split]["steps"], strict=True))
                shares = [text_of(by_step[n]["solved"], 1, 100) if n in by_step else "" for n in SHOWN]
                rows.append([name, str(len(runs)), str(runs[0]["updates"]), f"{runs[0]['flops'] / 1e12:.1f}", *shares])
            head = ["model", "seeds", "updates", "training TFLOPs", *(f"{n} steps" for n in SHOWN)]
            out.append(Table(f"Solved whole, % ({split})", head, rows))
        rows = [[name, ", ".join(str(run["left the plateau"]) for run in runs)] for name, runs in found.items()]
        out.append(Table("The step at which each seed leaves the plateau", ["model", "steps, by seed"], rows))
        scores = ("confidence", "energy", "energy of a cell", "highest energy of a cell")
        rows = [
            [f"{name}, {split}", *(text_of(means[name][split]["verification"].get(score), 3) for score in scores)]
            for name in found
            for split in SPLITS
        ]
        out.append(Table("Solved or not, AUROC after 16 steps", ["model", *scores], rows))
        rows, picks = [], ("one start", "lowest energy", "highest confidence", "any")
        for split in SPLITS if "EBT" in means else ():
            starts = means["EBT"][split]["starts"]
            rows.append([split, *(text_of(starts[pick], 1, 100) for pick in picks)])
        out.append(Table("EBT: one of 8 starts at noise, solved after 16 steps, %", ["puzzles", *picks], rows))
        return out

    def plot(self, results: dict[str, Any]) -> bytes:
        """Solved share against steps, and against FLOPs per puzzle."""
        from matplotlib.figure import Figure

        figure = Figure((11, 4), layout="constrained")
        for axes, split, by in zip(
            figure.subplots(1, 3), (*SPLITS, SPLITS[0]), ("steps", "steps", "flops"), strict=True
        ):
            for name, of in results["models"].items():
                rows = of["runs"][0][split]["steps"]
                shares = [100 * row["solved"]["mean"] for row in of["mean"][split]["steps"]]
                axes.plot([row[by] for row in rows], shares, marker="o", label=name)
            axes.set(xscale="log", xlabel="thinking steps" if by == "steps" else "FLOPs per puzzle", title=split)
            axes.set_ylabel("solved, %")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120)
        return out.getvalue()


def main(
    puzzles: str = typer.Option("sudoku6", help=f"Which: {', '.join(PUZZLES)}; they are made if they are not there."),
    seeds: int = typer.Option(5, help="Of every model."),
    steps: int | None = typer.Option(None, help="Updates; default: the recipes'."),
    model: list[str] = typer.Option([], help="Of the table, default: all; those that are done are shown as well."),
    only: bool = typer.Option(False, help="Train and evaluate, and write no results."),
) -> None:
    """Train, evaluate and compare."""

    def work() -> None:
        if puzzles not in PUZZLES:
            raise typer.BadParameter(f"no puzzles '{puzzles}': choose of {', '.join(PUZZLES)}")
        study = Puzzling(puzzles, RUNS if puzzles == "sudoku6" else RUNS / puzzles, steps)
        names = study.chosen(model)
        prepare(Steps("make bench-puzzles"), os.cpu_count() or 1, puzzles)
        if only:
            study.train_all(names, seeds)
        else:
            study.conduct(names, seeds, RESULTS)

    quiet_libraries()
    guarded(work)


if __name__ == "__main__":
    typer.run(main)
