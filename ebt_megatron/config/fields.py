"""How a recipe's fields say which values they take: a choice, a range, or a path."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Any

from ebt_megatron.core.errors import RecipeError


def one_of(*choices: str, default: str) -> Any:
    """A field that is one of `choices`."""
    return field(default=default, metadata={"choices": choices})


def some_of(*choices: str, default: list[str]) -> Any:
    """A field that is a list of `choices`."""
    return field(default_factory=lambda: list(default), metadata={"choices": choices})


def _ranged(default: Any, holds: Callable[[Any], bool], what: str) -> Any:
    return field(default=default, metadata={"holds": holds, "what": what})


def positive(default: Any) -> Any:
    """A number greater than 0."""
    return _ranged(default, lambda x: x > 0, "greater than 0")


def at_least(least: float, default: Any, note: str = "") -> Any:
    """A number from `least` upwards; the note says what special values mean."""
    return _ranged(default, lambda x: x >= least, f"at least {least:g}{note}")


def fraction(default: float) -> Any:
    """A number of at least 0 and below 1."""
    return _ranged(default, lambda x: 0 <= x < 1, "at least 0 and below 1")


def within(low: float, high: float, default: Any, what: str) -> Any:
    """A number from `low` to `high`."""
    return _ranged(default, lambda x: low <= x <= high, what)


def path(default: str | None) -> Any:
    """A path, or None; `~` and $VARIABLES are replaced."""
    return field(default=default, metadata={"path": True})


def paths() -> Any:
    """A list of paths."""
    return field(default_factory=list, metadata={"path": True})


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[Any, str, dataclasses.Field, Any]]:
    """(owner, dotted key, field, value) of every value in nested dataclasses."""
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{f.name}.")
        else:
            yield part, prefix + f.name, f, value


def check_values(recipe: Any) -> None:
    """Check every field by itself: a choice that exists, finite numbers, in their range.

    Raises:
        RecipeError: naming the first key that does not do.
    """
    for _, key, f, value in _fields(recipe):
        items = value if isinstance(value, list) else [value]
        for item in items:
            choices = f.metadata.get("choices")
            if choices and item not in choices:
                raise RecipeError(f"{key}={item}: choose one of {', '.join(choices)}")
            if isinstance(item, float) and not math.isfinite(item):
                raise RecipeError(f"{key}={item}: must be a finite number")
            if "holds" in f.metadata and item is not None and not f.metadata["holds"](item):
                raise RecipeError(f"{key}={item}: must be {f.metadata['what']}")


def _expanded(key: str, given: str) -> str:
    known = os.path.expandvars(given)
    if unset := re.search(r"\$\{?(\w+)", known):
        raise RecipeError(f"{key}={given}: the environment variable {unset[1]} is not set")
    return known if "://" in known else os.path.expanduser(known)


def expand_paths(recipe: Any) -> None:
    """Replace `~` and $VARIABLES in the recipe's paths.

    Raises:
        RecipeError: for a variable that is not set.
    """
    for owner, key, f, value in _fields(recipe):
        if "path" not in f.metadata or value is None:
            continue
        expanded = [_expanded(key, p) for p in value] if isinstance(value, list) else _expanded(key, value)
        setattr(owner, f.name, expanded)


def require_divides(what: str, total: int, by: str, divisor: int, fix: str) -> None:
    """Raise RecipeError unless `total` is a multiple of `divisor`."""
    if total % divisor:
        raise RecipeError(f"{what}={total} is not divisible by {by}={divisor}: {fix}")
