"""FLOPs of an optimizer step: the parts' costs (`ebt_megatron.model.flops`) times what a recipe does with them."""

from __future__ import annotations

from dataclasses import replace

from ebt_megatron.config import Recipe, ThinkingConfig
from ebt_megatron.kernels import StepRule
from ebt_megatron.model.flops import Cost
from ebt_megatron.objectives.replaying import Replaying
from ebt_megatron.thinking.plan import Plan


def vocabulary_products(options: ThinkingConfig, plan: Plan) -> int:
    """Products over the vocabulary of a micro-batch, in units of U, predictions detached between steps.

    A step embeds the prediction, 1, takes its gradient, 1, and embeds where that leads, 1, which is the next step's
    embedding where the step is along dE/dp and no noise follows; what is learned from takes the embedding's two
    gradients, 2. A start at 0 is embedded, and one of those two taken, without a product.
    Without `thinking.reuse` a step takes its gradient once more to move on, 1, except from a start at 0.
    With `thinking.regenerate` only a step that is learned from does, but each of its passes takes the steps before it
    again, 1 each.
    """
    uniform = int(not options.noisy)
    handed_on = options.langevin_noise == 0 and not StepRule(options.step_rule).by_logits
    products = 2 * plan.steps + 2 * len(plan.learned) - uniform * (0 in plan.learned)
    for step in range(plan.steps):
        embedded = 1 - uniform if step == 0 else int(not handed_on)
        products += embedded
        if options.regenerate:
            learned = int(step in plan.learned)
            products += learned + step * (embedded + 1 + learned)
        elif not options.reuse:
            products += 1 - uniform * (step == 0)
    return products


def sample_flops(options: ThinkingConfig, per_sample: Cost) -> float:
    """FLOPs of an EBT's training step for one sample, in the mean over the steps drawn.

    Args:
        options: the recipe's.
        per_sample: its task's `cost`.
    """

    def of(plan: Plan) -> float:
        if options.engine == "double_backward":
            return per_sample.double_backward(plan.steps)
        products = vocabulary_products(options, plan)
        return per_sample.dual_stream(plan.steps, len(plan.learned), products, options.reuse)

    return sum(probability * of(plan) for probability, plan in Plan.distribution(options))


def minimum_flops(recipe: Recipe, per_sample: Cost) -> float:
    """The least that a first-order method needs for one sample: nothing computed twice."""
    if recipe.model.architecture != "ebt":
        return per_sample.transformer()
    return sample_flops(replace(recipe.thinking, engine="dual_stream", reuse=True, regenerate=0), per_sample)


def training_flops(recipe: Recipe, per_sample: Cost) -> float:
    """FLOPs of one optimizer step over the global batch, for the recipe's engine, in the mean over the steps drawn.

    Args:
        recipe: the run.
        per_sample: its task's `cost`.
    """
    samples = recipe.training.global_batch_size
    if recipe.model.architecture != "ebt":
        return samples * per_sample.transformer()
    if recipe.thinking.replay.enabled:
        samples += Replaying.share_of(samples)
    return samples * sample_flops(recipe.thinking, per_sample)
