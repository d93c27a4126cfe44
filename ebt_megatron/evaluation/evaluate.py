"""What a run's validation data says of it, at every number of thinking steps; of any modality."""

from __future__ import annotations

import math
from typing import Any

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.evaluation.descent import descent
from ebt_megatron.objectives.energy import EnergyObjective
from ebt_megatron.objectives.validation import validate
from ebt_megatron.session import TrainedRun


def evaluate(run: TrainedRun, steps: int | None = None, example: bool = True) -> dict[str, Any]:
    """Validation loss, energy, and what the task measures, at every number of thinking steps.

    Args:
        run: opened with its validation data.
        steps: the most thinking steps; default: twice those trained with, or as many where thinking starts at the
            context's prediction.
        example: also follow one prediction, and one micro-batch's descent on the energy (one process only).

    Raises:
        RecipeError: for no step of a model that predicts nothing before its first.
    """
    objective, task = run.objective, run.task
    trained = run.recipe.thinking.max_steps if objective.thinks else 1
    usual = trained if objective.starts_at_context else 2 * trained  # more lead a trained prediction away
    most = (usual if steps is None else steps) if objective.thinks else 1
    if not most and not objective.starts_at_context:
        raise RecipeError(
            "--steps 0: there is a prediction before any step only where thinking.initial=context; give at least 1"
        )
    result = validate(objective, run.data["validation"], most)
    per_step = {name: values for name, values in result.measures.items() if isinstance(values, list)}
    rows = [
        {
            "steps": taken,
            "loss": loss,
            **task.describe(loss),
            "energy": result.energies[taken - 1].item() if objective.thinks and taken else None,
        }
        | {name: None if math.isnan(values[i]) else values[i] for name, values in per_step.items()}
        for i, (taken, loss) in enumerate(result.by_steps().items())
    ]
    out: dict[str, Any] = {
        "name": run.recipe.name,
        "architecture": run.recipe.model.architecture,
        "step": run.step,
        "tokens": run.tokens,
        "positions": result.positions,
        "parameters": sum(p.numel() for p in run.model.parameters()) if run.state.world_size == 1 else None,
        "trained_steps": trained,
        "thinking": rows,
    }
    out |= {name: value for name, value in result.measures.items() if name not in per_step}
    if isinstance(objective, EnergyObjective) and example and most and run.state.world_size == 1:
        sample = task.sample(next(iter(run.data["validation"])), run.state.device)
        for row, found in zip(rows[len(rows) - most :], descent(objective, sample, most), strict=True):
            row |= found
        if (worked := task.example(sample, objective.thinker(sample), most)) is not None:
            out["example"] = worked
    return out
