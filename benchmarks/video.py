"""Benchmark video: next-frame EBTs and Transformer++ on the films of `make video`, several seeds each.

    python -m benchmarks.video                            # the table of docs/video.md
    python -m benchmarks.video --seeds 1 --model 'EBT S1'

Every model is trained by the same command as any run, on one process, for the same frames; Transformer++ also for as
many FLOPs as S1 takes, on more frames. Each is evaluated on every set of held-out films by itself, beside repeating the
last frame. A run that is done is not repeated, and one that was stopped goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from benchmarks.seeds import Interval, steps_at
from benchmarks.study import OUTPUT, SEEDS, Model, Study, evaluated, runs_option, train
from ebt_megatron.config import Recipe
from ebt_megatron.core.cli import quiet_libraries
from ebt_megatron.evaluation.tables import Table
from examples.films import held_out, prepare
from examples.steps import Steps

MODELS = {
    "EBT S1": Model("video/quickstart_s1"),
    "EBT S2": Model("video/quickstart_s2"),
    "EBT from its context": Model("video/quickstart_context"),
    "Transformer++": Model("video/quickstart_transformer"),
    "Transformer++, FLOPs of S1": Model("video/quickstart_transformer", flops_of="EBT S1"),
}
SIMPLE = {"repeat_last": "the last frame again", "extrapolation": "extrapolation"}


class NextFrames(Study):
    """How well models predict the next frame, on every set of held-out films by itself.

    Args:
        held: shards of each set, by its name.
    """

    name, title = "video", "Next frames"
    notes = (
        "Smooth L1 of normalised latents on held-out films; how much lower than that of the last frame again; PSNR of "
        "decoded frames in dB."
    )
    models = MODELS
    given = ("training.micro_batch_size=32", "training.validation_interval=0")

    def __init__(self, runs: Path, steps: int | None, held: Mapping[str, str]):
        super().__init__(runs, steps)
        self.held = held

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Train, and evaluate on every set of held-out films, unless that is done; the evaluations by set."""
        folder = Path(recipe.training.output_dir)
        _, metrics = train(recipe)
        out: dict[str, Any] = {"seconds": sum(row["step_seconds"] for row in metrics) / len(metrics), "sets": {}}
        for name, shards in self.held.items():
            result = folder / f"evaluation-{name.replace(' ', '-')}.json"
            out["sets"][name] = evaluated(
                result,
                folder,
                f"data.validation=[{shards}]",
                "training.validation_samples=1000000",
                "--output",
                str(result),
            )
        return out

    def said(self, result: dict[str, Any]) -> str:
        """The loss on each set."""
        rows = {held: (of["thinking"], of["trained_steps"]) for held, of in result["sets"].items()}
        losses = {held: of[steps_at(of, trained)]["loss"] for held, (of, trained) in rows.items()}
        return ", ".join(f"{loss:.4f} on {held}" for held, loss in losses.items())

    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """One model's numbers: on every set losses, PSNR, and how much below the last frame's loss it is."""
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
            "flops": self.flops(recipe),
            "seconds_a_step": Interval.of([result["seconds"] for result in results]).mean,
            "sets": sets,
        }

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """Tables of each set of held-out films, and of the loss against thinking."""
        models = results["models"]
        sets = models[0]["sets"]
        head = ["model", "frames trained on (M)", "TFLOPs", "loss", "below the last frame again", "PSNR"]
        tables = []
        for held, first in sets.items():
            rows = []
            for model in models:
                own = model["sets"][held]
                loss, gain, psnr = (
                    Interval(**value) for value in (own["trained"]["loss"], own["gain"], own["trained"]["psnr"])
                )
                taken = [f"{model['frames'] / 1e6:.2f}", f"{model['flops'] / 1e12:.2f}"]
                rows.append([model["name"], *taken, loss.text(4), f"{gain.text(1, 100)} %", psnr.text(2)])
            for simple, label in SIMPLE.items():
                below = 1 - first[f"{simple}_loss"] / first["repeat_last_loss"]
                of = [f"{first[f'{simple}_loss']:.4f}", f"{100 * below:.1f} %", f"{first[f'{simple}_psnr']:.2f}"]
                rows.append([label, "", "", *of])
            tables.append(Table(f"Held out: {held} ({first['frames']:,} frames predicted)", head, rows))
        rows = [
            [model["name"], str(steps[0]["steps"]), *(Interval(**row["loss"]).text(4) for row in steps)]
            for model in models
            if len(model["sets"][next(iter(sets))]["thinking"]) > 1
            for steps in zip(*(own["thinking"] for own in model["sets"].values()), strict=True)
        ]
        return [*tables, *([Table("Loss against thinking", ["model", "steps", *sets], rows)] if rows else [])]

    def plot(self, results: dict[str, Any]) -> bytes:
        """For each set of held-out films the loss against the last frame's: by thinking steps, by observed frames."""
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
        return png_of(figure)


def main(
    model: list[str] = typer.Option([], help=f"Which: {'; '.join(MODELS)}; default: all."),
    seeds: int = SEEDS,
    steps: int | None = typer.Option(None, min=1, help="Optimizer steps; default: the recipes'."),
    runs: Path = runs_option("runs/bench-video"),
    output: Path | None = OUTPUT,
) -> None:
    """Train every model with every seed and write tables and a plot."""
    quiet_libraries()
    sets: dict[str, str] = {}
    study = NextFrames(runs, steps, sets)
    names = study.chosen(model)
    prepare(Steps("make bench-video"), [])
    held = held_out()
    if {"films", "cartoons"} <= held.keys():
        sets["films and cartoons"] = f"{held['films']},{held['cartoons']}"
    sets |= held
    study.conduct(names, seeds, output)


if __name__ == "__main__":
    typer.run(main)
