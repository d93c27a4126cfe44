"""What `ebt-evaluate` says on the terminal: every number of steps, what learns nothing, the measures of the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SAID = {
    "perplexity": ("perplexity", "{:.2f}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
    "accuracy": ("most likely token right", "{:.1%}"),
    "changed": ("most likely token changed", "{:.1%}"),
    "energy_drop": ("energy drop", "{:.4f}"),
    "raised": ("energy raised", "{:.1%}"),
    "curvature": ("curvature along the step", "{:.2f}"),
    "repeat_last": ("the last frame again", ""),
    "unigram_entropy": ("unigram entropy of the targets", "{:.4f}"),
}
_IDLE = 0.005  # share of answers that a step changes, below which it might as well not be taken
_ABOUT = {"name", "architecture", "step", "tokens", "positions", "parameters", "trained_steps"}


def _number(name: str, value: float) -> str:
    words, form = _SAID.get(name, (name.replace("_", " "), "{:.4f}"))
    return f"{words} {form.format(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def warnings_of(result: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the last trained step, if the numbers of `evaluate` say so."""
    row: Mapping[str, Any] = next((row for row in result["thinking"] if row["steps"] == result["trained_steps"]), {})
    changed, raised = row.get("changed"), row.get("raised")
    if changed is not None and changed < _IDLE:
        yield f"step {row['steps']} changes the most likely token at {changed:.1%} of positions: it does nothing"
    if raised is not None and raised > 0.5:
        yield f"step {row['steps']} raises the energy at {raised:.1%} of positions: the step size is too large"


def lines_of(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines.

    Args:
        result: of `evaluate`: a row for each number of steps; and beside them numbers of the task, of which those
            called X_loss and X_psnr are of a predictor X that learns nothing.
    """
    for row in result["thinking"]:
        parts = [_number(name, value) for name, value in row.items() if name != "steps" and _is_number(value)]
        yield f"{row['steps']:>3} steps: {', '.join(parts)}"
    simple: dict[str, list[str]] = {}
    own = []
    for name, value in result.items():
        if name in _ABOUT or not _is_number(value):
            continue
        stem, _, measure = name.rpartition("_")
        if stem and measure in ("loss", "psnr"):
            simple.setdefault(stem, []).append(_number(measure, value))
        else:
            own.append(_number(name, value))
    for stem, parts in simple.items():
        yield f"{_SAID.get(stem, (stem.replace('_', ' '),))[0]}: {', '.join(parts)}"
    yield from own
    yield from (f"warning: {line}" for line in warnings_of(result))
