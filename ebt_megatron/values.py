"""Values of a recipe: numbers and paths as people write them, and the ranges they must be in."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from ebt_megatron.errors import RecipeError

_PATHS = ("data.train", "data.validation", "data.cache_dir", "training.output_dir")
_AT_LEAST_0 = (
    "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad", "training.seed",
    "training.validation_interval", "training.save_interval", "training.spike_factor", "training.peak_tflops",
    "training.profile_steps",
)  # fmt: skip
_AT_LEAST_1 = ("optimizer.decay_steps", "training.max_bad_steps", "training.spike_window",
               "parallel.micro_batches_in_flight")  # fmt: skip
_ABOVE_0 = ("parallel.timeout_seconds", "optimizer.epsilon")
_BELOW_1 = ("optimizer.beta1", "optimizer.beta2")


def as_meant(given: dict[Any, Any], cls: type) -> dict[str, Any]:
    """A layer of a recipe with `1e3` where a whole number belongs as 1000, and one name as a list of one.

    Args:
        given: what a file or the command line says.
        cls: the dataclass it fills.
    """
    hints, out = get_type_hints(cls), {}
    for key, value in given.items():
        hint = hints.get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(hint):
            value = as_meant(value, hint)  # type: ignore[arg-type]
        elif isinstance(value, float) and value.is_integer() and hint in (int, int | None):
            value = int(value)
        elif isinstance(value, str) and hint == list[str] and not value.startswith("${"):
            value = [value]
        out[key] = value
    return out


def _expanded(key: str, path: str) -> str:
    known = os.path.expandvars(path)
    if unset := re.search(r"\$\{?(\w+)", known):
        raise RecipeError(f"{key}={path}: the environment variable {unset[1]} is not set")
    return known if "://" in known else os.path.expanduser(known)


def expand_paths(recipe: Any) -> None:
    """Replace `~` and $VARIABLES in the recipe's paths.

    Raises:
        RecipeError: for a variable that is not set.
    """
    for key in _PATHS:
        group, name = key.split(".")
        part = getattr(recipe, group)
        value = getattr(part, name)
        if isinstance(value, str):
            setattr(part, name, _expanded(key, value))
        elif value is not None:
            setattr(part, name, [_expanded(key, path) for path in value])


def _values(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def check_ranges(recipe: Any) -> None:
    """Check that numbers are finite and where they make sense.

    Raises:
        RecipeError: naming the first key that does not.
    """
    values = dict(_values(recipe))
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise RecipeError(f"{key}={number}: must be a finite number")

    def require(keys: tuple[str, ...], holds: Any, what: str) -> None:
        for key in keys:
            if values[key] is not None and not holds(values[key]):
                raise RecipeError(f"{key}={values[key]}: must be {what}")

    require(_AT_LEAST_0, lambda x: x >= 0, "at least 0")
    require(_AT_LEAST_1, lambda x: x >= 1, "at least 1")
    require(_ABOVE_0, lambda x: x > 0, "greater than 0")
    require(_BELOW_1, lambda x: 0 <= x < 1, "at least 0 and below 1")
    require(("optimizer.min_lr_ratio",), lambda x: 0 <= x <= 1, "between 0 and 1")
    require(("training.seed",), lambda x: x < 1 << 62, "less than 2^62")
    require(("training.keep_checkpoints",), lambda x: x >= 0, "a number of checkpoints, or 0 for all")
    d = recipe.data
    if d.shuffle_shards < 0:
        raise RecipeError(f"data.shuffle_shards={d.shuffle_shards}: a number of shards, or 0 for all")
    if d.cache_gb is not None and (d.cache_gb <= 0 or d.cache_dir is None):
        raise RecipeError(f"data.cache_gb={d.cache_gb:g} bounds data.cache_dir={d.cache_dir}: give a folder and more "
                          "than 0")  # fmt: skip
    weights = d.train_weights
    if weights and len(weights) != len(d.train):
        raise RecipeError(f"data.train_weights has {len(weights)} entries for {len(d.train)} sources in data.train")
    if any(w < 0 for w in weights) or (weights and not sum(weights)):
        raise RecipeError(f"data.train_weights={weights}: must be at least 0, and not all 0")


def with_today_names(given: dict[Any, Any]) -> dict[Any, Any]:
    """A recipe of an earlier version, with its settings under today's names; e.g. the recipe.yaml of an old run."""
    thinking = given.get("thinking")
    if isinstance(thinking, dict) and "descend_on" in thinking:
        rules = {"logits": "logit_descent", "probabilities": "probability_descent"}
        before = thinking.pop("descend_on")
        thinking["step_rule"] = rules.get(before, before)
    return given
