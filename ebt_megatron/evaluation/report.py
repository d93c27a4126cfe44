"""A report of runs beside each other: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.evaluation import figures
from ebt_megatron.evaluation.lines import warnings_of
from ebt_megatron.evaluation.page import Page
from ebt_megatron.evaluation.run_files import RunFiles
from ebt_megatron.evaluation.tables import Table, number, percent, suite_tables


def _draw(page: Page, ebts: Sequence[RunFiles], baselines: Sequence[RunFiles]) -> None:
    """Every figure that the runs have numbers for."""
    worked = [run for run in ebts if "example" in run.evaluation]
    judged = [run for run in ebts if run.suite]
    page.figure(
        "loss",
        "All models see the same tokens in the same order, unless a label says otherwise.",
        lambda: figures.losses(ebts, baselines),
    )
    page.figure(
        "start",
        "The first tokens stretched out: how long each model only learns how often tokens occur (the "
        "dashed line of the chart above), and how the learned step size moves.",
        lambda: figures.start(ebts, baselines),
    )
    if ebts:
        page.figure(
            "thinking",
            "For each model, only the number of steps at evaluation differs. A gain over a first "
            "step that was never trained (loss on the last step only) says little.",
            lambda: figures.thinking(ebts, baselines),
        )
    if worked:
        shown = worked[-1].evaluation["example"]
        page.figure("energy", "One batch of validation samples.", lambda: figures.energies(worked))
        page.figure(
            "example",
            f"{worked[-1].label}. Next token after “…{shown['context']}”; the true one, {shown['target']!r}, in red.",
            lambda: figures.example(worked[-1]),
        )
    if judged:
        page.figure(
            "compute",
            "Every point is a mean over validation; FLOPs are counted, not timed.",
            lambda: figures.compute(judged),
        )
        page.figure(
            "starts",
            "What an energy that knew best would reach is the oracle; what chance gives is the even "
            "mixture. Where a recipe has no noise every start is the same.",
            lambda: figures.several_starts(judged),
        )
        page.figure("risk", "A doubt that knows errors falls far to the left.", lambda: figures.risk(judged))
        if any(run.suite.get("shifts") for run in judged):
            page.figure("shifts", "Far to the right is text unlike that trained on.", lambda: figures.shifts(judged))
    for i, run in enumerate(judged):
        page.figure(
            f"landscape-{i + 1}",
            f"{run.label}: energies of what the model reads of a prediction, over the "
            "plane through its start, its end (at 0, 0) and the token that comes; the two tokens that thinking "
            "changed most.",
            partial(figures.landscapes, run),
        )


def _cost_table(runs: Sequence[RunFiles]) -> Table:
    rows = []
    for run in runs:
        timed = run.metrics[len(run.metrics) // 2 :]
        middle = sorted(timed, key=lambda row: row["step_seconds"])[len(timed) // 2]
        wait = sum(r.get("data_wait_seconds", 0.0) for r in timed) / sum(r["step_seconds"] for r in timed)
        rows.append(
            [
                run.label,
                f"{run.tokens:,}",
                number(run.tokens * run.flops_a_token / 1e12, 2),
                number(run.final["loss"]),
                number(run.final.get("perplexity"), 1),
                number(middle["tokens_per_second"], 0),
                number(middle["step_seconds"]),
                number(max(r["peak_memory_bytes"] for r in run.metrics) / 1e6, 0),
                number(middle["model_flops_per_second"] / 1e9, 1),
                f"{100 * wait:.2f} %",
            ]
        )
    return Table(
        "Speed and memory",
        [
            "model",
            "tokens",
            "training TFLOPs",
            "validation loss",
            "perplexity",
            "tokens/s",
            "s / step",
            "peak memory MB",
            "GFLOP/s",
            "data wait",
        ],
        rows,
    )


def _thinking_table(run: RunFiles) -> Table:
    rows = []
    for row in run.evaluation["thinking"]:
        note = " (trained)" if row["steps"] == run.evaluation["trained_steps"] else ""
        rows.append(
            [
                f"{row['steps']}{note}",
                number(row["loss"]),
                number(row.get("perplexity"), 1),
                percent(row.get("accuracy")),
                percent(row.get("changed")),
                number(row.get("energy_drop")),
                percent(row.get("raised")),
                number(row.get("curvature"), 2),
            ]
        )
    return Table(
        f"Thinking longer: {run.label}",
        [
            "thinking steps",
            "validation loss",
            "perplexity",
            "most likely token is right",
            "... changed by the step",
            "energy drop of the step",
            "energy raised",
            "curvature along the step",
        ],
        rows,
    )


def _coloured_text(run: RunFiles) -> str:
    """A validation text: tokens shaded by energy, underlined by steps; hovering shows the predictions."""
    shown = run.suite["token_trace"]
    values = sorted(t["energy"] for t in shown["tokens"])
    most = max(t["steps"] for t in shown["tokens"])
    spans = []
    for token in shown["tokens"]:
        rank = sum(v < token["energy"] for v in values) / max(1, len(values) - 1)
        first, last = (", ".join(f"{text!r} {100 * p:.0f} %" for text, p in token[key]) for key in ("first", "last"))
        title = (
            f"energy {token['energy']:.3f}, settled after {token['steps']} steps, loss {token['loss']:.2f}\n"
            f"after the first step: {first}\nafter the last: {last}"
        )
        text = html.escape(token["text"]).replace("\n", "↵<br>")
        width = math.ceil(3 * token["steps"] / most)
        spans.append(
            f'<span title="{html.escape(title)}" style="background:rgb(200 68 45 / {0.6 * rank:.2f});'
            f'border-bottom:{width}px solid #2d6fd8">{text}</span>'
        )
    return (
        f"<h2>A text as {html.escape(run.label)} sees it</h2><p>The redder a token, the higher the energy of its "
        "prediction; the thicker the line below, the more steps until it settled. Hover over a token for what was "
        f'predicted in its place.</p><p class="text">{"".join(spans)}</p>'
    )


def _samples(run: RunFiles) -> str:
    shown = run.suite["token_trace"]["samples"]
    items = "".join(f"<li><b>{html.escape(shown['prompt'])}</b>{html.escape(text)}</li>" for text in shown["texts"])
    return f'<h2>Continued by {html.escape(run.label)}</h2><p>Temperature 0.8.</p><ol class="text">{items}</ol>'


def write_report(
    runs: Mapping[str, Path] | Sequence[Path], output: Path, title: str, next_steps: str
) -> dict[str, Path]:
    """Write report.html, report.md and the plots into `output`.

    Args:
        runs: run directories with metrics.jsonl and evaluation.json, and perhaps suite.json; by label, or by the names
            of their recipes, and their folders where these are alike.
        output: folder to write to.
        title: heading.
        next_steps: plain text, how to go on from here.

    Returns:
        Paths by name ("html", "markdown" and each plot).

    Raises:
        RecipeError: for a run without what is needed.
    """
    paths = runs.values() if isinstance(runs, Mapping) else runs
    read = RunFiles.read_all(list(paths), list(runs) if isinstance(runs, Mapping) else [])
    if not read:
        raise RecipeError("no run to report on")
    ebts, baselines = [r for r in read if r.thinks], [r for r in read if not r.thinks]
    page = Page(title)
    _draw(page, ebts, baselines)
    for run in ebts:
        if run.suite.get("token_trace"):
            page.html(_coloured_text(run))
            page.html(_samples(run))
    page.table(_cost_table([*ebts, *baselines]))
    for run in ebts:
        page.table(_thinking_table(run))
        for line in warnings_of(run.evaluation):
            page.text(f"Warning: {run.label}", line)
    for run in ebts:
        for table in suite_tables(run.suite) if run.suite else []:
            if not table.title.startswith("Thinking"):  # it has a table of its own above
                page.table(replace(table, title=f"{run.label}: {table.title}"))
    page.text("How to go on", next_steps)
    page.origin({run.label: run.path for run in read})
    return page.write(output)
