"""Benchmark denoising: EBTs and DiTs trained on Fashion-MNIST, several seeds each; probes, and other pictures.

    python -m tools.bench_images                        # the tables and the plot of docs/images.md
    python -m tools.bench_images --seeds 1 --model DiT

All see the same pictures; a DiT is also trained for as many FLOPs as an EBT takes. A run that is done is not repeated,
and one that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.cli import guarded
from ebt_megatron.core.files import replacing
from ebt_megatron.data.shards import read_manifest
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.model.flops import joint_cost
from ebt_megatron.objectives.flops import training_flops

from .bench import machine
from .images import DATA, OTHERS, prepare, prepare_others
from .seeds import once, over_seeds, text_of, train, write_results
from .steps import Steps


@dataclass(frozen=True)
class Model:
    """What is trained: a recipe of the quickstart with changes; flops_of: for as many FLOPs as that model."""

    recipe: str
    overrides: tuple[str, ...] = ()
    flops_of: str | None = None


MODELS = {
    "EBT S1": Model("quickstart_s1"),
    "DiT, FLOPs of S1": Model("quickstart_dit", flops_of="EBT S1"),
    "EBT S1, two steps": Model("quickstart_s1", ("thinking.min_steps=2", "thinking.max_steps=2")),
    "EBT S2": Model("quickstart_s2"),
    "DiT": Model("quickstart_dit"),
    "DiT, FLOPs of S1 two steps": Model("quickstart_dit", flops_of="EBT S1, two steps"),
}
QUALITIES = ("psnr", "ssim", "mse")


def recipe_of(name: str, seed: int, runs: Path, steps: int) -> Recipe:
    """The recipe of one run, its number of steps resolved."""
    model = MODELS[name]

    def load(steps: int) -> Recipe:
        return load_recipe(f"images/{model.recipe}", [
            *model.overrides, "training.micro_batch_size=32", f"training.seed={1234 + seed}",
            f"training.steps={steps}", f"training.output_dir={runs / name.lower().replace(',', '').replace(' ', '-')}"
            f"-{seed}",
        ])  # fmt: skip

    if model.flops_of is None:
        return load(steps)
    return load(round(flops(recipe_of(model.flops_of, seed, runs, steps)) / flops(load(1))))


def flops(recipe: Recipe) -> float:
    """That a training takes."""
    _, channels = read_manifest(recipe.data.train[0]).shape
    return recipe.training.steps * training_flops(recipe, joint_cost(recipe, channels))


def run(recipe: Recipe) -> dict[str, Any]:
    """Train and evaluate, unless that is done; returns the suite, with the run's metrics."""
    _, rows = train(recipe)
    folder = Path(recipe.training.output_dir)
    shifts = [word for name in OTHERS for word in ("--shift", f"{name}={DATA / name / 'train'}")]
    once(folder / "suite.json", "ebt_megatron.evaluate", str(folder), "--suite", *shifts)
    return json.loads((folder / "suite.json").read_text()) | {"metrics": rows}


def summary(name: str, results: list[dict[str, Any]], pictures: int, flops: float) -> dict[str, Any]:
    """One model's numbers over its seeds."""
    parts = ("trained steps", "parameters", "denoising", "other pictures", "probe")
    return {"name": name, "seeds": len(results), "pictures": pictures, "flops": flops,
            "seconds_a_step": statistics.median(row["step_seconds"] for r in results for row in r["metrics"]),
            "chosen": [[r["probe"]["layer"], r["probe"]["level"]] for r in results],
            **over_seeds([{key: r[key] for key in parts if key in r} for r in results])}  # fmt: skip


def passes_of(point: Mapping[str, Any]) -> int:
    """How many a point has, the same for every seed."""
    return int(point["passes"]["mean"])


def best(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The number of passes of the highest PSNR."""
    return max(points, key=lambda p: p["psnr"]["mean"])


def _qualities(row: Mapping[str, Any]) -> list[str]:
    return [text_of(row[key], digits) for key, digits in zip(QUALITIES, (2, 3, 1), strict=True)]


def tables(results: dict[str, Any]) -> list[Table]:
    """What the results come to."""
    models, first = results["models"], results["models"][0]
    out = [
        Table("Models", ["model", "pictures (k)", "training TFLOPs", "s / step"],
              [[m["name"], f"{m['pictures'] / 1e3:.1f}", f"{m['flops'] / 1e12:.1f}", f"{m['seconds_a_step']:.3f}"]
               for m in models]),
    ]  # fmt: skip
    for level in first["denoising"]:
        rows = [["the noised picture", "-", *_qualities(first["denoising"][level]["noised"])]]
        for model in models:
            points = model["denoising"][level]["passes"]
            trained = next(p for p in points if passes_of(p) == model["trained steps"]["mean"])
            shown = {passes_of(p): p for p in (points[0], trained, best(points), points[-1])}
            rows += [[model["name"], str(n), *_qualities(shown[n])] for n in sorted(shown)]
        out.append(Table(f"Denoising from level {level}: the first, the trained, the best and the most passes",
                         ["model", "passes", "PSNR, dB", "SSIM", "MSE"], rows))  # fmt: skip
    probed = [m for m in models if "probe" in m]
    whose = ("features", "last layer", "untrained")
    out.append(Table(
        "Linear probe: test accuracy, %",
        ["model", "features", "last layer, no noise", "before training", "(layer, level) of each seed"],
        [[m["name"], *(text_of(m["probe"][key], 1, 100) for key in whose),
          "; ".join(f"{a}, {b}" for a, b in m["chosen"])]
         for m in probed]
        + [["the pictures' own numbers", text_of(first["probe"]["numbers"], 1, 100), "-", "-", "-"]],
    ))  # fmt: skip
    for name in first["other pictures"]:
        scores = list(dict.fromkeys(score for m in models for score in m["other pictures"][name]))
        out.append(Table(
            f"Telling {name} from held-out pictures: AUROC of a higher score", ["score", *(m["name"] for m in models)],
            [[score, *(text_of(m["other pictures"][name].get(score)) for m in models)] for score in scores],
        ))  # fmt: skip
    return out


def markdown(results: dict[str, Any]) -> str:
    """The tables, for people."""
    where = results["machine"]
    begin = (f"Denoising on {where['machine']}, torch {where['torch']}, {where['date']}. Mean ± half-width of the "
             "95 % interval over seeds.\n")  # fmt: skip
    return "\n".join([begin, *(f"{t.title}:\n\n{t.markdown()}\n" for t in tables(results))])


def plot(results: dict[str, Any], path: Path) -> None:
    """PSNR and SSIM against passes, at both levels."""
    from ebt_megatron.evaluation.figures import EBT_COLOURS, NEUTRAL, RIVAL_COLOURS, figure_of, png_of

    levels = list(results["models"][0]["denoising"])
    figure, all_axes = figure_of(13.5, 2 * len(levels))
    colours = {True: iter(EBT_COLOURS), False: iter((*RIVAL_COLOURS, "#1d3f7a"))}
    for model in results["models"]:
        colour = next(colours[model["name"].startswith("EBT")])
        for i, level in enumerate(levels):
            points = model["denoising"][level]["passes"]
            for axes, key in zip(all_axes[2 * i :], QUALITIES[:2], strict=False):
                halves = [0.0 if math.isnan(p[key]["half"]) else p[key]["half"] for p in points]
                axes.errorbar([passes_of(p) for p in points], [p[key]["mean"] for p in points], halves, fmt="o-", ms=3,
                              capsize=2, color=colour, label=model["name"])  # fmt: skip
    for i, level in enumerate(levels):
        noised = results["models"][0]["denoising"][level]["noised"]
        for axes, key, label in zip(all_axes[2 * i :], QUALITIES[:2], ("PSNR, dB", "SSIM"), strict=False):
            axes.axhline(noised[key]["mean"], color=NEUTRAL, ls="--", lw=1)
            axes.set(xscale="log", xlabel="passes", title=f"{label}, level {level}")
    all_axes[0].legend(frameon=False, fontsize=7)
    with replacing(path) as partial:
        partial.write_bytes(png_of(figure))


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
