"""Benchmark thinking: the evaluation suite of S1 and S2 over several seeds, beside Transformer++ of equal tokens, equal
training FLOPs and equal inference FLOPs, on held-out text and on other text, near to far.

    python -m benchmarks.thinking                # trains what `make bench-learning` has not
    python -m benchmarks.thinking --seeds 1 --runs runs/learning

A run or a suite that is done is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any

import typer
from rich.progress import track

from benchmarks.learning import SHARDS, STEPS, Learning, prepared
from benchmarks.seeds import over_seeds, text_of
from benchmarks.study import OUTPUT, SEEDS, evaluated, runs_option
from ebt_megatron.core.machine import machine
from ebt_megatron.evaluation.tables import Table
from examples import other_texts

THINKERS = ("S1, quadratic energy", "S2")
BASELINES = ("Transformer++", "Transformer++, FLOPs of S1", "Transformer++, inference FLOPs of S2")
_SHARE = "flops to reach the trained steps' perplexity"
_LEFT_OUT = ("token_trace", "curve", "name", "baseline")


# --- tables ------------------------------------------------------------------------------------------
# `of` has each thinker's suite over seeds; every number in it is an interval.


def _per_model(of: dict[str, Any], part: str) -> dict[str, Any]:
    """A part of the suite that is about each model, thinkers first."""
    ours = {name: of[name][part]["this"] for name in THINKERS}
    return ours | {name: of[THINKERS[-1]][part][name] for name in BASELINES}


def _side_by_side(of: dict[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """The rows of a part of each thinker's suite, side by side; None where one has no more."""
    parts = [reduce(lambda part, key: part[key], keys, of[name]) for name in THINKERS]
    return list(zip_longest(*parts))


def models(of: dict[str, Any]) -> Table:
    """What each model is, costs and comes to."""
    head = [
        "model",
        "parameters",
        "tokens (M)",
        "training TFLOPs",
        "inference MFLOPs a token",
        "loss",
        "perplexity",
        "right, %",
    ]
    scaled = {"tokens": (1e-6, 2), "training flops": (1e-12, 1), "inference flops a token": (1e-6, 2)}
    rows = [
        [
            name,
            f"{m['parameters']['mean']:,.0f}",
            *(f"{scale * m[key]['mean']:.{digits}f}" for key, (scale, digits) in scaled.items()),
            text_of(m["loss"]),
            text_of(m["perplexity"], 1),
            text_of(m["accuracy"], 1, 100),
        ]
        for name, m in _per_model(of, "by model").items()
    ]
    return Table("Models", head, rows)


def thinking(of: dict[str, Any]) -> Table:
    """Loss and changed answers per step."""
    trained = ", ".join(f"{name} {of[name]['trained steps']['mean']:.0f}" for name in THINKERS)
    head = ["steps", *(f"loss, {n}" for n in THINKERS), *(f"answers changed, %, {n}" for n in THINKERS)]
    rows = [
        [str(i), *(text_of(c and c["loss"]) for c in cells), *(text_of(c and c["changed"], 1, 100) for c in cells)]
        for i, cells in enumerate(_side_by_side(of, "thinking"), 1)
    ]
    return Table(f"Thinking; trained steps: {trained}. S2's first step was never trained by itself", head, rows)


def starts(name: str, rows: list[dict[str, Any]]) -> Table:
    """What choosing among M starts gives."""

    def cell(by: dict[str, Any]) -> str:
        return text_of(by["perplexity"], 2) if "perplexity" in by else f"{text_of(by['accuracy'], 1, 100)} % right"

    head = ["kept", *(f"M = {row['starts']['mean']:.0f}" for row in rows)]
    return Table(
        f"{name}: best of M starts, perplexity",
        head,
        [[way, *(cell(row["by"][way]) for row in rows)] for way in rows[0]["by"]],
    )


def corruption(of: dict[str, Any]) -> Table:
    """AUROC of finding wrong tokens."""
    ways = ("token energy", "-log p")
    head = ["tokens", *(f"{way}, {name}" for name in THINKERS for way in ways), *(f"-log p, {r}" for r in BASELINES)]
    rows = [
        [
            each[0]["kind"],
            *(text_of(row[way]) for row in each for way in ways),
            *(text_of(each[-1][f"-log p, {baseline}"]) for baseline in BASELINES),
        ]
        for each in _side_by_side(of, "corruption")
    ]
    return Table("Was this token corrupted? AUROC", head, rows)


def uncertainty(of: dict[str, Any]) -> Table:
    """What a model's doubts are worth."""
    keys = ("rank correlation with loss", "AUROC of an error", "area under risk-coverage")
    rows = [
        [name, doubt, *(text_of(by[key]) for key in keys), text_of(each["calibration error"])]
        for name, each in _per_model(of, "uncertainty").items()
        for doubt, by in each["by"].items()
    ]
    return Table("Uncertainty", ["model", "doubt", *keys, "calibration error"], rows)


def adaptive(of: dict[str, Any]) -> Table:
    """Perplexity against mean steps, each token for as long as it moves."""
    head = ["tolerance", *(f"{what}, {name}" for name in THINKERS for what in ("mean steps", "perplexity"))]
    rows = [
        [f"{each[0]['tolerance']['mean']:g}", *(text_of(r[key], 2) for r in each for key in ("steps", "perplexity"))]
        for each in _side_by_side(of, "dynamic compute", "adaptive")
    ]
    shares = ", ".join(f"{name} {text_of(of[name]['dynamic compute'][_SHARE], 0, 100)} %" for name in THINKERS)
    title = (
        "Thinking until a step moves a token's prediction by less than a tolerance; the trained steps' perplexity "
        f"(within 0.5 %) is reached with this share of their FLOPs: {shares}"
    )
    return Table(title, head, rows)


def other_text(of: dict[str, Any]) -> Table:
    """How far other text is, and what thinking gives there."""
    names = (*THINKERS, *BASELINES)
    head = [
        "text",
        "shift",
        *(f"perplexity, {n}" for n in names),
        *(f"gain over first step, %, {n}" for n in THINKERS),
        *(f"AUROC by energy, {n}" for n in THINKERS),
    ]
    rows = []
    for text, far in of[THINKERS[-1]]["shifts"].items():
        here = [of[name]["shifts"][text] for name in THINKERS]
        rows.append(
            [
                text,
                text_of(far["shift"], 2),
                *(text_of(h["perplexity"][""], 1) for h in here),
                *(text_of(far["perplexity"][name], 1) for name in BASELINES),
                *(text_of(h["gain over the first step"], 1, 100) for h in here),
                *(text_of(h["AUROC of being other text, by energy"]) for h in here),
            ]
        )
    return Table("Other text", head, rows)


def facets(of: dict[str, Any]) -> Table:
    """The paper's table of facets of thinking (arXiv 2507.02092), filled by measurements instead of ticks."""
    doubts, last = _per_model(of, "uncertainty"), of[THINKERS[-1]]

    def error(name: str, doubt: str) -> str:
        return f"{doubt} {text_of(doubts[name]['by'][doubt]['AUROC of an error'])}"

    def found(rows: list[dict[str, Any]], way: str) -> str:
        return " / ".join(f"{row[way]['mean']:.3f}" for row in rows)

    rows = []
    for name in THINKERS:
        steps, suite = of[name]["thinking"], of[name]
        trained, first, best = round(suite["trained steps"]["mean"]), suite["starts"][0], suite["starts"][-1]
        kept = [text_of(row["by"]["lowest energy"]["perplexity"], 1) for row in (first, best)]
        rows.append(
            [
                name,
                f"{text_of(steps[0]['perplexity'], 1)} after 1 step, "
                f"{text_of(steps[trained - 1]['perplexity'], 1)} after {trained}, "
                f"{text_of(steps[-1]['perplexity'], 1)} after {len(steps)}",
                f"{error(name, 'energy')}, {error(name, 'entropy')}",
                found(suite["corruption"], "token energy"),
                f"perplexity {kept[0]} with one start, {kept[1]} with {best['starts']['mean']:.0f}, by energy",
            ]
        )
    for name in BASELINES:
        way = f"likeliest of the tokens drawn, {name}"
        right = [text_of(row["by"][way]["accuracy"], 1, 100) for row in (last["starts"][0], last["starts"][-1])]
        rows.append(
            [
                name,
                "one pass",
                error(name, "entropy"),
                found(last["corruption"], f"-log p, {name}"),
                f"{right[0]} % right with one token drawn, {right[1]} % with "
                f"{last['starts'][-1]['starts']['mean']:.0f}, by its own probability",
            ]
        )
    kinds = " / ".join(row["kind"] for row in last["corruption"])
    head = [
        "model",
        "computation by need: perplexity",
        "uncertainty: AUROC of an error",
        f"verification: AUROC of corrupted tokens ({kinds})",
        "choosing among candidates",
    ]
    return Table("Facets of thinking", head, rows)


class Thinking(Learning):
    """What thinking gives, by the suite of each thinker beside the baselines of its seed.

    Args:
        shifts: shards of other text, by its name.
        most_starts: to choose among.
    """

    title = "Thinking"

    def __init__(self, runs: Path, steps: int, data: Path, shifts: Mapping[str, Path], most_starts: int):
        super().__init__(runs, steps, data)
        self.name, self.shifts, self.most_starts = "thinking", shifts, most_starts

    def suite(self, name: str, seed: int) -> dict[str, Any]:
        """A run's suite, made unless it is there; baselines go by the names given."""
        folder, baselines = self.folder(name, seed), {n: self.folder(n, seed) for n in BASELINES}
        result = folder / "suite-baselines.json"
        words = ["--starts", str(self.most_starts), "--output", str(result)]
        words += [word for path in baselines.values() for word in ("--baseline", str(path))]
        words += [word for other, path in self.shifts.items() for word in ("--shift", f"{other}={path}")]
        text = json.dumps(evaluated(result, folder, "--suite", *words))
        for baseline, path in baselines.items():
            text = text.replace(path.name, baseline)
        numbers = json.loads(text)
        for part, of in (("by model", numbers.pop("models")), ("uncertainty", numbers["uncertainty"].values())):
            numbers[part] = dict(zip(("this", *baselines), of, strict=True))  # the run itself is always the first
        return numbers

    def results(self, names: Sequence[str], seeds: int) -> dict[str, Any]:
        """The suites over seeds, by thinker."""
        self.train_all(names, seeds)
        jobs = track(list(THINKERS), description="suites", console=self.console, transient=True)
        suites = {name: over_seeds([self.suite(name, seed) for seed in range(seeds)], _LEFT_OUT) for name in jobs}
        return {"machine": machine(), "seeds": seeds, "suites": suites}

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """Every table of the results."""
        of = results["suites"]
        return [
            facets(of),
            models(of),
            thinking(of),
            *(starts(name, of[name]["starts"]) for name in THINKERS),
            adaptive(of),
            corruption(of),
            uncertainty(of),
            other_text(of),
        ]

    def plot(self, results: dict[str, Any]) -> bytes:
        """Loss per step, and the gain over the first step against the shift of the text."""
        from ebt_megatron.evaluation.figures import BASELINE_COLOURS, EBT_COLOURS, NEUTRAL, figure_of, png_of

        of = results["suites"]
        figure, (thinking, gain) = figure_of(10, 2)
        for name, colour in zip(THINKERS, EBT_COLOURS, strict=False):
            losses = [row["loss"] for row in of[name]["thinking"]]
            thinking.errorbar(
                range(1, len(losses) + 1),
                [x["mean"] for x in losses],
                [x["half"] for x in losses],
                fmt="o-",
                ms=3,
                capsize=3,
                color=colour,
                label=name,
            )
            texts = sorted(of[name]["shifts"].values(), key=lambda row: row["shift"]["mean"])
            gains = [row["gain over the first step"] for row in texts]
            means, halves = ([100 * g[key] for g in gains] for key in ("mean", "half"))
            gain.errorbar(
                [row["shift"]["mean"] for row in texts],
                means,
                halves,
                fmt="o-",
                ms=3,
                capsize=3,
                color=colour,
                label=name,
            )
        for text, row in of[THINKERS[-1]]["shifts"].items():
            at = row["shift"]["mean"], 100 * row["gain over the first step"]["mean"]
            gain.annotate(text, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        for name, colour in zip(BASELINES, (*BASELINE_COLOURS, NEUTRAL), strict=True):
            loss = of[THINKERS[-1]]["by model"][name]["loss"]["mean"]
            thinking.axhline(loss, ls="--", lw=1, color=colour, label=name)
        thinking.set(xlabel="thinking steps", ylabel="validation loss (nats)")
        gain.set(
            xlabel="shift (Transformer++'s perplexity there / at home)",
            xscale="log",
            ylabel="perplexity gained over the first step, %",
        )
        for formatted in (gain.xaxis.set_major_formatter, gain.xaxis.set_minor_formatter):
            formatted("{x:g}")
        for axes in (thinking, gain):
            axes.legend(frameon=False, fontsize=8)
        return png_of(figure)


def main(
    seeds: int = SEEDS,
    steps: int = STEPS,
    starts: int = typer.Option(8, min=1, help="The most starts to choose among."),
    data: Path = SHARDS,
    other: Path = typer.Option(other_texts.OUTPUT, help="Folder of other text; prepared if it is not there."),
    runs: Path = runs_option("runs/learning"),
    output: Path | None = OUTPUT,
) -> None:
    """Train what is missing, run the suites, and write tables and a plot."""
    prepared(data, "make bench-thinking")
    other_texts.main(data / "train" / "tokenizer.json", other, 128, 600_000)
    shifts = {name: other / name / "train" for name in other_texts.TEXTS if (other / name / "train").exists()}
    Thinking(runs, steps, data, shifts, starts).conduct([*THINKERS, *BASELINES], seeds, output)


if __name__ == "__main__":
    typer.run(main)
