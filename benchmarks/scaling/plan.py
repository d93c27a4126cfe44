"""What a study asks for in one YAML file, and the recipe and the cost of each of its runs.

Axes, and how a recipe goes with a value; the learning rate is transferred by the rule given, then multiplied by the
best of `learning_rates`:

    data     tokens                                        rate as it is
    width    model.hidden_size, heads in proportion        rate ~ 1 / width (hidden weights under Adam, muP)
    depth    model.num_layers                              rate as it is
    batch    samples a step, at equal tokens               rate ~ sqrt (Adam); the warm-up is as many tokens
    epochs   over as much data as `tokens` says            rate as it is
    flops    of training: width ~ FLOPs^(1/4) from the recipe's own at the first value, so that weights and tokens grow
             alike (Hoffmann et al. 2022, arXiv 2203.15556), steps as the FLOPs then allow; rate as for width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from benchmarks.study import folder_name
from ebt_megatron.config import Recipe, RecipeError, load_recipe
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.model.flops import layer_weights
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.tasks import Task, open_task

AXES = ("data", "width", "depth", "batch", "epochs", "flops")
_TOKENS_BY_VALUE = ("data", "flops")
_FIRST_SEED = 1234


@dataclass(frozen=True)
class Cell:
    """Runs that differ by seed and learning rate alone.

    Attributes:
        model: its name.
        value: of the axis.
        tokens: of the study's, 0 where the value says how many.
    """

    model: str
    value: float
    tokens: float = 0


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        cell: what is trained.
        seed: from 0.
        factor: on the learning rate.
    """

    cell: Cell
    seed: int
    factor: float

    @property
    def name(self) -> str:
        """Its folder's name."""
        tokens = [f"{self.cell.tokens:g}"] if self.cell.tokens else []
        rate = [f"lr{self.factor:g}"] if self.factor != 1 else []
        return "-".join([folder_name(self.cell.model), f"{self.cell.value:g}", *tokens, *rate, str(self.seed)])


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
        tokens: of every run; several: every value with each of them, and the fit is of both axes.
        learning_rates: factors on the rate by rule. Every cell tries all of them with its first seed, and the one of
            least validation loss is that of its other seeds.
        noise: standard deviation of log loss between seeds, expected.
    """

    name: str
    axis: str
    values: list[float]
    seeds: int
    data: str
    models: dict[str, dict[str, Any]]
    baseline: str
    tokens: float | list[float] | None = None
    learning_rates: list[float] = field(default_factory=lambda: [1.0])
    noise: float = 0.008

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a file; raises RecipeError where it does not do."""
        try:
            given: Any = OmegaConf.to_container(OmegaConf.load(path))
            plan = cls(**given)
        except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is no study ({error})") from None
        rates, by_value = plan.learning_rates, plan.axis in _TOKENS_BY_VALUE
        for wrong, why in (
            (plan.axis not in AXES, f"axis={plan.axis}: choose one of {', '.join(AXES)}"),
            (not _rising(plan.values), f"values={plan.values}: give them rising, numbers above 0"),
            (len(plan.values) < 4, f"values={plan.values}: a floor, a scale and an exponent need four at least"),
            (plan.baseline not in plan.models, f"baseline={plan.baseline}: choose one of {', '.join(plan.models)}"),
            (plan.seeds < 1, f"seeds={plan.seeds}: one at least"),
            (not _rising(rates), f"learning_rates={rates}: give factors above 0, rising"),
            (not by_value and not _rising(plan.budgets), f"axis={plan.axis} needs tokens, of every run"),
            (by_value and plan.tokens is not None, f"axis={plan.axis} says how many tokens: leave tokens out"),
        ):
            if wrong:
                raise RecipeError(f"{path}: {why}")
        return plan

    @property
    def budgets(self) -> list[float]:
        """Tokens of the study's runs; 0 where the axis says how many."""
        return self.tokens if isinstance(self.tokens, list) else [self.tokens or 0]

    @property
    def joint(self) -> bool:
        """Whether tokens are a second axis."""
        return len(self.budgets) > 1

    @property
    def cells(self) -> list[Cell]:
        """All, small values first."""
        return [Cell(model, value, tokens) for tokens in self.budgets for value in self.values for model in self.models]

    def first(self) -> list[Job]:
        """Every cell's first seed with every learning rate."""
        return [Job(cell, 0, factor) for cell in self.cells for factor in self.learning_rates]

    def others(self, factor: Callable[[Cell], float]) -> list[Job]:
        """The other seeds.

        Args:
            factor: on a cell's learning rate.
        """
        return [Job(cell, seed, factor(cell)) for seed in range(1, self.seeds) for cell in self.cells]

    @property
    def runs_of_a_cell(self) -> int:
        """Runs of a cell, its trials of learning rates among them."""
        return len(self.learning_rates) + self.seeds - 1

    def task(self, recipe: Recipe) -> Task:
        """The task of a recipe, by the data's description."""
        return open_task(recipe, self._shards)

    @cached_property
    def _shards(self) -> ShardFolder:
        return ShardFolder(f"{self.data}/train")

    def flops(self, recipe: Recipe, vocabulary: bool = True) -> float:
        """FLOPs of a training.

        Args:
            recipe: the run.
            vocabulary: count the products with tables over the vocabulary, too.
        """
        cost = self.task(recipe).cost()
        counted = cost if vocabulary else replace(cost, vocabulary=0.0)
        return recipe.training.steps * training_flops(recipe, counted)

    def recipe(self, job: Job, folder: Path) -> Recipe:
        """The recipe of a run.

        Args:
            job: the run.
            folder: of the study's runs.

        Raises:
            RecipeError: if there is none.
        """
        cell = job.cell
        base = self._bases[cell.model]
        changes, rate, tokens = self._scaled(base, cell)
        assert base.optimizer.lr is not None
        batch = cell.value if self.axis == "batch" else base.training.global_batch_size
        asked = [
            *changes,
            f"optimizer.lr={base.optimizer.lr * rate * job.factor:.4g}",
            f"training.seed={_FIRST_SEED + job.seed}",
            f"training.output_dir={folder / job.name}",
            f"training.steps={max(1, round(tokens / (batch * base.data.sequence_length)))}",
        ]
        recipe = self._load(cell.model, asked)
        if self.axis != "flops":
            return recipe
        steps = cell.value / (self.flops(recipe) / recipe.training.steps)
        return self._load(cell.model, [*asked, f"training.steps={max(1, round(steps))}"])

    def _load(self, model: str, more: Sequence[str] = ()) -> Recipe:
        given = self.models[model]
        data = [f"data.{part}=[{self.data}/{part}]" for part in ("train", "validation")]
        return load_recipe(given["recipe"], [*given.get("overrides", ()), *data, *more])

    @cached_property
    def _bases(self) -> dict[str, Recipe]:
        return {model: self._load(model) for model in self.models}

    def _scaled(self, recipe: Recipe, cell: Cell) -> tuple[list[str], float, float]:
        """Overrides that take a recipe to a value, the factor on its learning rate, and its tokens."""
        value, tokens, width = cell.value, cell.tokens, recipe.model.hidden_size
        assert width is not None and recipe.model.num_attention_heads is not None
        if self.axis == "data":
            return [], 1.0, value
        if self.axis == "depth":
            return [f"model.num_layers={value:.0f}"], 1.0, tokens
        if self.axis == "epochs":
            return [f"data.unique_samples={round(tokens / recipe.data.sequence_length)}"], 1.0, tokens * value
        if self.axis == "batch":
            batch = recipe.training.global_batch_size
            warmup = round(recipe.optimizer.warmup_steps * batch / value)
            sizes = [f"training.global_batch_size={value:.0f}", f"training.micro_batch_size={math.gcd(int(value), 8)}"]
            return [*sizes, f"optimizer.warmup_steps={warmup}"], math.sqrt(value / batch), tokens
        wanted = round(value) if self.axis == "width" else 16 * round(width * (value / self.values[0]) ** 0.25 / 16)
        most = max(1, round(recipe.model.num_attention_heads * wanted / width))
        heads = next(n for n in range(most, 0, -1) if wanted % n == 0)
        sizes = [f"model.hidden_size={wanted}", f"model.num_attention_heads={heads}", "model.ffn_hidden_size=null"]
        return sizes, width / wanted, tokens


def _rising(values: Any) -> bool:
    """Whether these are numbers above 0, each above the one before."""
    return (
        isinstance(values, list)
        and all(isinstance(v, int | float) and v > 0 for v in values)
        and values == sorted(set(values))
    )


def tokens(recipe: Recipe) -> float:
    """Tokens that a run sees."""
    return float(recipe.training.steps * recipe.training.global_batch_size * recipe.data.sequence_length)


def weights_in_layers(recipe: Recipe) -> float:
    """Weights of a text model without its tables over the vocabulary."""
    assert recipe.model.num_layers
    return float(recipe.model.num_layers * layer_weights(recipe))
