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

from benchmarks.seeds import over_seeds, text_of
from benchmarks.study import OUTPUT, SEEDS, Model, Study, runs_option, train
from ebt_megatron.config import Recipe
from ebt_megatron.core.cli import guarded
from ebt_megatron.evaluation.figures import png_of
from ebt_megatron.evaluation.picture_report import Reading, curves, tables
from ebt_megatron.evaluation.tables import Table
from examples.images import DATA, OTHERS, prepare, prepare_others
from examples.steps import Steps

MODELS = {
    "EBT S1": Model("images/quickstart_s1"),
    "DiT, FLOPs of S1": Model("images/quickstart_dit", flops_of="EBT S1"),
    "EBT S1, two steps": Model("images/quickstart_s1", ("thinking.min_steps=2", "thinking.max_steps=2")),
    "EBT S2": Model("images/quickstart_s2"),
    "DiT": Model("images/quickstart_dit"),
}
# What made thinking go on in puzzles (docs/puzzles.md), tried on pictures; beside "EBT S1, two steps".
_TWO = MODELS["EBT S1, two steps"].overrides
_NEAR, _AVERAGE = "thinking.starts_near_answer=0.5", "optimizer.ema_decay=0.99"
_DRAWN = "thinking.min_steps=1", "thinking.max_steps=4"
TRIALS = {
    "EBT S1, two steps, half of the starts near the picture": Model("images/quickstart_s1", (*_TWO, _NEAR)),
    "EBT S1, two steps, averaged weights": Model("images/quickstart_s1", (*_TWO, _AVERAGE)),
    "EBT S1, one to four steps": Model("images/quickstart_s1", _DRAWN),
    "EBT S1, one to four steps, near starts, averaged weights": Model(
        "images/quickstart_s1", (*_DRAWN, _NEAR, _AVERAGE)
    ),
}
OVER_SEEDS = Reading(lambda of: of["mean"], lambda of: 0.0 if math.isnan(of["half"]) else of["half"], text_of)


class Denoising(Study):
    """What models of pictures denoise, and what a probe reads out of them."""

    name, title = "images", "Denoising"
    models = MODELS | TRIALS
    given = ("training.micro_batch_size=32",)

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Train and evaluate, unless that is done; returns the suite, with the run's metrics."""
        shifts = [word for name in OTHERS for word in ("--shift", f"{name}={DATA / name / 'train'}")]
        suite, rows = train(recipe, "--suite", *shifts, result="suite.json")
        return suite | {"metrics": rows}

    def said(self, result: dict[str, Any]) -> str:
        """The best PSNR of the first level."""
        level, of = next(iter(result["denoising"].items()))
        return f"{max(p['psnr'] for p in of['passes']):.2f} dB from level {level}"

    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """One model's numbers over its seeds."""
        parts = ("trained steps", "parameters", "denoising", "other pictures", "probe")
        return {
            "name": name,
            "seeds": len(results),
            "pictures": recipe.training.steps * recipe.training.global_batch_size,
            "flops": self.flops(recipe),
            "seconds_a_step": statistics.median(row["step_seconds"] for r in results for row in r["metrics"]),
            **over_seeds([{key: r[key] for key in parts if key in r} for r in results]),
        }

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """What each model took, and the tables of the suite."""
        rows = [
            [m["name"], f"{m['pictures'] / 1e3:.1f}", f"{m['flops'] / 1e12:.1f}", f"{m['seconds_a_step']:.3f}"]
            for m in results["models"]
        ]
        models = Table("Models", ["model", "pictures (k)", "training TFLOPs", "s / step"], rows)
        return [models, *tables(_by_name(results), OVER_SEEDS)]

    def plot(self, results: dict[str, Any]) -> bytes:
        """PSNR and SSIM against passes."""
        return png_of(curves(_by_name(results), OVER_SEEDS))


def _by_name(results: dict[str, Any]) -> dict[str, Any]:
    return {model["name"]: model for model in results["models"]}


def main(
    model: list[str] = typer.Option(
        [], help="Which: " + "; ".join({**MODELS, **TRIALS}) + "; default: those without trials."
    ),
    seeds: int = SEEDS,
    steps: int = typer.Option(600, min=1, help="Optimizer steps of 32 pictures."),
    runs: Path = runs_option("runs/bench-images"),
    output: Path | None = OUTPUT,
) -> None:
    """Train every model with every seed and write tables and a plot."""

    def work() -> None:
        study = Denoising(runs, steps)
        names, step = study.chosen(model or list(MODELS)), Steps("make bench-images")
        prepare(step, [])
        prepare_others(step)
        study.conduct(names, seeds, output)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
