"""Computes a training step and validation, for an energy model and for a feed-forward one, and counts their FLOPs."""

from __future__ import annotations

from typing import Any

from ebt_megatron.config import Recipe
from ebt_megatron.objectives.energy import EnergyObjective
from ebt_megatron.objectives.feed_forward import FeedForwardObjective
from ebt_megatron.objectives.interface import Objective, Timing
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.tasks.interface import Task


def build_objective(model: Any, recipe: Recipe, task: Task, state: ParallelState, timers: Timing) -> Objective:
    """The objective of the recipe's architecture; `model` is this stage, not yet wrapped.

    Raises:
        RecipeError: for CUDA graphs without CUDA.
    """
    kind = EnergyObjective if recipe.model.architecture == "ebt" else FeedForwardObjective
    return kind(model, recipe, task, state, timers)
