"""FLOPs of an optimizer step: the parts' costs (`ebt_megatron.model.flops`) times what a recipe does with them."""

from __future__ import annotations

from ebt_megatron.config import Recipe
from ebt_megatron.model.flops import Cost
from ebt_megatron.objectives.replaying import Replaying
from ebt_megatron.thinking.plan import Plan


def training_flops(recipe: Recipe, per_sample: Cost) -> float:
    """FLOPs of one optimizer step over the global batch, for the recipe's engine, in the mean over the steps drawn.

    Args:
        recipe: the run.
        per_sample: its task's `cost`.
    """
    options = recipe.thinking
    samples = recipe.training.global_batch_size
    if recipe.model.architecture != "ebt":
        return samples * per_sample.transformer()
    if options.replay.enabled:
        samples += Replaying.share_of(samples)

    def of(plan: Plan) -> float:
        if options.engine == "double_backward":
            return per_sample.double_backward(plan.steps)
        return per_sample.dual_stream(plan.steps, len(plan.learned), options.reuse, options.regenerate > 0)

    return samples * sum(probability * of(plan) for probability, plan in Plan.distribution(options))
