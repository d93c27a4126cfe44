"""A report of one EBT run beside its baseline: HTML with inlined plots, and Markdown."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EBT_COLOUR, BASELINE_COLOUR, NEUTRAL = "#c8442d", "#2d5fc8", "#777777"


@dataclass
class Run:
    """What a run directory says about itself."""

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read metrics.jsonl and evaluation.json.

        Raises:
            FileNotFoundError: naming what is missing and the command that makes it.
        """
        for name, how in (("metrics.jsonl", "train it first"),
                          ("evaluation.json", f"python -m ebt_megatron.evaluate {path}")):  # fmt: skip
            if not (path / name).exists():
                raise FileNotFoundError(f"{path / name} is missing: {how}")
        lines = (path / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads((path / "evaluation.json").read_text())
        return cls(evaluation["name"], path, [json.loads(line) for line in lines], evaluation)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, value) of every logged step that has the key."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["tokens"] for row in rows], [row[key] for row in rows]


def _figure(width: float = 6.4) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, 3.8), dpi=110)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def plot_losses(ebt: Run, baseline: Run) -> bytes:
    """Training and validation loss of both models against tokens."""
    figure, axes = _figure()
    for run, colour, name in ((baseline, BASELINE_COLOUR, "Transformer++"), (ebt, EBT_COLOUR, "EBT")):
        axes.plot(*run.series("final_step_loss"), color=colour, alpha=0.35, lw=1)
        axes.plot(*run.series("validation_loss"), "o-", color=colour, ms=3, label=f"{name}, validation")
    axes.axhline(ebt.evaluation["unigram_entropy"], color=NEUTRAL, ls="--", lw=1)
    axes.annotate("unigram entropy", (axes.get_xlim()[1], ebt.evaluation["unigram_entropy"]), ha="right", va="bottom",
                  color=NEUTRAL, fontsize=8)  # fmt: skip
    axes.set(
        xlabel="training tokens",
        ylabel="loss (nats per token)",
        title="Loss against tokens (faint: training)",
    )
    axes.legend(frameon=False)
    return _png(figure)


def plot_thinking(ebt: Run, baseline: Run) -> bytes:
    """Validation perplexity against the number of thinking steps."""
    rows = ebt.evaluation["thinking"]
    trained = ebt.evaluation["trained_steps"]
    figure, axes = _figure()
    axes.plot([r["steps"] for r in rows], [r["perplexity"] for r in rows], "o-", color=EBT_COLOUR, label="EBT")
    axes.axvspan(trained + 0.5, rows[-1]["steps"] + 0.5, color=NEUTRAL, alpha=0.12)
    axes.annotate("more than trained with", (trained + 0.6, axes.get_ylim()[1]), va="top", fontsize=8, color=NEUTRAL)
    axes.axhline(baseline.evaluation["thinking"][-1]["perplexity"], color=BASELINE_COLOUR, ls="--",
                 label="Transformer++ (cannot think longer)")  # fmt: skip
    axes.set(xlabel="thinking steps", ylabel="validation perplexity", yscale="log",
             title="Perplexity against thinking", xticks=[r["steps"] for r in rows])  # fmt: skip
    axes.legend(frameon=False)
    return _png(figure)


def plot_energy(ebt: Run) -> bytes:
    """How far each step descends: mean energy after it less that before, in the step's own landscape."""
    pairs = ebt.evaluation["example"]["mean_energies"]
    steps = range(1, len(pairs) + 1)
    figure, axes = _figure()
    axes.bar(steps, [after - before for before, after in pairs], color=EBT_COLOUR)
    axes.axhline(0, color=NEUTRAL, lw=1)
    axes.set(xlabel="step", ylabel="change of energy", title="Energy against step: each goes down its landscape",
             xticks=steps)  # fmt: skip
    return _png(figure)


def plot_example(ebt: Run) -> bytes:
    """One token's predicted distribution after each step."""
    example = ebt.evaluation["example"]
    states = example["states"]
    figure, all_axes = plt.subplots(1, len(states), figsize=(2.5 * len(states), 3.6), dpi=110, sharex=True)
    for axes, state in zip(all_axes, states, strict=True):
        names = [repr(t["token"])[1:-1] for t in state["top"]]
        colours = [EBT_COLOUR if t["token"] == example["target"] else NEUTRAL for t in state["top"]]
        axes.barh(names[::-1], [t["probability"] for t in state["top"]][::-1], color=colours[::-1])
        pair = state["energies"]
        descent = f"\nenergy {pair[0]:.3f} → {pair[1]:.3f}" if pair else "\n(the start)"
        axes.set_title(f"after {state['steps']} steps{descent}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _cost_rows(runs: list[tuple[str, Run]]) -> list[list[str]]:
    rows = [["model", "tokens", "validation loss", "perplexity", "tokens/s", "s / step", "peak memory MB",
             "GFLOP/s", "data wait"]]  # fmt: skip
    for name, run in runs:
        timed = run.metrics[len(run.metrics) // 2 :]
        middle = sorted(timed, key=lambda row: row["step_seconds"])[len(timed) // 2]
        wait = sum(r.get("data_wait_seconds", 0.0) for r in timed) / sum(r["step_seconds"] for r in timed)
        final = next(r for r in run.evaluation["thinking"] if r["steps"] == run.evaluation["trained_steps"])
        rows.append([
            name, f"{run.metrics[-1]['tokens']:,}", _number(final["loss"]), _number(final["perplexity"], 1),
            _number(middle["tokens_per_second"], 0), _number(middle["step_seconds"]),
            _number(max(r["peak_memory_bytes"] for r in run.metrics) / 1e6, 0),
            _number(middle["model_flops_per_second"] / 1e9, 1), f"{100 * wait:.2f} %",
        ])  # fmt: skip
    return rows


def _thinking_rows(ebt: Run) -> list[list[str]]:
    rows = [["thinking steps", "validation loss", "perplexity"]]
    for row in ebt.evaluation["thinking"]:
        note = " (trained)" if row["steps"] == ebt.evaluation["trained_steps"] else ""
        rows.append([f"{row['steps']}{note}", _number(row["loss"]), _number(row["perplexity"], 1)])
    return rows


def _markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _html_table(rows: list[list[str]]) -> str:
    cells = [[html.escape(c) for c in row] for row in rows]
    head = "".join(f"<th>{c}</th>" for c in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def write_report(ebt_dir: Path, baseline_dir: Path, output: Path, title: str, next_steps: str) -> dict[str, Path]:
    """Write report.html, report.md and the plots into `output`.

    Args:
        ebt_dir, baseline_dir: run directories with metrics.jsonl and evaluation.json.
        output: folder to write to.
        title: heading.
        next_steps: plain text, how to go on from here.

    Returns:
        Paths by name ("html", "markdown" and each plot).
    """
    ebt, baseline = Run.read(ebt_dir), Run.read(baseline_dir)
    output.mkdir(parents=True, exist_ok=True)
    plots = {
        "loss": (plot_losses(ebt, baseline), "Both models see the same tokens in the same order."),
        "thinking": (
            plot_thinking(ebt, baseline),
            "One model; only the number of steps at evaluation differs.",
        ),
        "energy": (plot_energy(ebt), "One batch of validation samples."),
    }
    example = ebt.evaluation["example"]
    caption = f"Next token after “…{example['context']}”; the true one, {example['target']!r}, in red."
    plots["example"] = (plot_example(ebt), caption)
    tables = [("Speed and memory", _cost_rows([("EBT", ebt), ("Transformer++", baseline)])),
              ("Thinking longer", _thinking_rows(ebt))]  # fmt: skip
    paths = {}
    for name, (png, _) in plots.items():
        paths[name] = output / f"{name}.png"
        paths[name].write_bytes(png)
    markdown = [f"# {title}\n"]
    page = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>"]  # fmt: skip
    for name, (png, caption) in plots.items():
        markdown.append(f"![{name}]({name}.png)\n\n{caption}\n")
        data = base64.b64encode(png).decode()
        page.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}"><br>{html.escape(caption)}</p>')
    for heading, rows in tables:
        markdown.append(f"## {heading}\n\n{_markdown_table(rows)}\n")
        page.append(f"<h2>{heading}</h2>{_html_table(rows)}")
    markdown.append(f"## How to go on\n\n```\n{next_steps}\n```\n")
    page.append(f"<h2>How to go on</h2><pre>{html.escape(next_steps)}</pre>")
    paths["html"], paths["markdown"] = output / "report.html", output / "report.md"
    paths["html"].write_text("\n".join(page), encoding="utf-8")
    paths["markdown"].write_text("\n".join(markdown), encoding="utf-8")
    return paths
