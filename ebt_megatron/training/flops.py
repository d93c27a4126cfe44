"""FLOPs of an optimizer step: the parts' costs (`ebt_megatron.model.flops`) times what a recipe does with them."""

from __future__ import annotations

from ebt_megatron.config import Recipe
from ebt_megatron.model.flops import cost
from ebt_megatron.thinking.plan import Plan


def training_flops(recipe: Recipe, vocab_size: int) -> float:
    """FLOPs of one optimizer step over the global batch, for the recipe's engine, in the mean over the steps drawn."""
    per_sample = cost(recipe, vocab_size)
    options = recipe.thinking
    samples = recipe.training.global_batch_size
    if recipe.model.architecture != "ebt":
        return samples * per_sample.transformer()
    if options.replay.enabled:
        samples += (samples + 1) // 2

    def of(plan: Plan) -> float:
        steps = plan.steps
        if options.engine == "double_backward":
            return per_sample.double_backward(steps)
        return per_sample.dual_stream(steps, len(plan.learned), options.reuse, options.regenerate > 0)

    return samples * sum(probability * of(plan) for probability, plan in Plan.distribution(options))
