"""The quickstarts train on two ranks: every recipe of theirs splits its batch over them."""

from pathlib import Path

import pytest

import ebt_megatron
from ebt_megatron.config import load_recipe
from examples.steps import PROCESSES

RECIPES = Path(ebt_megatron.__file__).parent / "recipes"

QUICK = sorted(path for path in RECIPES.rglob("*.yaml") if path.name.startswith(("quickstart", "sudoku6")))


@pytest.mark.parametrize("path", QUICK, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_batch_is_split_over_the_ranks(path):
    training = load_recipe(path).training
    assert training.global_batch_size % (training.micro_batch_size * PROCESSES.default) == 0
