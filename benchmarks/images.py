"""Benchmark denoising: EBTs and DiTs trained on Fashion-MNIST, several seeds each; probes, and other pictures.

    python -m benchmarks.images                        # the tables and the plot of docs/images.md
    python -m benchmarks.images --seeds 1 --model DiT

All see the same pictures; a DiT is also trained for as many FLOPs as an EBT takes. A run that is done is not repeated,
and one that was stopped goes on.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.seeds import Model, over_seeds, resolved_recipe, run_folder, text_of, train, write_results
from benchmarks.step import machine
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.cli import guarded
from ebt_megatron.core.files import write_whole
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.evaluation.figures import png_of
from ebt_megatron.evaluation.picture_report import Reading, curves, tables
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.model.flops import joint_cost
from ebt_megatron.objectives.flops import training_flops
from examples.images import DATA, OTHERS, prepare, prepare_others
from examples.steps import Steps

MODELS = {
    "EBT S1": Model("quickstart_s1"),
    "DiT, FLOPs of S1": Model("quickstart_dit", flops_of="EBT S1"),
    "EBT S1, two steps": Model("quickstart_s1", ("thinking.min_steps=2", "thinking.max_steps=2")),
    "EBT S2": Model("quickstart_s2"),
    "DiT": Model("quickstart_dit"),
}
OVER_SEEDS = Reading(lambda of: of["mean"], lambda of: 0.0 if math.isnan(of["half"]) else of["half"], text_of)


def recipe_of(name: str, seed: int, runs: Path, steps: int) -> Recipe:
    """The recipe of one run, its number of steps resolved."""

    def load(model: Model, steps: int | None) -> Recipe:
        return load_recipe(
            f"images/{model.recipe}",
            [
                *model.overrides,
                "training.micro_batch_size=32",
                f"training.seed={1234 + seed}",
                f"training.steps={steps}",
                f"training.output_dir={run_folder(runs, name, seed)}",
            ],
        )

    return resolved_recipe(MODELS, name, load, flops, steps)


def flops(recipe: Recipe) -> float:
    """Return the FLOPs that a training takes."""
    _, channels = read_manifest(recipe.data.train[0]).shape
    return recipe.training.steps * training_flops(recipe, joint_cost(recipe, channels))


def run(recipe: Recipe) -> dict[str, Any]:
    """Train and evaluate, unless that is done; returns the suite, with the run's metrics."""
    shifts = [word for name in OTHERS for word in ("--shift", f"{name}={DATA / name / 'train'}")]
    suite, rows = train(recipe, "--suite", *shifts, result="suite.json")
    return suite | {"metrics": rows}


def _by_name(results: dict[str, Any]) -> dict[str, Any]:
    return {model["name"]: model for model in results["models"]}


def summary(name: str, results: list[dict[str, Any]], pictures: int, flops: float) -> dict[str, Any]:
    """One model's numbers over its seeds."""
    parts = ("trained steps", "parameters", "denoising", "other pictures", "probe")
    return {
        "name": name,
        "seeds": len(results),
        "pictures": pictures,
        "flops": flops,
        "seconds_a_step": statistics.median(row["step_seconds"] for r in results for row in r["metrics"]),
        **over_seeds([{key: r[key] for key in parts if key in r} for r in results]),
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables, for people."""
    where = results["machine"]
    begin = (
        f"Denoising on {where['machine']}, torch {where['torch']}, {where['date']}. Mean ± half-width of the "
        "95 % interval over seeds.\n"
    )
    rows = [
        [m["name"], f"{m['pictures'] / 1e3:.1f}", f"{m['flops'] / 1e12:.1f}", f"{m['seconds_a_step']:.3f}"]
        for m in results["models"]
    ]
    models = Table("Models", ["model", "pictures (k)", "training TFLOPs", "s / step"], rows)
    shown = [models, *tables(_by_name(results), OVER_SEEDS)]
    return "\n".join([begin, *(f"{t.title}:\n\n{t.markdown()}\n" for t in shown)])


def plot(results: dict[str, Any], path: Path) -> None:
    """PSNR and SSIM against passes."""
    write_whole(path, png_of(curves(_by_name(results), OVER_SEEDS)))


def main(
    model: list[str] = typer.Option([], help="Which: " + "; ".join(MODELS) + "; default: all."),
    seeds: int = typer.Option(3, min=1, max=10, help="Runs of each model."),
    steps: int = typer.Option(600, min=1, help="Optimizer steps of 32 pictures."),
    runs: Path = typer.Option(Path("runs/bench-images"), help="Where the runs go; what is done is not repeated."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs."),
) -> None:
    """Train every model with every seed and write tables and a plot."""

    def work() -> None:
        console = Console(width=160)
        for name in model:
            if name not in MODELS:
                raise typer.BadParameter(f"no model '{name}': choose of {'; '.join(MODELS)}")
        step = Steps("make bench-images")
        prepare(step, [])
        prepare_others(step)
        names = model or list(MODELS)
        jobs = [(name, seed) for seed in range(seeds) for name in names]
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        sizes: dict[str, tuple[int, float]] = {}
        for name, seed in track(jobs, description="train", console=console, transient=True):
            recipe = recipe_of(name, seed, runs, steps)
            sizes[name] = recipe.training.steps * recipe.training.global_batch_size, flops(recipe)
            done[name].append(run(recipe))
            level, of = next(iter(done[name][-1]["denoising"].items()))
            psnr = max(p["psnr"] for p in of["passes"])
            console.print(f"{name}, seed {seed}: {psnr:.2f} dB from level {level}")
        results = {"machine": machine(), "models": [summary(name, done[name], *sizes[name]) for name in names]}
        text = markdown(results)
        console.print(text, markup=False, highlight=False)
        write_results(output or runs, "images", results, text, plot)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
