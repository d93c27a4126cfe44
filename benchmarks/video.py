"""Benchmark video: next-frame EBTs and Transformer++ on the films of `make video`, several seeds each.

    python -m benchmarks.video                            # the table of docs/video.md
    python -m benchmarks.video --seeds 1 --model 'EBT S1'

Every model is trained by the same command as any run, on one process, for the same frames; Transformer++ also for as
many FLOPs as S1 takes, on more frames. Each is evaluated on every set of held-out films by itself, beside repeating the
last frame. A run that is done is not repeated, and one that was stopped goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.seeds import Interval, Model, once, resolved_recipe, run_folder, steps_at, train, write_results
from benchmarks.step import machine
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.cli import quiet_libraries
from ebt_megatron.core.files import write_whole
from ebt_megatron.data.folder import ShardFolder
from examples.films import held_out, prepare
from examples.steps import Steps
from examples.video import RECIPES

CONTEXT = Path("recipes/video/quickstart_context.yaml")  # not of the quickstart
MODELS = {
    "EBT S1": Model("s1"),
    "EBT S2": Model("s2"),
    "EBT from its context": Model("context"),
    "Transformer++": Model("transformer"),
    "Transformer++, FLOPs of S1": Model("transformer", flops_of="EBT S1"),
}


def _flops_of(recipe: Recipe) -> float:
    """Return the FLOPs that a training takes."""
    from ebt_megatron.objectives.flops import training_flops
    from ebt_megatron.tasks import open_task

    return recipe.training.steps * training_flops(recipe, open_task(recipe, ShardFolder(recipe.data.train[0])).cost())


def recipe_of(name: str, seed: int, runs: Path, steps: int | None) -> Recipe:
    """The recipe of one run, its number of steps resolved."""

    def load(model: Model, steps: int | None) -> Recipe:
        given = () if steps is None else (f"training.steps={steps}",)
        return load_recipe(
            (RECIPES | {"context": CONTEXT})[model.recipe],
            [
                *model.overrides,
                "training.micro_batch_size=32",
                "training.validation_interval=0",
                f"training.seed={1234 + seed}",
                f"training.output_dir={run_folder(runs, name, seed)}",
                *given,
            ],
        )

    return resolved_recipe(MODELS, name, load, _flops_of, steps)


def run(recipe: Recipe, sets: dict[str, str]) -> dict[str, Any]:
    """Train, and evaluate on every set of held-out films, unless that is done; the evaluations by set."""
    folder = Path(recipe.training.output_dir)
    _, metrics = train(recipe)
    out: dict[str, Any] = {"seconds": sum(row["step_seconds"] for row in metrics) / len(metrics), "sets": {}}
    for name, shards in sets.items():
        result = folder / f"evaluation-{name.replace(' ', '-')}.json"
        once(
            result,
            "ebt_megatron.evaluate",
            str(folder),
            f"data.validation=[{shards}]",
            "training.validation_samples=1000000",
            "--output",
            str(result),
        )
        out["sets"][name] = json.loads(result.read_text())
    return out


def summary(name: str, results: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """One model's numbers over its seeds: on every set losses, PSNR, and how much below the last frame's loss it is."""
    sets: dict[str, Any] = {}
    of_frame = recipe.video.tokens_per_side**2  # tokens, which evaluations count
    for held, first in results[0]["sets"].items():
        of_seeds = [result["sets"][held] for result in results]
        repeat, trained = first["repeat_last_loss"], steps_at(first["thinking"], first["trained_steps"])
        thinking = [
            {"steps": rows[0]["steps"]}
            | {key: vars(Interval.of([row[key] for row in rows])) for key in ("loss", "psnr")}
            for rows in zip(*(one["thinking"] for one in of_seeds), strict=True)
        ]
        gains = [1 - one["thinking"][trained]["loss"] / repeat for one in of_seeds]
        horizons = zip(*(one["loss_by_position"]["steps"][trained] for one in of_seeds), strict=True)
        sets[held] = {
            "thinking": thinking,
            "trained": thinking[trained],
            "gain": vars(Interval.of(gains)),
            "by_observed": [vars(Interval.of(values)) for values in horizons],
            "frames": first["positions"] // of_frame,
        } | {
            key: first[key]
            for key in ("repeat_last_loss", "repeat_last_psnr", "extrapolation_loss", "extrapolation_psnr")
        }
    first = next(iter(results[0]["sets"].values()))
    return {
        "name": name,
        "seeds": len(results),
        "steps": recipe.training.steps,
        "frames": first["tokens"] // of_frame,
        "flops": _flops_of(recipe),
        "seconds_a_step": Interval.of([result["seconds"] for result in results]).mean,
        "sets": sets,
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables, for people."""
    where, models = results["machine"], results["models"]
    sets = models[0]["sets"]
    lines = [
        f"Next frames on {where['machine']}, torch {where['torch']}, {where['date']}. Smooth L1 of normalised latents "
        f"on held-out films, mean ± half-width of the 95 % interval over {models[0]['seeds']} seeds; how much lower "
        "than that of the last frame again; PSNR of decoded frames in dB.",
        "",
    ]
    for held, first in sets.items():
        lines += [
            f"Held out: {held} ({first['frames']:,} frames predicted).",
            "",
            "| model | frames trained on (M) | TFLOPs | loss | below the last frame again | PSNR |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for model in models:
            own = model["sets"][held]
            loss, gain, psnr = (
                Interval(**value) for value in (own["trained"]["loss"], own["gain"], own["trained"]["psnr"])
            )
            lines.append(
                f"| {model['name']} | {model['frames'] / 1e6:.2f} | {model['flops'] / 1e12:.2f} | "
                f"{loss.text(4)} | {gain.text(1, 100)} % | {psnr.text(2)} |"
            )
        for simple, label in (("repeat_last", "the last frame again"), ("extrapolation", "extrapolation")):
            loss = first[f"{simple}_loss"]
            lines.append(
                f"| {label} | | | {loss:.4f} | {100 * (1 - loss / first['repeat_last_loss']):.1f} % | "
                f"{first[f'{simple}_psnr']:.2f} |"
            )
        lines.append("")
    thinkers = [model for model in models if len(model["sets"][next(iter(sets))]["thinking"]) > 1]
    if thinkers:
        lines += [
            f"Loss against thinking ({', '.join(sets)}):",
            "",
            "| model | steps | " + " | ".join(sets) + " |",
            "| --- | --- |" + " --- |" * len(sets),
        ]
        for model in thinkers:
            for rows in zip(*(own["thinking"] for own in model["sets"].values()), strict=True):
                losses = " | ".join(Interval(**row["loss"]).text(4) for row in rows)
                lines.append(f"| {model['name']} | {rows[0]['steps']} | {losses} |")
    return "\n".join(lines).rstrip() + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the loss against the last frame again, for each held-out set: by thinking steps, by observed frames."""
    import matplotlib.pyplot as plt

    from ebt_megatron.evaluation.figures import png_of

    sets = results["models"][0]["sets"]
    figure, axes = plt.subplots(2, len(sets), figsize=(4.3 * len(sets), 7), dpi=110, squeeze=False)
    for column, held in enumerate(sets):
        thinking, observed = axes[:, column]
        for model in results["models"]:
            own = model["sets"][held]
            rows, repeat = own["thinking"], own["repeat_last_loss"]
            means = [row["loss"]["mean"] / repeat for row in rows]
            if len(rows) > 1:
                halves = [0.0 if math.isnan(row["loss"]["half"]) else row["loss"]["half"] / repeat for row in rows]
                drawn = thinking.errorbar([row["steps"] for row in rows], means, halves, fmt="o-", ms=3, capsize=3)
                colour = drawn.lines[0].get_color()
            else:
                colour = thinking.axhline(means[0], ls="--", lw=1, color=f"C{len(thinking.lines)}").get_color()
            values = [value["mean"] for value in own["by_observed"]]
            observed.plot(range(1, len(values) + 1), values, color=colour, label=model["name"])
        thinking.axhline(1, color="grey", lw=1)
        thinking.set(title=held, xlabel="thinking steps", ylabel="loss / loss of the last frame again")
        observed.set(xlabel="observed frames", ylabel="loss (smooth L1)")
    observed.set_ylim(top=1.25 * observed.get_ylim()[1])  # room for the legend
    observed.legend(fontsize=7, ncols=2, frameon=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    write_whole(path, png_of(figure))


def main(
    model: list[str] = typer.Option([], help=f"Which: {'; '.join(MODELS)}; default: all."),
    seeds: int = typer.Option(3, min=1, max=10, help="Runs of each model."),
    steps: int | None = typer.Option(None, min=1, help="Optimizer steps; default: the recipes'."),
    runs: Path = typer.Option(Path("runs/bench-video"), help="Where the runs go; what is done is not repeated."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs."),
) -> None:
    """Train every model with every seed and write tables and a plot."""
    if unknown := [name for name in model if name not in MODELS]:
        raise typer.BadParameter(f"no model '{unknown[0]}': choose of {'; '.join(MODELS)}")
    quiet_libraries()
    console = Console(width=160)
    prepare(Steps("make bench-video"), [])
    sets, names = held_out(), model or list(MODELS)
    if {"films", "cartoons"} <= sets.keys():
        sets = {"films and cartoons": f"{sets['films']},{sets['cartoons']}"} | sets
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name, seed in track([(n, s) for s in range(seeds) for n in names], description="train", console=console):
        done[name].append(run(recipe_of(name, seed, runs, steps), sets))
    results = {
        "machine": machine(),
        "models": [summary(name, done[name], recipe_of(name, 0, runs, steps)) for name in names],
    }
    text = markdown(results)
    console.print(text, markup=False, highlight=False)
    write_results(output or runs, "video", results, text, plot)


if __name__ == "__main__":
    typer.run(main)
