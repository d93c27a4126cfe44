"""Which of many combinations of settings the suite runs."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], every: int) -> list[Any]:
    """All combinations of a value of each axis, of which all but each `every`-th are slow tests.

    Those that are left have every pair of values of two axes, if there are three axes and none of the third is
    shorter than `every`.
    """
    numbered = itertools.product(*(enumerate(axis) for axis in axes))
    return [
        pytest.param(*(value for _, value in case), marks=[pytest.mark.slow] if sum(i for i, _ in case) % every else [])
        for case in numbered
    ]


def slow(value: Any) -> Any:
    """A case for the slow tests."""
    return pytest.param(value, marks=pytest.mark.slow)
