"""Layouts that a recipe could have on so many GPUs, with the settings that make them smaller; and which cannot be."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from ebt_megatron.config import Recipe, RecipeError, check

# What a search decides, where the command line does not.
KEYS = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.sequence_parallel",
    "parallel.distributed_optimizer",
    "parallel.micro_batches_in_flight",
    "training.micro_batch_size",
    "thinking.reuse",
    "model.recompute_layers",
)
_LARGEST_MICRO_BATCH = 64
_DEEP = 2  # micro-batches in flight for each stage, where they are bounded

Settings = dict[str, Any]


def setting_of(recipe: Recipe, key: str) -> Any:
    """The value of a key of two parts."""
    group, name = key.split(".")
    return getattr(getattr(recipe, group), name)


def changed(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with other values of keys of two parts; nothing is checked."""
    groups: dict[str, Settings] = {}
    for key, value in settings.items():
        group, name = key.split(".")
        groups.setdefault(group, {})[name] = value
    return replace(recipe, **{group: replace(getattr(recipe, group), **given) for group, given in groups.items()})


@dataclass(frozen=True)
class Candidate:
    """A recipe on a layout.

    Attributes:
        recipe: with the settings.
        data: data-parallel size.
        micro_batches: of a rank and step.
    """

    recipe: Recipe
    data: int
    micro_batches: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tensor, pipeline, micro-batch size): candidates of one shape differ in what trades memory for time."""
        layout = self.recipe.parallel
        return layout.tensor, layout.pipeline, self.recipe.training.micro_batch_size

    @property
    def name(self) -> str:
        """The layout and the micro-batch, in short."""
        tensor, pipeline, size = self.shape
        return f"TP {tensor} x PP {pipeline} x DP {self.data}, micro-batches of {size}"

    def overrides(self, before: Recipe) -> list[str]:
        """key=value of each setting that differs from the recipe as it was given."""
        words = {True: "true", False: "false", None: "null"}
        own = {key: setting_of(self.recipe, key) for key in KEYS}
        other = {key: value for key, value in own.items() if value != setting_of(before, key)}
        return [f"{k}={words[v] if v is None or isinstance(v, bool) else v}" for k, v in other.items()]


def fixed_by(overrides: Sequence[str]) -> set[str]:
    """Of KEYS, those that overrides give a value."""
    given = OmegaConf.from_dotlist(list(overrides))
    none = object()
    return {key for key in KEYS if OmegaConf.select(given, key, default=none) is not none}


class Refusals:
    """Why layouts cannot be: how many for each reason, and the one that is the nearest to being."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._nearest: dict[str, tuple[float, str]] = {}

    def add(self, reason: str, example: str, distance: float = 0.0) -> None:
        """One more; `distance` says how far it is from being."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self._nearest[reason] = min(self._nearest.get(reason, (distance, example)), (distance, example))

    def add_error(self, error: RecipeError) -> None:
        """One more that a check refused; the reason is what its message says without values and what to change."""
        says = str(error).partition(": ")[0]
        self.add(re.sub(r"=\S+", "", says), says)

    def rows(self) -> Iterator[tuple[int, str, str]]:
        """(how many, reason, nearest example), the most frequent reason first."""
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            yield count, reason, self._nearest[reason][1]


def divisors(number: int, most: int) -> list[int]:
    """Of `number`, up to `most`."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def candidates(recipe: Recipe, gpus: int, node: int, fixed: Collection[str], refusals: Refusals) -> Iterator[Candidate]:
    """Every layout that the recipe's sizes allow, and with each what trades memory for time.

    Sequence parallelism and the distributed optimizer take less memory and send no more, so they are on wherever they
    can be. Neither the layout nor anything else that is tried changes what a step computes.

    Args:
        recipe: resolved.
        gpus: how many.
        node: GPUs of a node, inside which tensor-parallel ranks stay.
        fixed: keys that keep their values.
        refusals: told of layouts that the sizes do not allow.
    """

    def values(key: str, choice: Sequence[Any]) -> Sequence[Any]:
        return [setting_of(recipe, key)] if key in fixed else choice

    assert recipe.model.num_layers
    for tensor in values("parallel.tensor", divisors(gpus, node)):
        for pipeline in values("parallel.pipeline", divisors(max(gpus // tensor, 1), recipe.model.num_layers)):
            layout = _layout(recipe, gpus, {"parallel.tensor": tensor, "parallel.pipeline": pipeline}, fixed, refusals)
            if layout is None:
                continue
            data = gpus // (tensor * pipeline)
            share = recipe.training.global_batch_size // data
            for size in values("training.micro_batch_size", divisors(share, _LARGEST_MICRO_BATCH)):
                count = share // size
                bounded = pipeline > 1 and count > _DEEP * pipeline
                flights = values("parallel.micro_batches_in_flight", [None, _DEEP * pipeline] if bounded else [None])
                reuses = values("thinking.reuse", [False, True] if _thinks(recipe) else [recipe.thinking.reuse])
                for flight in flights:
                    for reuse in reuses:
                        for recompute in values("model.recompute_layers", [False, True]):
                            settings = {
                                "training.micro_batch_size": size,
                                "parallel.micro_batches_in_flight": flight,
                                "thinking.reuse": reuse,
                                "model.recompute_layers": recompute,
                            }
                            yield Candidate(changed(layout, settings), data, count)


def _thinks(recipe: Recipe) -> bool:
    return recipe.model.architecture == "ebt" and recipe.thinking.engine == "dual_stream"


def _layout(recipe: Recipe, gpus: int, settings: Settings, fixed: Collection[str], refusals: Refusals) -> Recipe | None:
    """The recipe on a layout; None, and a refusal, where its sizes do not allow it."""
    more: Settings = {}
    if "training.micro_batch_size" not in fixed:
        more["training.micro_batch_size"] = 1
    if "parallel.distributed_optimizer" not in fixed:
        more["parallel.distributed_optimizer"] = gpus > settings["parallel.tensor"] * settings["parallel.pipeline"]
    tried: list[Settings] = [{}]
    if "parallel.sequence_parallel" not in fixed:
        tried = [
            {"parallel.sequence_parallel": on}
            for on in ((True, False) if settings["parallel.tensor"] > 1 else (False,))
        ]
    for sequence in tried:
        layout = changed(recipe, settings | more | sequence)
        try:
            check(layout, gpus)
            return layout
        except RecipeError as error:
            refused = error
    refusals.add_error(refused)
    return None
