"""A scaling study: who scales faster, by how much, with what interval, over one axis of training.

    python -m benchmarks.scaling benchmarks/studies/data.yaml --dry-run     # the plan, and what it can tell
    python -m benchmarks.scaling benchmarks/studies/data.yaml

A study is one YAML file: models (recipes with overrides), one axis with its values, seeds. Every run decays to its own
end. A run that is done is not repeated, one that was stopped goes on, and one that fails is tried once more. Rows of
all runs go to NAME.jsonl, and fits of L = E + A x^-beta to every model (benchmarks/fits.py), with the ratios of their
exponents to the baseline's, to NAME-cpu-DATE.{json,md,png}. The largest value is also held out and predicted.

Axes, and what x is:

    data     tokens: training.steps follows                     x: tokens
    width    model.hidden_size; learning rate ~ 1 / width       x: weights in layers
    depth    model.num_layers                                   x: weights in layers
    batch    samples a step, at equal tokens; rate ~ sqrt       x: samples a step
    epochs   over data.unique_samples of the first value's run  x: tokens
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
import yaml
from omegaconf import OmegaConf

from benchmarks.fits import Law, Runs, detectable, fit, ratio
from benchmarks.seeds import Interval, steps_at
from benchmarks.study import Model, Study, train
from ebt_megatron.config import Recipe, RecipeError, load_recipe
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import machine
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.evaluation.figures import figure_of, png_of
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.tasks import open_task

AXES = ("data", "width", "depth", "batch", "epochs")
_EXPECTED = Law(2.0, (1.7,), (0.35,))  # of a plan's power: about what small models of text show, x from 1 up


@dataclass
class Plan:
    """What a YAML file asks for.

    Attributes:
        name: of the results.
        axis: of AXES.
        values: of the axis, rising.
        seeds: of each model at each value.
        data: shards.
        models: by name: a recipe and its overrides.
        baseline: the model that the others' exponents are compared with.
        tokens: of every run; of the axis data they are the values.
        noise: standard deviation of log loss between seeds, expected.
    """

    name: str
    axis: str
    values: list[float]
    seeds: int
    data: str
    models: dict[str, dict[str, Any]]
    baseline: str
    tokens: float | None = None
    noise: float = 0.008

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a file; raises RecipeError where it does not do."""
        try:
            given: Any = OmegaConf.to_container(OmegaConf.load(path))
            plan = cls(**given)
        except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is no study ({error})") from None
        for wrong, why in (
            (plan.axis not in AXES, f"axis={plan.axis}: choose one of {', '.join(AXES)}"),
            (
                not all(isinstance(v, int | float) and v > 0 for v in plan.values),
                f"values={plan.values}: give numbers above 0",
            ),
            (plan.values != sorted(set(plan.values), key=float), f"values={plan.values}: give them rising"),
            (len(plan.values) < 4, f"values={plan.values}: a floor, a scale and an exponent need four at least"),
            (plan.baseline not in plan.models, f"baseline={plan.baseline}: choose one of {', '.join(plan.models)}"),
            (plan.seeds < 1, f"seeds={plan.seeds}: one at least"),
            (plan.axis != "data" and not plan.tokens, f"axis={plan.axis} needs tokens, of every run"),
        ):
            if wrong:
                raise RecipeError(f"{path}: {why}")
        return plan

    def overrides(self, recipe: Recipe, value: float) -> list[str]:
        """What makes a recipe the run of a value; the learning rate goes with width and batch by rule."""
        batch, length, lr = recipe.training.global_batch_size, recipe.data.sequence_length, recipe.optimizer.lr
        assert lr is not None and recipe.model.hidden_size is not None and recipe.model.num_attention_heads is not None
        tokens, more = self.tokens or value, []
        if self.axis == "data":
            tokens = value
        elif self.axis == "width":
            heads = max(1, round(recipe.model.num_attention_heads * value / recipe.model.hidden_size))
            more = [f"model.hidden_size={value:.0f}", f"model.num_attention_heads={heads}"]
            more += ["model.ffn_hidden_size=null", f"optimizer.lr={lr * recipe.model.hidden_size / value:.4g}"]
        elif self.axis == "depth":
            more = [f"model.num_layers={value:.0f}"]
        elif self.axis == "batch":
            more = [f"training.global_batch_size={value:.0f}", f"training.micro_batch_size={math.gcd(int(value), 8)}"]
            more += [f"optimizer.lr={lr * math.sqrt(value / batch):.4g}"]
            batch = int(value)
        else:
            more = [f"data.unique_samples={round(tokens / length)}"]
            tokens *= value
        return [*more, f"training.steps={max(1, round(tokens / (batch * length)))}"]


def label(model: str, value: float) -> str:
    """The name of a model's runs of a value, and of their folders."""
    return f"{model} {value:g}"


class Scaling(Study):
    """Models at every value of an axis.

    Args:
        plan: the study.
        runs: where its runs go.
    """

    title = "Scaling"

    def __init__(self, plan: Plan, runs: Path):
        super().__init__(runs)
        self.plan, self.name = plan, plan.name
        self.given = (f"data.train=[{plan.data}/train]", f"data.validation=[{plan.data}/validation]")
        self.of: dict[str, tuple[str, float]] = {}
        models = {}
        for name, given in plan.models.items():
            base = tuple(given.get("overrides", ()))
            recipe = load_recipe(given["recipe"], [*base, *self.given])
            for value in plan.values:
                models[label(name, value)] = Model(given["recipe"], (*base, *plan.overrides(recipe, value)))
                self.of[label(name, value)] = name, value
        self.models = models

    def x(self, recipe: Recipe, value: float) -> float:
        """What a value is in a fit."""
        if self.plan.axis in ("width", "depth"):
            model = recipe.model
            assert model.hidden_size and model.ffn_hidden_size and model.num_layers
            return float(model.num_layers * model.hidden_size * (4 * model.hidden_size + 3 * model.ffn_hidden_size))
        return self.tokens(recipe) if self.plan.axis in ("data", "epochs") else value

    @staticmethod
    def tokens(recipe: Recipe) -> float:
        """Seen by a run."""
        return float(recipe.training.steps * recipe.training.global_batch_size * recipe.data.sequence_length)

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """See `Study`; what fails is tried once more."""
        try:
            return train(recipe)[0]
        except RuntimeError as error:
            self.console.print(f"tried again: {error}", markup=False)
            return train(recipe)[0]

    def row(self, name: str, seed: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """What is kept of a run."""
        model, value = self.of[name]
        recipe = self.recipe(name, seed)
        rows = result["thinking"]
        last = rows[steps_at(rows, result["trained_steps"])]
        about = {"model": model, "value": value, "seed": recipe.training.seed, "x": self.x(recipe, value)}
        numbers = {"tokens": self.tokens(recipe), "parameters": result["parameters"], "flops": self.flops(recipe)}
        return about | numbers | {"loss": last["loss"], "first_loss": rows[0]["loss"]}

    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """See `Study`: rows are all that a study has."""
        return {"rows": [self.row(name, seed, result) for seed, result in enumerate(results)]}

    def results(self, names: Sequence[str], seeds: int) -> dict[str, Any]:
        """Rows of all runs, fits of every model, ratios to the baseline's exponent."""
        done = self.train_all(names, seeds)
        rows = [row for name, of in done.items() for row in self.summary(name, of, self.recipe(name, 0))["rows"]]
        write_whole(self.runs / f"{self.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return {"machine": machine(), "seeds": seeds, "rows": rows, **fitted(rows, self.plan.baseline)}

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """See `Study`."""
        rows = results["rows"]
        values, models = sorted({r["value"] for r in rows}), list(dict.fromkeys(r["model"] for r in rows))

        def losses(model: str, value: float) -> str:
            found = [r["loss"] for r in rows if (r["model"], r["value"]) == (model, value)]
            return Interval.of(found).text() if found else "-"

        by_value = [[f"{v:g}", *(losses(m, v) for m in models)] for v in values]
        fits = [
            [m, f"{of['floor']:.3f}", f"{of['exponent']:.3f}", f"{of['predicted']:.3f}", f"{of['held out']:.3f}"]
            for m, of in results["fits"].items()
        ]
        ratios = []
        for model, of in results["ratios"].items():
            found = (of[how] for how in ("shared", "apart"))
            ratios.append([model, *(f"{e['value']:.2f} ({e['low']:.2f} to {e['high']:.2f})" for e in found)])
        return [
            Table(f"Validation loss by {self.plan.axis}", [self.plan.axis, *models], by_value),
            Table("Fits L = E + A x^-beta", ["model", "E", "beta", "largest, predicted", "measured"], fits),
            Table(
                f"Exponent over {self.plan.baseline}'s, 95 % interval",
                ["model", "one floor for both", "a floor each"],
                ratios,
            ),
        ]

    def plot(self, results: dict[str, Any]) -> bytes:
        """Losses and fits."""
        figure, axes = figure_of()
        for model, of in results["fits"].items():
            x, loss = (np.array([r[key] for r in results["rows"] if r["model"] == model]) for key in ("x", "loss"))
            (dots,) = axes.plot(x, loss, "o", ms=3, label=model)
            grid = np.geomspace(x.min(), x.max(), 100)
            law = Law(of["floor"], (of["scale"],), (of["exponent"],))
            axes.plot(grid, law(grid / x.min()), color=dots.get_color(), lw=1)
        axes.set(xscale="log", xlabel=self.plan.axis, ylabel="validation loss (nats)", title=self.name)
        axes.legend(frameon=False, fontsize=8)
        return png_of(figure)

    def planned(self) -> list[Table]:
        """What would be trained, and what difference of exponents it could tell."""
        rows = []
        for name, (model, value) in self.of.items():
            recipe = self.recipe(name, 0)
            task = open_task(recipe, ShardFolder(recipe.data.train[0]))
            weights, flops = task.cost().parameters, self.flops(recipe)
            steps = str(recipe.training.steps)
            rows.append([model, f"{value:g}", steps, f"{weights / 1e3:.0f}", f"{flops / 1e12:.1f}"])
        total = self.plan.seeds * sum(float(row[-1]) for row in rows)
        title = f"{self.plan.seeds} seeds of {len(rows)} runs, {total:.0f} TFLOP in all"
        x = np.repeat(np.array(self.plan.values) / self.plan.values[0], self.plan.seeds)
        noise = self.plan.noise, self.plan.noise
        power = [
            [how, f"{100 * (detectable(_EXPECTED, _EXPECTED, x, noise, shared) - 1):.0f} %"]
            for how, shared in (("one floor for both", True), ("a floor each", False))
        ]
        what = f"The least difference of exponents found in 4 of 5 such studies, seeds differing by {self.plan.noise:g}"
        head = ["model", self.plan.axis, "steps", "weights (k)", "TFLOP"]
        return [Table(title, head, rows), Table(what, ["fit", "difference"], power)]


def fitted(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """Fits of rows of runs by model, the largest x predicted from the others, and ratios to a baseline's exponent.

    Args:
        rows: with model, x and loss.
        baseline: a model's name.
    """
    unit = min(row["x"] for row in rows)  # x from 1 up: scales are then losses above the floor
    runs = {
        model: Runs(*(np.array([r[key] for r in rows if r["model"] == model]) for key in ("x", "loss")))
        for model in dict.fromkeys(row["model"] for row in rows)
    }
    runs = {model: Runs(of.x / unit, of.loss) for model, of in runs.items()}
    fits, ratios = {}, {}
    for model, of in runs.items():
        (law,), below = fit([of]), of.x < of.x.max()
        (earlier,) = fit([Runs(of.x[below], of.loss[below])])
        fits[model] = {
            "floor": law.floor,
            "scale": law.scales[0],
            "exponent": law.exponents[0],
            "predicted": float(earlier(of.x[~below])[0]),
            "held out": float(of.loss[~below].mean()),
        }
        if model != baseline:
            pair = runs[baseline], of
            ratios[model] = {"shared": vars(ratio(*pair, True)), "apart": vars(ratio(*pair, False))}
    return {"fits": fits, "ratios": ratios}


def main(
    study: Path = typer.Argument(..., help="A YAML file, such as benchmarks/studies/data.yaml."),
    runs: Path = typer.Option(Path("runs/scaling"), help="Where the runs go; what is done there is not repeated."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan and its power, and train nothing."),
) -> None:
    """Plan, run, resume and fit a scaling study."""

    def work() -> None:
        plan = Plan.read(study)
        scaling = Scaling(plan, runs / plan.name)
        if dry_run:
            for table in scaling.planned():
                typer.echo(f"{table.title}:\n\n{table.markdown()}\n")
            return
        scaling.runs.mkdir(parents=True, exist_ok=True)
        scaling.conduct(scaling.chosen([]), plan.seeds, output)

    quiet_libraries()
    guarded(work)


if __name__ == "__main__":
    typer.run(main)
