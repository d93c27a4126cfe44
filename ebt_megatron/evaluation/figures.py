"""The figures of the report: each takes runs and draws on a figure of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ebt_megatron.evaluation.run_files import RunFiles

EBT_COLOURS, BASELINE_COLOURS, NEUTRAL = ("#c8442d", "#e0962e", "#8a3ea8", "#2f8f5b"), ("#2d6fd8", "#5aa9c9"), "#808080"
_DASHES = ("-", "--", ":", "-.")
_NIGHT = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#d8d8d8")


_STACKED: ContextVar[bool] = ContextVar("stacked", default=False)
_engineering = EngFormatter(sep="")


@contextmanager
def colours(night: bool, stacked: bool = False) -> Iterator[None]:
    """Figures drawn inside have no background, and lettering that is seen by day, or by night.

    Args:
        night: light lettering.
        stacked: panels are below each other, for narrow pages.
    """
    settings: Any = {"savefig.transparent": True, "axes.facecolor": "none", **(_NIGHT if night else {})}
    before = _STACKED.set(stacked)
    try:
        with plt.rc_context(settings):
            yield
    finally:
        _STACKED.reset(before)


def png_of(figure: Figure) -> bytes:
    """Draw a figure as a PNG and close it."""
    buffer = io.BytesIO()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _plain_numbers(axis)
    figure.tight_layout()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as people say them: 50, 60, 70 where it is short; 20 k, 50 k, 100 k; 10 k and 1 M."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else _engineering(value)))
    axis.set_minor_formatter(NullFormatter())
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    elif high / low < 300:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    if high / low < 300:
        axis.set_minor_locator(NullLocator())


def figure_of(width: float = 6.4, columns: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, Any]:
    """A figure and its axes, or several side by side (below each other where `colours` says so), plain."""
    if _STACKED.get() and columns > 1:
        figure, axes = plt.subplots(columns, 1, figsize=(5.2, 3.6 * columns), dpi=110)
    else:
        figure, axes = plt.subplots(1, columns, figsize=(width, 3.8), dpi=110, width_ratios=ratios)
    for one in [axes] if columns == 1 else axes:
        _plain(one)
    return figure, axes


def lettered(name: str) -> str:
    """A name as matplotlib is to be given it: "$" is no mathematics, and a legend leaves out what begins with "_"."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _coloured(runs: Sequence[RunFiles], colours: Sequence[str] = EBT_COLOURS) -> Iterator[tuple[RunFiles, str]]:
    for i, run in enumerate(runs):
        yield run, colours[i % len(colours)]


def losses(ebts: Sequence[RunFiles], baselines: Sequence[RunFiles]) -> Figure:
    """Training and validation loss of all models against tokens, and against training FLOPs."""
    figure, (tokens, flops) = figure_of(9.2, 2)
    for run, colour in (*_coloured(baselines, BASELINE_COLOURS), *_coloured(ebts)):
        seen, loss = run.series("final_step_loss")
        tokens.plot(seen, loss, color=colour, alpha=0.35, lw=1)
        seen, loss = run.series("validation_loss")
        tokens.plot(seen, loss, "o-", color=colour, ms=3, label=lettered(run.label))
        flops.plot([t * run.flops_a_token for t in seen], loss, "o-", color=colour, ms=3, label=lettered(run.label))
    entropies = [r.evaluation["unigram_entropy"] for r in (*baselines, *ebts) if "unigram_entropy" in r.evaluation]
    for axes in (tokens, flops):
        if entropies:
            axes.axhline(entropies[0], color=NEUTRAL, ls="--", lw=1)
        axes.legend(frameon=False, fontsize=8)
    tokens.set(xlabel="training tokens", ylabel="loss", title="At equal tokens (faint: training)")
    flops.set(xlabel="training FLOPs", xscale="log", title="At equal FLOPs")
    return figure


def of_a_run(run: RunFiles) -> Figure:
    """What a model card shows of one model: its losses in training, and, if it was evaluated, against thinking."""
    colour = EBT_COLOURS[0] if run.thinks else BASELINE_COLOURS[0]
    rows = run.evaluation.get("thinking", []) if run.thinks else []
    figure, panels = figure_of(9.2 if rows else 6.4, 2 if rows else 1)
    training = panels[0] if rows else panels
    training.plot(*run.series("final_step_loss"), color=colour, alpha=0.4, lw=1, label="training")
    if run.series("validation_loss")[0]:
        training.plot(*run.series("validation_loss"), "o-", color=colour, ms=3, label="validation")
    training.set(xlabel="training tokens", ylabel="loss", title=lettered(run.label))
    training.legend(frameon=False, fontsize=8)
    if rows:
        panels[1].plot([r["steps"] for r in rows], [r["loss"] for r in rows], "o-", color=colour)
        panels[1].plot(run.final["steps"], run.final["loss"], "o", ms=12, mfc="none", color=colour)
        panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[1].set(xlabel="thinking steps (ring: as trained)", title="Validation loss against thinking")
    return figure


def start(ebts: Sequence[RunFiles], baselines: Sequence[RunFiles]) -> Figure:
    """The start of training: the loss after each step, tokens on a logarithmic axis; and the step size."""
    figure, (loss, sizes) = figure_of(9.2, 2, (2, 1))
    for axes in (loss, sizes):
        axes.set(xlabel="training tokens", xscale="log")
    for run, colour in _coloured(baselines, BASELINE_COLOURS):
        loss.plot(*run.series("loss"), color=colour, lw=1, label=lettered(run.label))
    for run, colour in _coloured(ebts):
        rows = [row for row in run.metrics if row.get("step_losses")]
        for step in range(max((len(row["step_losses"]) for row in rows), default=0)):
            seen = [row for row in rows if len(row["step_losses"]) > step]
            loss.plot(
                [row["tokens"] for row in seen],
                [row["step_losses"][step] for row in seen],
                color=colour,
                lw=1,
                ls=_DASHES[step % len(_DASHES)],
                label=f"{lettered(run.label)}, after step {step + 1}",
            )
        sizes.plot(*run.series("alpha"), color=colour, label=lettered(run.label))
    loss.set(ylabel="training loss", title="Start of training: loss after each step")
    sizes.set(ylabel="step size alpha", title="Step size")
    for axes in (loss, sizes):
        axes.legend(frameon=False, fontsize=8)
    return figure


def thinking(ebts: Sequence[RunFiles], baselines: Sequence[RunFiles]) -> Figure:
    """Validation perplexity (or loss) against the number of thinking steps; a ring marks the steps trained with."""
    figure, axes = figure_of()
    what = "perplexity" if all("perplexity" in r.evaluation["thinking"][0] for r in (*ebts, *baselines)) else "loss"
    for run, colour in _coloured(ebts):
        rows = run.evaluation["thinking"]
        axes.plot([r["steps"] for r in rows], [r[what] for r in rows], "o-", color=colour, label=lettered(run.label))
        axes.plot(run.final["steps"], run.final[what], "o", ms=12, mfc="none", color=colour)
    for run, colour in _coloured(baselines, BASELINE_COLOURS):
        axes.axhline(run.final[what], color=colour, ls="--", label=f"{lettered(run.label)} (cannot think longer)")
    taken = [row["steps"] for run in ebts for row in run.evaluation["thinking"]]
    axes.set(
        xlabel="thinking steps (ring: as trained)",
        ylabel=f"validation {what}",
        yscale="log",
        title=f"{what.capitalize()} against thinking",
        xticks=range(min(taken), max(taken) + 1),
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def energies(ebts: Sequence[RunFiles]) -> Figure:
    """How far every step moves the mean energy, all models on one axis; energies of landscapes do not compare."""
    figure, panels = figure_of(max(6.4, 3.6 * len(ebts)), len(ebts))
    panels = [panels] if len(ebts) == 1 else list(panels)
    for (run, colour), axes in zip(_coloured(ebts), panels, strict=True):
        pairs = run.evaluation["example"]["mean_energies"]
        moved = [after - before for before, after in pairs]
        bars = axes.bar(range(1, len(pairs) + 1), moved, color=colour, width=0.6)
        axes.bar_label(bars, [f"{change:+.2g}" for change in moved], fontsize=8, padding=2)
        axes.axhline(0, color=NEUTRAL, lw=1)
        axes.set_xticks(range(1, len(pairs) + 1))
        axes.set_xticklabels([f"step {i}\n{_short(x)} →\n{_short(y)}" for i, (x, y) in enumerate(pairs, 1)], fontsize=8)
        axes.set(xlabel="mean energy before → after it", title=lettered(run.label))
        if axes is not panels[0]:
            axes.sharey(panels[0])
    panels[0].margins(y=0.15)
    for axes in panels if _STACKED.get() else panels[:1]:
        axes.set_ylabel("change of the mean energy")
    return figure


def _short(energy: float) -> str:
    return f"{energy:.3g}"


def example(run: RunFiles) -> Figure:
    """One token's predicted distribution after each step."""
    shown = run.evaluation["example"]
    states = shown["states"]
    figure, panels = figure_of(2.5 * len(states), len(states))
    panels = [panels] if len(states) == 1 else list(panels)
    most = max(t["probability"] for state in states for t in state["top"])
    for axes, state in zip(panels, states, strict=True):
        names = [lettered(repr(t["token"])[1:-1]) for t in state["top"]]
        colours = [EBT_COLOURS[0] if t["token"] == shown["target"] else NEUTRAL for t in state["top"]]
        values = [t["probability"] for t in state["top"]][::-1]
        bars = axes.barh(range(len(names)), values, color=colours[::-1])
        axes.bar_label(bars, [f"{100 * p:.{0 if p > 0.1 else 1}f} %" for p in values], fontsize=7, padding=2)
        axes.set_yticks(range(len(names)), names[::-1])
        pair = state["energies"]
        descent = f"\nenergy {pair[0]:.3f} → {pair[1]:.3f}" if pair else "\n(the start)"
        axes.set_title(f"after {state['steps']} steps{descent}", fontsize=9)
        axes.set_xlim(0, 1.3 * most)  # the same for all, with room for the labels
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(labelsize=8)
        axes.grid(visible=False)
    return figure


# --- of the suite -----------------------------------------------------------------------------------------


def compute(ebts: Sequence[RunFiles]) -> Figure:
    """Perplexity against inference FLOPs: fixed steps, steps by how predictions move, and the baselines."""
    figure, axes = figure_of()
    for run, colour in _coloured(ebts):
        dynamic = run.suite["dynamic compute"]
        for name, style in (("fixed", "o-"), ("adaptive", "x--")):
            axes.plot(
                [r["flops"] for r in dynamic[name]],
                [r["perplexity"] for r in dynamic[name]],
                style,
                color=colour,
                ms=4,
                label=f"{lettered(run.label)}, {name} steps",
            )
    baselines = [m for m in ebts[0].suite["models"] if m["baseline"]]
    for i, model in enumerate(baselines):
        axes.plot(
            model["inference flops a token"],
            model["perplexity"],
            "s",
            color=BASELINE_COLOURS[i % 2],
            label=lettered(model["name"]),
        )
    axes.set(
        xlabel="inference FLOPs a token", ylabel="validation perplexity", xscale="log", title="What thinking costs"
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def several_starts(ebts: Sequence[RunFiles]) -> Figure:
    """Perplexity of M starts, by what chooses among them."""
    figure, axes = figure_of()
    for run, colour in _coloured(ebts):
        rows = run.suite["starts"]
        for i, name in enumerate(n for n, by in rows[0]["by"].items() if "perplexity" in by):
            axes.plot(
                [r["starts"] for r in rows],
                [r["by"][name]["perplexity"] for r in rows],
                color=colour,
                ls=_DASHES[i % 4],
                marker=".ox+s"[i % 5],
                ms=4,
                label=f"{lettered(run.label)}: {name}",
            )
    axes.set(xlabel="starts M", ylabel="validation perplexity", title="Best of M starts, by what chooses")
    axes.legend(frameon=False, fontsize=7)
    return figure


def risk(ebts: Sequence[RunFiles]) -> Figure:
    """Error rate among the surest share of positions."""
    figure, axes = figure_of()
    for run, colour in _coloured(ebts):
        for name, of in run.suite["uncertainty"].items():
            ours = name == run.suite["models"][0]["name"]
            for i, (doubt, numbers) in enumerate(of["by"].items()):
                curve = numbers["curve"]
                axes.plot(
                    np.linspace(0, 1, len(curve)),
                    curve,
                    ls=_DASHES[i],
                    lw=1.2,
                    color=colour if ours else BASELINE_COLOURS[0],
                    label=f"{lettered(run.label if ours else name)}: {doubt}",
                )
    axes.set(xlabel="share of positions answered, surest first", ylabel="error rate", title="Risk against coverage")
    axes.legend(frameon=False, fontsize=7)
    return figure


def shifts(ebts: Sequence[RunFiles]) -> Figure:
    """The gain of thinking over its own first step, against how far the text is."""
    figure, axes = figure_of()
    for run, colour in _coloured([r for r in ebts if r.suite.get("shifts")]):
        rows = sorted(run.suite["shifts"].items(), key=lambda item: item[1]["shift"])
        axes.plot(
            [r["shift"] for _, r in rows],
            [100 * r["gain over the first step"] for _, r in rows],
            "o-",
            color=colour,
            label=lettered(run.label),
        )
        for name, r in rows:
            axes.annotate(
                lettered(name),
                (r["shift"], 100 * r["gain over the first step"]),
                fontsize=7,
                xytext=(3, 3),
                textcoords="offset points",
            )
    axes.set(
        xlabel="shift: baseline's perplexity there over that at home",
        ylabel="perplexity gained over the first step (%)",
        title="Thinking on other text",
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def landscapes(run: RunFiles) -> Figure:
    """Energies over the plane through start, end and the token that comes, with the descent drawn."""
    shown = run.suite["token_trace"]["landscapes"]
    figure, all_axes = figure_of(4.6 * len(shown), len(shown))
    for axes, one in zip([all_axes] if len(shown) == 1 else all_axes, shown, strict=True):
        filled = axes.contourf(one["x"], one["y"], np.array(one["energy"]), 24, cmap="viridis")
        figure.colorbar(filled, ax=axes, label="energy")
        path = np.array(one["path"])
        axes.plot(path[:, 0], path[:, 1], "o-", color="white", ms=4, lw=1.5)
        axes.plot(*path[0], "o", color="white", ms=8, label="start")
        axes.plot(*one["target"], "*", color="#ff5a3c", ms=13, label="the token that comes")
        token = lettered(repr(one["token"])[1:-1])
        axes.set_title(f"… “{token}”", fontsize=9)
        axes.legend(fontsize=7)
    return figure
