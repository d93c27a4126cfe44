"""Benchmark learning: EBTs and Transformer++ trained on the quickstart's shards, several seeds each.

    python -m benchmarks.learning                        # the table and plot of docs/learning.md
    python -m benchmarks.learning --seeds 1 --model S1 --model Transformer++

Every model is trained by the same command as any run, on one process, for the same tokens; Transformer++ also for as
many FLOPs as S1 takes, on more tokens and with a schedule of that length, and so much wider that a token costs it at
inference what it costs S2. A run that is done is not repeated, and one
that was stopped goes on.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any

import typer

from benchmarks.seeds import Interval, steps_at, text_of
from benchmarks.study import OUTPUT, SEEDS, Model, Study, evaluated, runs_option, train
from ebt_megatron.config import Recipe
from ebt_megatron.evaluation.tables import Table
from examples.quickstart import DATA, prepare
from examples.steps import Steps

LINEAR, QUADRATIC = "model.energy_head=linear", "model.energy_head=quadratic"  # the paper's is linear
MODELS = {
    "S1": Model("text/quickstart_s1", (LINEAR, "thinking.learned_steps=null")),
    "S1, one of two losses drawn": Model("text/quickstart_s1", (LINEAR, "thinking.learned_steps=1")),
    "S1, quadratic energy, one of two losses drawn": Model("text/quickstart_s1"),
    "S1, quadratic energy": Model("text/quickstart_s1", (QUADRATIC, "thinking.learned_steps=null")),
    "S2": Model("text/quickstart_s2"),
    "S2, quadratic energy": Model("text/quickstart_s2", (QUADRATIC, "thinking.step_size=10")),
    "EBT from its context": Model("text/quickstart_context"),
    "feed-forward refinement": Model(
        "text/quickstart_transformer", ("data.modality=benchmarks.refinement:Refinement",)
    ),
    "Transformer++": Model("text/quickstart_transformer"),
    "Transformer++, FLOPs of S1": Model("text/quickstart_transformer", flops_of="S1"),
    # The EBT from its context has 1.3 times the weights of its Transformer++: the prediction embedding.
    "Transformer++, parameters of EBT from its context": Model(
        "text/quickstart_transformer", ("model.hidden_size=116",)
    ),
    "Transformer++, FLOPs of EBT from its context": Model(
        "text/quickstart_transformer", flops_of="EBT from its context"
    ),
    # On as many tokens as the EBT saw (1,200 steps of 8 samples), again and again.
    "Transformer++, FLOPs and unique tokens of EBT from its context": Model(
        "text/quickstart_transformer", ("data.unique_samples=9600",), flops_of="EBT from its context"
    ),
    "Transformer++, inference FLOPs of EBT from its context": Model(
        "text/quickstart_transformer", ("model.num_layers=3", "model.hidden_size=160", "optimizer.lr=2.4e-3")
    ),
    # A token costs 0.97 of what one costs S2 at three steps.
    "Transformer++, inference FLOPs of S2": Model(
        "text/quickstart_transformer",
        ("model.num_layers=5", "model.hidden_size=192", "model.num_attention_heads=4", "optimizer.lr=2e-3"),
    ),
}
# 4 layers of 256, where a learned step size goes to 0; and with the settings of text/context_xxs.
_SMALL_STEP = ("thinking.step_size=2", "thinking.learn_step_size=false", "thinking.first_step_std=0.1")
LARGER = {
    "Transformer++, 3xs": Model("text/quickstart_transformer", ("model.size=3xs",)),
    "EBT from its context, 3xs, step size learned": Model("text/quickstart_context", ("model.size=3xs",)),
    "EBT from its context, 3xs, equal weights": Model("text/quickstart_context", ("model.size=3xs", *_SMALL_STEP)),
    "EBT from its context, 3xs": Model(
        "text/quickstart_context", ("model.size=3xs", *_SMALL_STEP, "thinking.initial_loss_weight=3")
    ),
}
# The rows of the paper's ablation of S2; the quickstart's has no replay.
ABLATION = {
    "S2": MODELS["S2"],
    "S2, fixed step size": Model("text/quickstart_s2", ("thinking.step_size_scale=1",)),
    "S2, always three steps": Model("text/quickstart_s2", ("thinking.min_steps=3",)),
    "S2, no Langevin noise": Model("text/quickstart_s2", ("thinking.langevin_noise=0",)),
    "S2, with replay": Model("text/quickstart_s2", ("thinking.replay.enabled=true",)),
}
STARTS = 5  # of the ablation's self-verification
STEPS: int = typer.Option(1200, min=1, help="Optimizer steps of 8 x 128 tokens.")
SHARDS: Path = typer.Option(DATA, help="Shards of text; the quickstart's are prepared if they are not there.")


class Learning(Study):
    """What models of text learn.

    Args:
        data: shards of text, prepared by `prepared`.
        starts: also run the suite with so many; 0: do not.
    """

    title = "Learning"
    models = MODELS | LARGER | ABLATION

    def __init__(self, runs: Path, steps: int, data: Path, starts: int = 0):
        super().__init__(runs, steps)
        self.name, self.starts = "ablation" if starts else "learning", starts
        self.given = (
            "training.micro_batch_size=8",
            f"data.train=[{data}/train]",
            f"data.validation=[{data}/validation]",
        )

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Train and evaluate, unless that is done; returns the evaluation, with the run's metrics and its suite."""
        folder, thinks = Path(recipe.training.output_dir), recipe.model.architecture == "ebt"
        steps = ["--steps", str(max(10, 3 * recipe.thinking.max_steps))] if thinks else []
        evaluation, rows = train(recipe, *steps)
        suite = self.starts and evaluated(folder / "suite.json", folder, "--suite", "--starts", str(self.starts))
        return evaluation | {"metrics": rows, "suite": suite or None}

    def said(self, result: dict[str, Any]) -> str:
        """The losses up to the trained number of steps."""
        rows = result["thinking"]
        return "loss " + ", ".join(f"{row['loss']:.4f}" for row in rows[: steps_at(rows, result["trained_steps"]) + 1])

    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """One model's numbers over its seeds."""
        steps, thinking = results[0]["trained_steps"], []
        trained = steps_at(results[0]["thinking"], steps) + 1
        for rows in zip(*(r["thinking"] for r in results), strict=True):
            entry: dict[str, Any] = {"steps": rows[0]["steps"]}
            for key in ("loss", "perplexity", "accuracy", "changed"):
                values = [row.get(key) for row in rows]  # some are of thinking alone
                entry[key] = None if None in values else vars(Interval.of(values))
            thinking.append(entry)
        gains = [1 - r["thinking"][trained - 1]["perplexity"] / r["thinking"][0]["perplexity"] for r in results]
        more: dict[str, Any] = {}
        if results[0]["suite"]:
            for key in ("lowest energy", "even mixture", "best loss (an oracle)"):
                by = [[row["by"][key]["perplexity"] for row in r["suite"]["starts"]] for r in results]
                more[key] = vars(Interval.of([1 - several[-1] / several[0] for several in by]))
            more["longer"] = vars(
                Interval.of(
                    [1 - r["thinking"][-1]["perplexity"] / r["thinking"][trained - 1]["perplexity"] for r in results]
                )
            )
        later = [[row["perplexity"] for row in r["thinking"][trained - 1 :]] for r in results]
        return {
            "name": name,
            "seeds": len(results),
            "trained_steps": steps,
            "parameters": results[0]["parameters"],
            "tokens": results[0]["tokens"],
            "flops": self.flops(recipe),
            "positions": results[0]["positions"],
            "thinking": thinking,
            "gains": more,
            "loss": thinking[trained - 1]["loss"],
            "gain_over_first_step": vars(Interval.of(gains)),
            "perplexity_over_best_with_more_steps": vars(Interval.of([rows[0] / min(rows) - 1 for rows in later])),
            "seconds_a_step": statistics.median(row["step_seconds"] for r in results for row in r["metrics"]),
            "curve": [
                [row["tokens"], row["validation_loss"]]
                for row in results[0]["metrics"]
                if row.get("validation_loss") is not None
            ],
        }

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """What each model learned, what choosing among starts gives, and how thinking goes on."""
        models = results["models"]
        head = ["model", "weights (k)", "tokens (M)", "FLOPs (T)", "s / step", "trained steps", "validation loss"]
        head += ["gain over own first row", "perplexity above its best with more steps"]
        rows = [
            [
                row["name"],
                f"{row['parameters'] / 1e3:.0f}",
                f"{row['tokens'] / 1e6:.2f}",
                f"{row['flops'] / 1e12:.1f}",
                f"{row['seconds_a_step']:.3f}",
                str(row["trained_steps"]),
                text_of(row["loss"]),
                *(
                    text_of(row[key], 1, 100, " %") if len(row["thinking"]) > 1 else "-"
                    for key in ("gain_over_first_step", "perplexity_over_best_with_more_steps")
                ),
            ]
            for row in models
        ]
        tables = [Table("Models", head, rows)]
        if chosen := [row for row in models if row["gains"]]:
            names = list(chosen[0]["gains"])
            title = (
                "Perplexity gained over the trained number of steps: by the most steps evaluated (longer), and "
                f"by {self.starts} starts, of which one is kept, or which are averaged"
            )
            rows = [[row["name"], *(text_of(row["gains"][n], 1, 100, " %") for n in names)] for row in chosen]
            tables.append(Table(title, ["model", *names], rows))
        head = ["steps", "cross-entropy", "perplexity", "most likely token right", "changed by the step"]
        for row in models:
            if len(row["thinking"]) > 1:
                rows = [
                    [
                        str(t["steps"]),
                        text_of(t["loss"]),
                        text_of(t["perplexity"], 1),
                        text_of(t["accuracy"], 1, 100, " %"),
                        text_of(t["changed"], 1, 100, " %"),
                    ]
                    for t in row["thinking"]
                ]
                tables.append(Table(f"{row['name']}, thinking (trained with {row['trained_steps']} steps)", head, rows))
        return tables

    def plot(self, results: dict[str, Any]) -> bytes:
        """Loss against tokens, against FLOPs, and against thinking steps."""
        from matplotlib.ticker import NullFormatter

        from ebt_megatron.evaluation.figures import figure_of, png_of

        figure, (tokens, flops, thinking) = figure_of(13, 3)
        for row in results["models"]:
            seen, losses = zip(*row["curve"], strict=True)
            per_token = row["flops"] / row["tokens"]
            (line,) = tokens.plot(seen, losses, "o-", ms=3, label=row["name"])
            flops.plot([s * per_token / 1e12 for s in seen], losses, "o-", ms=3, color=line.get_color())
            if len(row["thinking"]) > 1:
                steps = [t["steps"] for t in row["thinking"]]
                means = [t["loss"]["mean"] for t in row["thinking"]]
                halves = [0.0 if math.isnan(t["loss"]["half"]) else t["loss"]["half"] for t in row["thinking"]]
                thinking.errorbar(steps, means, halves, fmt="o-", ms=3, capsize=3, color=line.get_color())
            else:
                thinking.axhline(row["loss"]["mean"], color=line.get_color(), ls="--", lw=1)
        tokens.set(xlabel="training tokens", ylabel="validation loss (nats)", title="equal tokens (first seed)")
        flops.set(xlabel="training TFLOPs", xscale="log", title="equal FLOPs (first seed)")
        flops.xaxis.set_minor_formatter(NullFormatter())
        thinking.set(xlabel="thinking steps", title="thinking (all seeds, 95 % intervals)")
        tokens.legend(frameon=False, fontsize=8)
        return png_of(figure)


def prepared(data: Path, again: str) -> Path:
    """Shards of text; the quickstart's are prepared if they are not there.

    Raises:
        typer.BadParameter: if others are not there.
    """
    if data == DATA:
        prepare(Steps(again), os.cpu_count() or 1, 16)
    elif not (data / "train" / "manifest.json").exists():
        raise typer.BadParameter(f"no shards at {data}: ebt-prepare text makes them")
    return data


def main(
    model: list[str] = typer.Option(
        [], help="Which: " + "; ".join(Learning.models) + "; default: those neither larger nor of the ablation."
    ),
    ablation: bool = typer.Option(False, "--ablation", help="S2 and the rows of its ablation, with self-verification."),
    seeds: int = SEEDS,
    steps: int = STEPS,
    data: Path = SHARDS,
    runs: Path = runs_option("runs/learning"),
    output: Path | None = OUTPUT,
) -> None:
    """Train every model with every seed and write tables and a plot."""
    study = Learning(runs, steps, data, STARTS if ablation else 0)
    names = study.chosen(model or list(ABLATION if ablation else MODELS))
    prepared(data, "make bench-learning")
    study.conduct(names, seeds, output)


if __name__ == "__main__":
    typer.run(main)
