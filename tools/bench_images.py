"""Benchmark denoising: EBTs and DiTs trained on Fashion-MNIST, several seeds each; probes, and other pictures.

    python -m tools.bench_images                        # the tables and the plot of docs/images.md
    python -m tools.bench_images --seeds 1 --model DiT

All see the same pictures; a DiT is also trained for as many FLOPs as an EBT takes. A run that is done is not repeated,
and one that was stopped goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import track

from ebt_megatron.core.cli import guarded
from ebt_megatron.data.shards import read_manifest
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.model.flops import joint_cost

from .bench import machine
from .images import DATA, OTHERS, prepare, prepare_others
from .seeds import Bench, Interval, Model, seconds_a_step, text_of, train_and_evaluate, write_results
from .steps import Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {
    "EBT S1": Model("images/quickstart_s1"),
    "DiT, FLOPs of S1": Model("images/quickstart_dit", flops_of="EBT S1"),
    "EBT S1, two steps": Model("images/quickstart_s1", ("thinking.min_steps=2", "thinking.max_steps=2")),
    "EBT S2": Model("images/quickstart_s2"),
    "DiT": Model("images/quickstart_dit"),
    "DiT, FLOPs of S1 two steps": Model("images/quickstart_dit", flops_of="EBT S1, two steps"),
}
QUALITIES = ("psnr", "ssim", "mse")


def over_seeds(results: Sequence[Any]) -> Any:
    """The same nest of dictionaries and lists, with an interval over seeds for every number that varies by seed."""
    first = results[0]
    if isinstance(first, Mapping):
        return {key: over_seeds([r[key] for r in results]) for key in first}
    if isinstance(first, list):
        return [over_seeds(parts) for parts in zip(*results, strict=True)]
    return vars(Interval.of(results)) if isinstance(first, float) else first


def summary(name: str, results: list[dict[str, Any]], pictures: int, flops: float) -> dict[str, Any]:
    """One model's numbers over its seeds."""
    parts = ("trained steps", "parameters", "denoising", "other pictures", "probe")
    return {"name": name, "seeds": len(results), "pictures": pictures, "flops": flops,
            "seconds_a_step": seconds_a_step(results),
            **over_seeds([{key: r[key] for key in parts if key in r} for r in results]),
            "places": [[r["probe"]["layer"], r["probe"]["level"]] for r in results]}  # fmt: skip


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
            chosen = {p["passes"]: p for p in (points[0], best(points), points[-1])}
            trained = next((p for p in points if p["passes"] == model["trained steps"]), points[0])
            chosen |= {trained["passes"]: trained}
            rows += [[model["name"], str(n), *_qualities(chosen[n])] for n in sorted(chosen)]
        out.append(Table(f"Denoising from level {level}: the first, the trained, the best and the most passes",
                         ["model", "passes", "PSNR, dB", "SSIM", "MSE"], rows))  # fmt: skip
    probed = [m for m in models if "probe" in m]
    out.append(Table(
        "Linear probe: test accuracy",
        ["model", "features", "(layer, level) of each seed", "last layer, no noise", "before training"],
        [[m["name"], text_of(m["probe"]["features"], 1, True), "; ".join(f"{a}, {b}" for a, b in m["places"]),
          text_of(m["probe"]["last layer"], 1, True), text_of(m["probe"]["untrained"], 1, True)] for m in probed]
        + [["the pictures' own numbers", text_of(probed[0]["probe"]["numbers"], 1, True), "-", "-", "-"]],
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


def plot(results: dict[str, Any]) -> Figure:
    """PSNR and SSIM against passes, at both levels."""
    from ebt_megatron.evaluation.figures import EBT_COLOURS, NEUTRAL, RIVAL_COLOURS, figure_of

    levels = list(results["models"][0]["denoising"])
    figure, all_axes = figure_of(13.5, 2 * len(levels))
    colours = {True: iter(EBT_COLOURS), False: iter((*RIVAL_COLOURS, "#1d3f7a"))}
    for model in results["models"]:
        colour = next(colours[model["name"].startswith("EBT")])
        for i, level in enumerate(levels):
            points = model["denoising"][level]["passes"]
            for axes, key in zip(all_axes[2 * i :], QUALITIES[:2], strict=False):
                halves = [0.0 if math.isnan(p[key]["half"]) else p[key]["half"] for p in points]
                axes.errorbar([p["passes"] for p in points], [p[key]["mean"] for p in points], halves, fmt="o-", ms=3,
                              capsize=2, color=colour, label=model["name"])  # fmt: skip
    for i, level in enumerate(levels):
        noised = results["models"][0]["denoising"][level]["noised"]
        for axes, key, label in zip(all_axes[2 * i :], QUALITIES[:2], ("PSNR, dB", "SSIM"), strict=False):
            axes.axhline(noised[key]["mean"], color=NEUTRAL, ls="--", lw=1)
            axes.set(xscale="log", xlabel="passes", title=f"{label}, level {level}")
    all_axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


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
        step = Steps("make bench-images")
        prepare(step, [])
        prepare_others(step)
        shifts = [word for name in OTHERS for word in ("--shift", f"{name}={DATA / name / 'train'}")]
        _, channels = read_manifest(str(DATA / "train")).shape
        bench = Bench(MODELS, runs, steps, ("training.micro_batch_size=32",), lambda r: joint_cost(r, channels))
        bench.require(model)
        names = model or list(MODELS)
        jobs = [(name, seed) for seed in range(seeds) for name in names]
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        sizes: dict[str, tuple[int, float]] = {}
        for name, seed in track(jobs, description="train", console=console, transient=True):
            recipe = bench.recipe(name, seed)
            sizes[name] = recipe.training.steps * recipe.training.global_batch_size, bench.flops(recipe)
            done[name].append(train_and_evaluate(recipe, "suite.json", "--suite", *shifts))
            level, of = next(iter(done[name][-1]["denoising"].items()))
            psnr = max(p["psnr"] for p in of["passes"])
            console.print(f"{name}, seed {seed}: {psnr:.2f} dB from level {level}")
        results = {"machine": machine(), "models": [summary(name, done[name], *sizes[name]) for name in names]}
        text = markdown(results)
        console.print(text, markup=False, highlight=False)
        write_results("images", output or runs, results, text, plot(results))

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
