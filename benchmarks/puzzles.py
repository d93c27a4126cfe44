"""Where thinking pays: an energy of the whole grid, its recurrent twin and feed-forward networks on 6 x 6 Sudoku.

    make bench-puzzles

Every model is trained with several seeds, the recurrent network for as many updates as the energy and for as many
FLOPs; every run is evaluated on held-out puzzles, and on puzzles with fewer clues than any that were trained on. What
is done is not repeated. Writes benchmarks/results/puzzles-cpu-DATE.{json,md,png}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.seeds import Model, once, over_seeds, resolved_recipe, run_folder, text_of, write_results
from ebt_megatron.config import Recipe, load_recipe, to_yaml
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.data.puzzles import Puzzle
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.tasks.puzzles import Puzzles

DATA, RUNS, RESULTS = Path("data/sudoku6"), Path("runs/bench-puzzles"), Path("benchmarks/results")
MODELS = {
    "EBT": Model("puzzles/sudoku6_ebt"),
    "recurrent": Model("puzzles/sudoku6_recurrent"),
    "recurrent, equal FLOPs": Model("puzzles/sudoku6_recurrent", flops_of="EBT"),
    "feed-forward": Model("puzzles/sudoku6_feed_forward"),
    "feed-forward, 8 layers": Model("puzzles/sudoku6_feed_forward", ("model.num_layers=8",)),
}
SPLITS = ("validation", "harder")
PLATEAU = 0.75  # nats: below, a run has left the loss (0.86) of what a cell's own row, column and box rule out
SHOWN = (1, 2, 3, 4, 8, 16, 32)


def load(model: Model, steps: int | None) -> Recipe:
    """A model's recipe with other data and, if given, a number of steps."""
    given = [] if steps is None else [f"training.steps={steps}"]
    data = f"data.train=[{DATA / 'train'}]", f"data.validation=[{DATA / 'validation'}]"
    return load_recipe(model.recipe, [*data, *model.overrides, *given])


def flops(recipe: Recipe) -> float:
    """Of a whole training."""
    puzzle = Puzzle.sudoku(round(recipe.data.sequence_length**0.5))
    return recipe.training.steps * training_flops(recipe, Puzzles(recipe, puzzle).cost())


def left_plateau(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The first logged step whose last loss is below PLATEAU; None: the run never got there."""
    return next((row["step"] for row in rows if row.get("final_step_loss", row.get("loss", PLATEAU)) < PLATEAU), None)


def one(name: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Train and evaluate a model with a seed, unless it is done."""
    folder = run_folder(RUNS, name, seed)
    result = folder / "suite.json"
    if not result.exists():
        recipe = resolved_recipe(MODELS, name, load, flops, steps)
        recipe.training.seed, recipe.training.output_dir = seed, str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        asked = folder / "asked.yaml"
        asked.write_text(to_yaml(recipe))
        once(result, "ebt_megatron.train", str(asked))
        once(result, "ebt_megatron.evaluate", str(folder), "--suite", "--shift", f"harder={DATA / 'harder'}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = json.loads(result.read_text())
    recipe = load_recipe(folder / "recipe.yaml")
    return {**numbers, "left the plateau": left_plateau(rows), "updates": recipe.training.steps, "flops": flops(recipe)}


def tables(found: Mapping[str, list[dict[str, Any]]]) -> list[Table]:
    """What the runs come to."""
    out = []
    means = {name: over_seeds(runs, ("name", "left the plateau")) for name, runs in found.items()}
    for split in SPLITS:
        rows = []
        for name, runs in found.items():
            by_step = {row["steps"]: row for row in means[name][split]["steps"]} if len(runs) else {}
            by_step = {runs[0][split]["steps"][i]["steps"]: row for i, row in enumerate(means[name][split]["steps"])}
            shares = [text_of(by_step[n]["solved"], 1, 100) if n in by_step else "" for n in SHOWN]
            rows.append([name, str(len(runs)), str(runs[0]["updates"]), f"{runs[0]['flops'] / 1e12:.1f}", *shares])
        head = ["model", "seeds", "updates", "training TFLOPs", *(f"{n} steps" for n in SHOWN)]
        out.append(Table(f"Solved whole, % ({split})", head, rows))
    rows = [[name, ", ".join(str(run["left the plateau"]) for run in runs)] for name, runs in found.items()]
    out.append(Table("The step at which each seed leaves the plateau", ["model", "steps, by seed"], rows))
    scores = ("confidence", "energy", "energy of the decoded grid")
    rows = [
        [f"{name}, {split}", *(text_of(means[name][split]["verification"].get(score), 3) for score in scores)]
        for name in found
        for split in SPLITS
    ]
    out.append(Table("Solved or not, AUROC after 16 steps", ["model", *scores], rows))
    rows, picks = [], ("one start", "lowest energy", "highest confidence", "any")
    for split in SPLITS:
        starts = means["EBT"][split]["starts"]
        rows.append([split, *(text_of(starts[pick], 1, 100) for pick in picks)])
    out.append(Table("EBT: one of 8 starts at noise, solved after 16 steps, %", ["puzzles", *picks], rows))
    return out


def plot(results: dict[str, Any], path: Path) -> None:
    """Solved share against steps, and against FLOPs per puzzle."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4), layout="constrained")
    for axes, split, by in zip(figure.subplots(1, 3), (*SPLITS, SPLITS[0]), ("steps", "steps", "flops"), strict=True):
        for name, of in results["models"].items():
            rows = of["runs"][0][split]["steps"]
            shares = [100 * row["solved"]["mean"] for row in of["mean"][split]["steps"]]
            axes.plot([row[by] for row in rows], shares, marker="o", label=name)
        axes.set(xscale="log", xlabel="thinking steps" if by == "steps" else "FLOPs per puzzle", title=split)
        axes.set_ylabel("solved, %")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(
    seeds: int = typer.Option(5, help="Of every model."),
    steps: int | None = typer.Option(None, help="Updates; default: the recipes'."),
    models: list[str] = typer.Option(list(MODELS), help="Of the table; those that are done are shown as well."),
    only: bool = typer.Option(False, help="Train and evaluate, and write no results."),
) -> None:
    """Train, evaluate and compare."""

    def work() -> None:
        found: dict[str, list[dict[str, Any]]] = {}
        for name in MODELS:
            wanted = [s for s in range(seeds) if name in models or (run_folder(RUNS, name, s) / "suite.json").exists()]
            if wanted:
                found[name] = [one(name, seed, steps) for seed in wanted]
        if only:
            return
        means = {name: over_seeds(runs, ("name", "left the plateau")) for name, runs in found.items()}
        results = {"models": {name: {"runs": runs, "mean": means[name]} for name, runs in found.items()}}
        text = "\n\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables(found))
        write_results(RESULTS, "puzzles", results, f"# Puzzles\n\n{text}\n", plot)

    quiet_libraries()
    guarded(work)


if __name__ == "__main__":
    typer.run(main)
