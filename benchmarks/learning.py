"""Benchmark learning: EBTs and Transformer++ trained on the quickstart's shards, several seeds each.

    python -m benchmarks.learning                        # the table and plot of docs/learning.md
    python -m benchmarks.learning --seeds 1 --model S1 --model Transformer++

Every model is trained by the same command as any run, on one process, for the same tokens; Transformer++ also for as
many FLOPs as S1 takes, on more tokens and with a schedule of that length, and so much wider that a token costs it at
inference what it costs S2. A run that is done is not repeated, and one
that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.seeds import Interval, Model, once, resolved_recipe, run_folder, steps_at, text_of, train, write_results
from benchmarks.step import machine
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.files import write_whole
from ebt_megatron.model.flops import cost
from ebt_megatron.objectives.flops import training_flops
from examples.quickstart import DATA, prepare
from examples.steps import Steps

LINEAR, QUADRATIC = "model.energy_head=linear", "model.energy_head=quadratic"  # the paper's is linear
MODELS = {
    "S1": Model("quickstart_s1", (LINEAR, "thinking.learned_steps=null")),
    "S1, one of two losses drawn": Model("quickstart_s1", (LINEAR, "thinking.learned_steps=1")),
    "S1, quadratic energy, one of two losses drawn": Model("quickstart_s1"),
    "S1, quadratic energy": Model("quickstart_s1", (QUADRATIC, "thinking.learned_steps=null")),
    "S2": Model("quickstart_s2"),
    "S2, quadratic energy": Model("quickstart_s2", (QUADRATIC, "thinking.step_size=10")),
    "EBT from its context": Model("quickstart_context"),
    "Transformer++": Model("quickstart_transformer"),
    "Transformer++, FLOPs of S1": Model("quickstart_transformer", flops_of="S1"),
    # The EBT from its context has 1.3 times the weights of its Transformer++: the prediction embedding.
    "Transformer++, parameters of EBT from its context": Model("quickstart_transformer", ("model.hidden_size=116",)),
    "Transformer++, FLOPs of EBT from its context": Model("quickstart_transformer", flops_of="EBT from its context"),
    "Transformer++, inference FLOPs of EBT from its context": Model(
        "quickstart_transformer", ("model.num_layers=3", "model.hidden_size=160", "optimizer.lr=2.4e-3")
    ),
    # A token costs 0.97 of what one costs S2 at three steps.
    "Transformer++, inference FLOPs of S2": Model(
        "quickstart_transformer",
        ("model.num_layers=5", "model.hidden_size=192", "model.num_attention_heads=4", "optimizer.lr=2e-3"),
    ),
}
# The rows of the paper's ablation of S2; the quickstart's has no replay.
ABLATION = {
    "S2": MODELS["S2"],
    "S2, fixed step size": Model("quickstart_s2", ("thinking.step_size_scale=1",)),
    "S2, always three steps": Model("quickstart_s2", ("thinking.min_steps=3",)),
    "S2, no Langevin noise": Model("quickstart_s2", ("thinking.langevin_noise=0",)),
    "S2, with replay": Model("quickstart_s2", ("thinking.replay.enabled=true",)),
}
STARTS = 5  # of the ablation's self-verification


def recipe_of(name: str, seed: int, data: Path, runs: Path, steps: int, vocab_size: int) -> Recipe:
    """The recipe of one run, its number of steps resolved."""

    def load(model: Model, steps: int | None) -> Recipe:
        return load_recipe(
            Path("recipes/text") / f"{model.recipe}.yaml",
            [
                *model.overrides,
                "training.micro_batch_size=8",
                f"data.train=[{data}/train]",
                f"data.validation=[{data}/validation]",
                f"training.seed={1234 + seed}",
                f"training.steps={steps}",
                f"training.output_dir={run_folder(runs, name, seed)}",
            ],
        )

    def flops(recipe: Recipe) -> float:
        return recipe.training.steps * training_flops(recipe, cost(recipe, vocab_size))

    return resolved_recipe(MODELS | ABLATION, name, load, flops, steps)


def run(recipe: Recipe, most_steps: int, starts: int = 0) -> dict[str, Any]:
    """Train and evaluate, unless that is done; returns the evaluation, with the run's metrics.

    Args:
        recipe: of the run.
        most_steps: of the evaluation.
        starts: also run the suite with so many, as "suite" in what is returned.
    """
    folder = Path(recipe.training.output_dir)
    thinking = ["--steps", str(most_steps)] if recipe.model.architecture == "ebt" else []
    evaluation, rows = train(recipe, *thinking)
    suite = None
    if starts:
        once(folder / "suite.json", "ebt_megatron.evaluate", str(folder), "--suite", "--starts", str(starts))
        suite = json.loads((folder / "suite.json").read_text())
    return evaluation | {"metrics": rows, "suite": suite}


def summary(name: str, results: list[dict[str, Any]], flops: float) -> dict[str, Any]:
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
    best = [min(row["perplexity"] for row in r["thinking"][trained - 1 :]) for r in results]
    return {
        "name": name,
        "seeds": len(results),
        "trained_steps": steps,
        "parameters": results[0]["parameters"],
        "tokens": results[0]["tokens"],
        "flops": flops,
        "positions": results[0]["positions"],
        "thinking": thinking,
        "gains": more,
        "loss": thinking[trained - 1]["loss"],
        "gain_over_first_step": vars(Interval.of(gains)),
        "perplexity_over_best_with_more_steps": vars(
            Interval.of([r["thinking"][trained - 1]["perplexity"] / b - 1 for r, b in zip(results, best, strict=True)])
        ),
        "seconds_a_step": statistics.median(row["step_seconds"] for r in results for row in r["metrics"]),
        "curve": [
            [row["tokens"], row["validation_loss"]]
            for row in results[0]["metrics"]
            if row.get("validation_loss") is not None
        ],
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables, for people."""
    where = results["machine"]
    lines = [
        f"Learning on {where['machine']}, torch {where['torch']}, {where['date']}. Mean ± half-width of the 95 % "
        "interval over seeds.",
        "",
        "| model | weights (k) | tokens (M) | FLOPs (T) | s / step | trained steps | validation loss "
        "| gain over own first row | perplexity above its best with more steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["models"]:
        think = len(row["thinking"]) > 1
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e3:.0f} | {row['tokens'] / 1e6:.2f} | "
            f"{row['flops'] / 1e12:.1f} | {row['seconds_a_step']:.3f} | "
            f"{row['trained_steps']} | {text_of(row['loss'])} | "
            f"{text_of(row['gain_over_first_step'], 1, 100, ' %') if think else '-'} | "
            f"{text_of(row['perplexity_over_best_with_more_steps'], 1, 100, ' %') if think else '-'} |"
        )
    gains = [row for row in results["models"] if row["gains"]]
    if gains:
        names = list(gains[0]["gains"])
        lines += [
            "",
            "Perplexity gained over the trained number of steps: by the most steps evaluated (longer), and "
            f"by {STARTS} starts, of which one is kept, or which are averaged:",
            "",
            f"| model | {' | '.join(names)} |",
            "| --- |" + " --- |" * len(names),
        ]
        for row in gains:
            cells = [text_of(row["gains"][n], 1, 100, " %") for n in names]
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    for row in results["models"]:
        if len(row["thinking"]) == 1:
            continue
        lines += [
            "",
            f"{row['name']}, thinking (trained with {row['trained_steps']} steps):",
            "",
            "| steps | cross-entropy | perplexity | most likely token right | changed by the step |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {t['steps']} | {text_of(t['loss'])} | {text_of(t['perplexity'], 1)} | "
            f"{text_of(t['accuracy'], 1, 100, ' %')} | {text_of(t['changed'], 1, 100, ' %')} |"
            for t in row["thinking"]
        ]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
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
    write_whole(path, png_of(figure))


def main(
    model: list[str] = typer.Option(
        [], help="Which: " + "; ".join({**MODELS, **ABLATION}) + "; default: those without the ablation's."
    ),
    ablation: bool = typer.Option(False, "--ablation", help="S2 and the rows of its ablation, with self-verification."),
    seeds: int = typer.Option(3, min=1, max=10, help="Runs of each model."),
    steps: int = typer.Option(1200, min=1, help="Optimizer steps of 8 x 128 tokens."),
    data: Path = typer.Option(DATA, help="Shards of text; the quickstart's are prepared if they are not there."),
    runs: Path = typer.Option(Path("runs/learning"), help="Where the runs go; what is done there is not repeated."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs."),
) -> None:
    """Train every model with every seed and write a table and a plot."""
    from ebt_megatron.data.manifest import read_manifest

    console = Console(width=160)
    model = model or list(ABLATION if ablation else MODELS)
    for name in model:
        if name not in MODELS | ABLATION:
            raise typer.BadParameter(f"no model '{name}': choose of {'; '.join(MODELS | ABLATION)}")
    if data == DATA:
        prepare(Steps("make bench-learning"), os.cpu_count() or 1, 16)
    elif not (data / "train" / "manifest.json").exists():
        raise typer.BadParameter(f"no shards at {data}: ebt-prepare text makes them")
    vocab_size = read_manifest(str(data / "train")).vocab_size
    jobs = [(name, seed) for seed in range(seeds) for name in model]
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in model}
    flops: dict[str, float] = {}
    for name, seed in track(jobs, description="train", console=console, transient=True):
        recipe = recipe_of(name, seed, data, runs, steps, vocab_size)
        thinks = recipe.thinking.max_steps
        flops[name] = recipe.training.steps * training_flops(recipe, cost(recipe, vocab_size))
        done[name].append(run(recipe, max(10, 3 * thinks), STARTS if ablation else 0))
        rows = done[name][-1]["thinking"]
        shown = rows[: steps_at(rows, thinks if recipe.model.architecture == "ebt" else 1) + 1]
        console.print(f"{name}, seed {seed}: loss " + ", ".join(f"{row['loss']:.4f}" for row in shown))
    results = {"machine": machine(), "models": [summary(name, done[name], flops[name]) for name in model]}
    text = markdown(results)
    console.print(text, markup=False, highlight=False)
    write_results(output or runs, "ablation" if ablation else "learning", results, text, plot)


if __name__ == "__main__":
    typer.run(main)
