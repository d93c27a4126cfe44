"""A report of EBT runs beside their baseline: HTML with inlined plots, and Markdown."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ebt_megatron.evaluation.page import Page

EBT_COLOURS, BASELINE_COLOUR, NEUTRAL = ("#c8442d", "#e0962e", "#8a3ea8", "#2f8f5b"), "#2d5fc8", "#777777"
_DASHES = ("-", "--", ":", "-.")


@dataclass
class Run:
    """What a run directory says about itself."""

    label: str
    path: Path
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, path: Path, label: str) -> Run:
        """Read metrics.jsonl and evaluation.json of a run that the report calls `label`.

        Raises:
            FileNotFoundError: naming what is missing and the command that makes it.
        """
        for name, how in (("metrics.jsonl", "train it first"),
                          ("evaluation.json", f"python -m ebt_megatron.evaluate {path}")):  # fmt: skip
            if not (path / name).exists():
                raise FileNotFoundError(f"{path / name} is missing: {how}")
        lines = (path / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads((path / "evaluation.json").read_text())
        return cls(label, path, [json.loads(line) for line in lines], evaluation)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, value) of every logged step that has the key."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["tokens"] for row in rows], [row[key] for row in rows]


def figure_of(width: float = 6.4) -> tuple[Any, Any]:
    """A figure and its axes, plain."""
    figure, axes = plt.subplots(figsize=(width, 3.8), dpi=110)
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def png_of(figure: Any) -> bytes:
    """The figure as a picture; it is closed."""
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def plot_losses(ebts: Sequence[Run], baseline: Run) -> bytes:
    """Training and validation loss of all models against tokens."""
    figure, axes = figure_of()
    for run, colour in ((baseline, BASELINE_COLOUR), *zip(ebts, EBT_COLOURS, strict=False)):
        axes.plot(*run.series("final_step_loss"), color=colour, alpha=0.35, lw=1)
        axes.plot(*run.series("validation_loss"), "o-", color=colour, ms=3, label=f"{run.label}, validation")
    entropy = baseline.evaluation["unigram_entropy"]
    axes.axhline(entropy, color=NEUTRAL, ls="--", lw=1)
    axes.annotate("unigram entropy", (axes.get_xlim()[1], entropy), ha="right", va="bottom", color=NEUTRAL, fontsize=8)
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)", title="Loss against tokens (faint: training)")
    axes.legend(frameon=False)
    return png_of(figure)


def plot_start(ebts: Sequence[Run], baseline: Run) -> bytes:
    """The start of training: the loss after each step, tokens on a logarithmic axis; and the step size."""
    figure, (losses, sizes) = plt.subplots(1, 2, figsize=(9.2, 3.8), dpi=110, width_ratios=(2, 1))
    for axes in (losses, sizes):
        _plain(axes)
        axes.set(xlabel="training tokens", xscale="log")
    losses.plot(*baseline.series("loss"), color=BASELINE_COLOUR, lw=1, label=baseline.label)
    for run, colour in zip(ebts, EBT_COLOURS, strict=False):
        rows = [row for row in run.metrics if row.get("step_losses")]
        for step in range(max((len(row["step_losses"]) for row in rows), default=0)):
            seen = [row for row in rows if len(row["step_losses"]) > step]
            losses.plot([row["tokens"] for row in seen], [row["step_losses"][step] for row in seen], color=colour, lw=1,
                        ls=_DASHES[step % len(_DASHES)], label=f"{run.label}, after step {step + 1}")  # fmt: skip
        tokens, alpha = run.series("alpha")
        sizes.plot(tokens, alpha, color=colour, label=run.label)
    losses.axhline(baseline.evaluation["unigram_entropy"], color=NEUTRAL, ls="--", lw=1)
    losses.set(ylabel="training loss", title="Start of training: loss after each step")
    losses.legend(frameon=False, fontsize=8)
    sizes.set(ylabel="step size alpha", title="Step size")
    sizes.legend(frameon=False, fontsize=8)
    return png_of(figure)


def plot_thinking(ebts: Sequence[Run], baseline: Run) -> bytes:
    """Validation perplexity against the number of thinking steps; a ring marks the steps trained with."""
    figure, axes = figure_of()
    for run, colour in zip(ebts, EBT_COLOURS, strict=False):
        rows = run.evaluation["thinking"]
        axes.plot([r["steps"] for r in rows], [r["perplexity"] for r in rows], "o-", color=colour, label=run.label)
        trained = next(r for r in rows if r["steps"] == run.evaluation["trained_steps"])
        axes.plot(trained["steps"], trained["perplexity"], "o", ms=12, mfc="none", color=colour)
    axes.axhline(baseline.evaluation["thinking"][-1]["perplexity"], color=BASELINE_COLOUR, ls="--",
                 label=f"{baseline.label} (cannot think longer)")  # fmt: skip
    most = max(len(run.evaluation["thinking"]) for run in ebts)
    axes.set(xlabel="thinking steps (ring: as trained)", ylabel="validation perplexity", yscale="log",
             title="Perplexity against thinking", xticks=range(1, most + 1))  # fmt: skip
    axes.legend(frameon=False)
    return png_of(figure)


def plot_energy(ebts: Sequence[Run]) -> bytes:
    """Mean energy before and after every step, each step on a scale of its own: landscapes do not compare."""
    most = max(len(run.evaluation["example"]["mean_energies"]) for run in ebts)
    figure, grid = plt.subplots(len(ebts), most, figsize=(1.7 * most + 0.6, 2.5 * len(ebts)), dpi=110, squeeze=False)
    for run, colour, row in zip(ebts, EBT_COLOURS, grid, strict=False):
        pairs = run.evaluation["example"]["mean_energies"]
        for step, axes in enumerate(row):
            if step >= len(pairs):
                axes.set_visible(False)
                continue
            axes.plot([0, 1], pairs[step], "o-", color=colour)
            change = pairs[step][1] - pairs[step][0]
            axes.set_title(f"step {step + 1}: {change:+.3g}", fontsize=9)
            axes.set(xticks=[0, 1], xlim=(-0.3, 1.3))
            axes.set_xticklabels(["before", "after"], fontsize=8)
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.tick_params(axis="y", labelsize=7)
            _plain(axes)
        row[0].set_ylabel(f"{run.label}\nmean energy", fontsize=9)
    return png_of(figure)


def plot_example(ebt: Run) -> bytes:
    """One token's predicted distribution after each step."""
    example = ebt.evaluation["example"]
    states = example["states"]
    figure, all_axes = plt.subplots(1, len(states), figsize=(2.5 * len(states), 3.6), dpi=110, sharex=True)
    for axes, state in zip(all_axes, states, strict=True):
        names = [repr(t["token"])[1:-1] for t in state["top"]]
        colours = [EBT_COLOURS[0] if t["token"] == example["target"] else NEUTRAL for t in state["top"]]
        axes.barh(names[::-1], [t["probability"] for t in state["top"]][::-1], color=colours[::-1])
        pair = state["energies"]
        descent = f"\nenergy {pair[0]:.3f} → {pair[1]:.3f}" if pair else "\n(the start)"
        axes.set_title(f"after {state['steps']} steps{descent}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _cost_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["model", "tokens", "validation loss", "perplexity", "tokens/s", "s / step", "peak memory MB",
             "GFLOP/s", "data wait"]]  # fmt: skip
    for run in runs:
        timed = run.metrics[len(run.metrics) // 2 :]
        middle = sorted(timed, key=lambda row: row["step_seconds"])[len(timed) // 2]
        wait = sum(r.get("data_wait_seconds", 0.0) for r in timed) / sum(r["step_seconds"] for r in timed)
        final = next(r for r in run.evaluation["thinking"] if r["steps"] == run.evaluation["trained_steps"])
        rows.append([
            run.label, f"{run.metrics[-1]['tokens']:,}", _number(final["loss"]), _number(final["perplexity"], 1),
            _number(middle["tokens_per_second"], 0), _number(middle["step_seconds"]),
            _number(max(r["peak_memory_bytes"] for r in run.metrics) / 1e6, 0),
            _number(middle["model_flops_per_second"] / 1e9, 1), f"{100 * wait:.2f} %",
        ])  # fmt: skip
    return rows


def _thinking_rows(ebt: Run) -> list[list[str]]:
    rows = [
        ["thinking steps", "validation loss", "perplexity", "most likely token is right", "... changed by the step"]
    ]
    for row in ebt.evaluation["thinking"]:
        note = " (trained)" if row["steps"] == ebt.evaluation["trained_steps"] else ""
        changed = "-" if row["changed"] is None else f"{100 * row['changed']:.1f} %"
        rows.append([f"{row['steps']}{note}", _number(row["loss"]), _number(row["perplexity"], 1),
                     f"{100 * row['accuracy']:.1f} %", changed])  # fmt: skip
    return rows


def write_report(
    ebt_dirs: dict[str, Path], baseline_dir: Path, output: Path, title: str, next_steps: str
) -> dict[str, Path]:
    """Write report.html, report.md and the plots into `output`.

    Args:
        ebt_dirs: by label, run directories with metrics.jsonl and evaluation.json; the last one's example is shown.
        baseline_dir: the Transformer++'s.
        output: folder to write to.
        title: heading.
        next_steps: plain text, how to go on from here.

    Returns:
        Paths by name ("html", "markdown" and each plot).
    """
    ebts = [Run.read(path, label) for label, path in ebt_dirs.items()]
    baseline = Run.read(baseline_dir, "Transformer++")
    plots = {
        "loss": (plot_losses(ebts, baseline), "All models see the same tokens in the same order."),
        "start": (plot_start(ebts, baseline), "The first tokens stretched out: how long each model only learns how "
                  "often tokens occur (the dashed line), and how the learned step size moves."),
        "thinking": (plot_thinking(ebts, baseline), "For each model, only the number of steps at evaluation differs. "
                     "A gain over a first step that was never trained (loss on the last step only) says little."),
        "energy": (plot_energy(ebts), "One batch of validation samples."),
    }  # fmt: skip
    example = ebts[-1].evaluation["example"]
    caption = f"Next token after “…{example['context']}”; the true one, {example['target']!r}, in red."
    plots["example"] = (plot_example(ebts[-1]), f"{ebts[-1].label}. {caption}")
    tables = [("Speed and memory", _cost_rows([*ebts, baseline])),
              *((f"Thinking longer: {ebt.label}", _thinking_rows(ebt)) for ebt in ebts)]  # fmt: skip
    page = Page(title)
    for name, (png, caption) in plots.items():
        page.picture(f"{name}.png", png, caption)
    for heading, rows in tables:
        page.table(heading, rows)
    page.text("How to go on", next_steps)
    return page.write(output)
