"""Tiny models ready to think, without run directories."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ebt_megatron.inference.engine import Engine
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import predictor_of
from ebt_megatron.inference.stages import Stages
from ebt_megatron.tasks.text import Text
from tests import builders


def run_of(recipe, dtype=torch.float64):
    """What `session.open_run` gives, of an untrained model."""
    model = builders.build(recipe, dtype)
    return SimpleNamespace(
        recipe=recipe, state=builders.state(recipe), task=Text(recipe, builders.VOCAB), model=model,
        objective=builders.objective(model, recipe),
    )  # fmt: skip


def engine_of(run) -> Engine:
    return Engine(run.model, run.recipe, Stages(run.state, run.model.config), run.task.length, 1.0)


def predictor(recipe, dtype=torch.float64, **options):
    return predictor_of(run_of(recipe, dtype), ThinkingOptions.of(options))


def everywhere(tokens):
    """Rows, positions and values of all tokens [B, S], row after row."""
    rows, positions = torch.meshgrid(*map(torch.arange, tokens.shape), indexing="ij")
    return rows.flatten(), positions.flatten(), tokens.flatten()
