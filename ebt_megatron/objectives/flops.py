"""FLOPs of an optimizer step: the parts' costs (`ebt_megatron.model.flops`) times what a recipe does with them."""

from __future__ import annotations

from dataclasses import replace

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import StepRule
from ebt_megatron.model.flops import Cost
from ebt_megatron.objectives.replaying import Replaying
from ebt_megatron.thinking.plan import Plan


def vocabulary_products(recipe: Recipe, plan: Plan, distribution: bool = True) -> int:
    """Products over the vocabulary of a micro-batch, in units of U (`Cost.vocabulary`), detached between steps.

    A step embeds the prediction, 1, takes its gradient, 1, and embeds where that leads, 1, which is the next step's
    embedding where the step is along dE/dp and no noise follows; what is learned from takes the embedding's two
    gradients, 2. A start at 0 is embedded, and one of those two taken, without a product.
    Without `thinking.reuse` a step takes its gradient once more to move on, 1, except from a start at 0.
    With `thinking.regenerate` only a step that is learned from does, but each of its passes takes the steps before it
    again, 1 each.
    A start at the context's prediction takes the output's product and its two gradients, 3, and is embedded, 1, which
    is the first step's embedding where no noise comes before it; with `thinking.regenerate` each pass takes it again.
    Values (`Cost.distribution` is False) are embedded by one linear map, and hold their step: 2 a step, 3 more if it is
    learned from, and 3 for a start at the context's prediction.
    """
    options = recipe.thinking
    starts = int(options.starts_at_context)
    if not distribution:
        return 2 * plan.steps + 3 * len(plan.learned) + 3 * starts
    uniform = int(not options.noisy and not starts)
    handed_on = options.langevin_noise == 0 and not StepRule(options.step_rule).by_logits
    products = 2 * plan.steps + 2 * len(plan.learned) - uniform * (0 in plan.learned)
    products += starts * (4 + 2 * bool(options.regenerate))
    for step in range(plan.steps):
        if step == 0:
            embedded = int(options.langevin_noise > 0) if starts else 1 - uniform
        else:
            embedded = int(not handed_on)
        products += embedded
        if options.regenerate:
            learned = int(step in plan.learned)
            products += learned + (step + starts) * (embedded + 1 + learned)
        elif not options.reuse:
            products += 1 - uniform * (step == 0)
    return products


def sample_flops(recipe: Recipe, per_sample: Cost) -> float:
    """FLOPs of a training step for one sample, in the mean over the steps drawn.

    Args:
        recipe: the run.
        per_sample: its task's `cost`.
    """
    options = recipe.thinking
    if recipe.model.architecture != "ebt":
        return per_sample.transformer()

    def of(plan: Plan) -> float:
        if options.engine == "double_backward":
            start = per_sample.transformer() if options.starts_at_context else 0.0
            return per_sample.double_backward(plan.steps) + start
        products = vocabulary_products(recipe, plan, per_sample.distribution)
        return per_sample.dual_stream(plan.steps, len(plan.learned), products, options.reuse)

    return sum(probability * of(plan) for probability, plan in Plan.distribution(options))


def minimum_flops(recipe: Recipe, per_sample: Cost) -> float:
    """The least that a first-order method needs for one sample: nothing computed twice."""
    thinking = replace(recipe.thinking, engine="dual_stream", reuse=True, regenerate=0)
    return sample_flops(replace(recipe, thinking=thinking), per_sample)


def training_flops(recipe: Recipe, per_sample: Cost) -> float:
    """FLOPs of one optimizer step over the global batch, for the recipe's engine, in the mean over the steps drawn.

    Args:
        recipe: the run.
        per_sample: its task's `cost`.
    """
    samples = recipe.training.global_batch_size
    if recipe.model.architecture == "ebt" and recipe.thinking.replay.enabled:
        samples += Replaying.share_of(samples)
    return samples * sample_flops(recipe, per_sample)
