"""What a study's runs come to: rows, fits, ratios, tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.fits import Law, Runs, detectable, fit, middle_of, ratios
from benchmarks.scaling.plan import Job, Plan, tokens, weights_in_layers
from benchmarks.seeds import Interval, steps_at
from ebt_megatron.config import Recipe
from ebt_megatron.evaluation.figures import figure_of, png_of
from ebt_megatron.evaluation.tables import Table

# What stands for the size of a run, by the key of its row; with several token budgets, FLOPs would count these twice.
_SIZES = {
    "layers": "weights in layers",
    "parameters": "all weights",
    "flops": "training FLOPs",
    "layer_flops": "training FLOPs of layers",
}
_X = {
    "data": {"tokens": "tokens"},
    "epochs": {"tokens": "tokens seen"},
    "batch": {"value": "samples a step"},
    "width": _SIZES,
    "depth": _SIZES,
    "flops": {key: _SIZES[key] for key in ("flops", "layer_flops")},
}
# How much higher than Transformer++'s the paper says that EBTs' rates are (arXiv 2507.02092, Figures 7 to 9).
CLAIMS = {"data": 0.3598, "batch": 0.2846, "depth": 0.0529, "width": 0.0002, "flops": 0.0292}
# The laws that a plan's power is of: about what small models of text show, x from 1 up; with one axis and with two.
_EXPECTED = Law(2.0, (1.7,), (0.35,)), Law(2.0, (0.85, 0.85), (0.35, 0.35))


_DESCENT = {"changed": 100, "energy_drop": 1, "raised": 100, "curvature": 1}  # of a step, and how they are shown


def x_of(plan: Plan) -> dict[str, str]:
    """What is put for x in a study's fits: its name by the key of a row."""
    keys = _X[plan.axis]
    return {key: name for key, name in keys.items() if not (plan.joint and "flops" in key)}


def sizes(plan: Plan, job: Job, recipe: Recipe) -> dict[str, Any]:
    """What a row has before its run is done."""
    return {
        "model": job.cell.model,
        "value": job.cell.value,
        "seed": job.seed,
        "learning_rate": recipe.optimizer.lr,
        "tokens": tokens(recipe),
        "layers": weights_in_layers(recipe),
        "parameters": plan.task(recipe).cost().parameters,
        "flops": plan.flops(recipe),
        "layer_flops": plan.flops(recipe, vocabulary=False),
    }


def row(plan: Plan, job: Job, recipe: Recipe, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run: sizes, validation losses (nats) of the first prediction and as trained, the last step.

    Args:
        plan: the study.
        job: the run.
        recipe: its own.
        evaluation: what `ebt-evaluate` wrote.
    """
    thinking = evaluation["thinking"]
    trained = thinking[steps_at(thinking, evaluation["trained_steps"])]
    losses = {"loss": trained["loss"], "first_loss": thinking[0]["loss"]}
    return sizes(plan, job, recipe) | losses | {key: trained.get(key) for key in _DESCENT}


def points(rows: Sequence[Mapping[str, Any]], key: str, joint: bool) -> np.ndarray:
    """x [N, axes] of rows: what a key says, and of a joint study tokens."""
    return np.array([[r[k] for k in ([key, "tokens"] if joint else [key])] for r in rows], dtype=np.float64)


def fitted(rows: Sequence[Mapping[str, Any]], baseline: str, key: str, joint: bool = False) -> dict[str, Any]:
    """Fits of rows of runs by model, the largest run predicted from the others, and ratios to a baseline's.

    Args:
        rows: with model, loss, and what `key` names.
        baseline: a model's name.
        key: of what is put for x.
        joint: tokens are a second axis: L = E + A N^-a + B D^-b.

    Returns:
        unit: what x is divided by, of each axis, so that scales are losses above the floor at the least x; fits and
        ratios by model.
    """
    unit = points(rows, key, joint).min(0)
    runs = {}
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        runs[model] = Runs(points(own, key, joint) / unit, np.array([r["loss"] for r in own]))
    fits, compared = {}, {}
    for model, of in runs.items():
        (law,), top = fit([of]), (of.x == of.x.max(0)).all(1)
        (earlier,) = fit([Runs(of.x[~top], of.loss[~top])])
        middle = middle_of(of.axes)
        fits[model] = asdict(law) | {
            "rates": [law.slope(middle, k).item() for k in range(len(unit))],
            "predicted": float(earlier(of.x[top])[0]),
            "held out": float(of.loss[top].mean()),
        }
        if model != baseline:
            pair = runs[baseline], of
            compared[model] = {"shared": asdict(ratios(*pair, True)), "apart": asdict(ratios(*pair, False))}
    return {"unit": unit.tolist(), "fits": fits, "ratios": compared}


def results(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows, and `fitted` by each kind of x."""
    return {"rows": rows, "x": {key: fitted(rows, plan.baseline, key, plan.joint) for key in x_of(plan)}}


def _numbers(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.3f}" for value in values)


def tables(plan: Plan, found: Mapping[str, Any]) -> list[Table]:
    """What `results` gives, for people."""
    rows, names = found["rows"], x_of(plan)
    losses: dict[tuple[float, ...], dict[str, list[float]]] = {}
    for r in rows:
        where = (r["value"], r["tokens"]) if plan.joint else (r["value"],)
        losses.setdefault(where, {}).setdefault(r["model"], []).append(r["loss"])
    by_value = [
        [*(f"{w:g}" for w in where), *(Interval.of(of[m]).text() if m in of else "-" for m in plan.models)]
        for where, of in losses.items()
    ]
    fits, compared = [], []
    for key, of in found["x"].items():
        for model, law in of["fits"].items():
            numbers = [f"{law['floor']:.3f}", _numbers(law["exponents"]), _numbers(law["rates"])]
            fits.append([names[key], model, *numbers, f"{law['predicted']:.3f}", f"{law['held out']:.3f}"])
        for model, how in of["ratios"].items():
            for floors, kinds in how.items():
                cells = [
                    ", ".join(f"{e['value']:.2f} ({e['low']:.2f} to {e['high']:.2f})" for e in kinds[kind])
                    for kind in ("exponents", "rates")
                ]
                compared.append([names[key], model, {"shared": "one", "apart": "one each"}[floors], *cells])
    law = "L = E + A x^-beta + B D^-b, D the tokens" if plan.joint else "L = E + A x^-beta"
    claim = f"; the paper's rate is {1 + CLAIMS[plan.axis]:.2f}" if plan.axis in CLAIMS else ""
    return [
        Table(
            f"Validation loss by {plan.axis}",
            [plan.axis, *(["tokens"] if plan.joint else []), *plan.models],
            by_value,
        ),
        Table(f"Fits {law}", ["x", "model", "E", "exponent", "rate", "largest run, predicted", "measured"], fits),
        Table(
            f"Over {plan.baseline}'s, 95 % interval{claim}",
            ["x", "model", "floors E", "exponent", "rate"],
            compared,
        ),
        Table(
            "The last trained step, mean of all runs (docs/evaluation.md)",
            ["model", "% of answers changed", "energy drop", "% raised", "curvature"],
            [[model, *(_mean(rows, model, key, scale) for key, scale in _DESCENT.items())] for model in plan.models],
        ),
    ]


def _mean(rows: Sequence[Mapping[str, Any]], model: str, key: str, scale: float) -> str:
    found = [r[key] for r in rows if r["model"] == model and r.get(key) is not None]
    return f"{scale * np.mean(found):.2f}" if found else "-"


def plot(plan: Plan, found: Mapping[str, Any]) -> bytes:
    """A PNG of losses and fits over the first kind of x; of a joint study a line for each budget."""
    key, name = next(iter(x_of(plan).items()))
    of = found["x"][key]
    figure, axes = figure_of()
    for model, law in of["fits"].items():
        own = [r for r in found["rows"] if r["model"] == model]
        x, color = points(own, key, plan.joint), None
        curve = Law(law["floor"], tuple(law["scales"]), tuple(law["exponents"]))
        for budget in np.unique(x[:, 1:], axis=0):
            here = (x[:, 1:] == budget).all(1)
            loss = [r["loss"] for r, there in zip(own, here, strict=True) if there]
            (dots,) = axes.plot(x[here, 0], loss, "o", ms=3, color=color, label=None if color else model)
            color = dots.get_color()
            grid = np.geomspace(x[here, 0].min(), x[here, 0].max(), 100)[:, None]
            grid = np.concatenate([grid, np.broadcast_to(budget, (len(grid), x.shape[1] - 1))], 1)
            axes.plot(grid[:, 0], curve(grid / np.array(of["unit"])), color=color, lw=1)
    axes.set(xscale="log", xlabel=name, ylabel="validation loss (nats)", title=plan.name)
    axes.legend(frameon=False, fontsize=8)
    return png_of(figure)


def power(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Table:
    """What difference a plan can tell.

    Args:
        plan: the study.
        rows: `sizes` of the baseline's runs of every size, one seed.
    """
    key = next(iter(x_of(plan)))
    x = points(rows, key, plan.joint)
    x, law = np.repeat(x / x.min(0), plan.seeds, axis=0), _EXPECTED[plan.joint]
    noise, claim, out = (plan.noise, plan.noise), CLAIMS.get(plan.axis), []
    for how, shared in (("one for both", True), ("one each", False)):
        exponents, rates = detectable(law, law, x, noise, shared) - 1
        told = "-" if claim is None else f"{100 * claim:.4g} %: {'can be' if rates[0] <= claim else 'cannot be'} told"
        out.append([how, *(" and ".join(f"{100 * of:.1f} %" for of in kind) for kind in (exponents, rates)), told])
    return Table(
        f"The least differences found in 4 of 5 such studies, if seeds differ by {plan.noise:g} of log loss",
        ["floors E", "of exponents", "of rates", "the paper's claim"],
        out,
    )
