"""The count of FLOPs that speeds are stated against is what a step really does."""

import pytest

from ebt_megatron.config import load_recipe
from ebt_megatron.model.flops import cost
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.thinking.plan import Plan
from tools.bench import counted_flops, minimum_flops, training_step

SIZE = [
    "model.num_layers=2", "model.hidden_size=128", "model.num_attention_heads=2", "optimizer.lr=1e-3",
    "data.sequence_length=128", "training.micro_batch_size=2", "training.global_batch_size=2", "model.kernels=torch",
]  # fmt: skip
VOCAB = 1024


def measured(*overrides):
    recipe = load_recipe(None, [*SIZE, *overrides])
    return recipe, counted_flops(training_step(recipe, VOCAB))


def test_reuse_is_within_15_percent_of_the_minimum():
    recipe, flops = measured("thinking.reuse=true")
    assert 0.95 <= flops / minimum_flops(recipe, VOCAB) <= 1.15


@pytest.mark.parametrize("steps", [1, 3])
def test_the_dual_stream_costs_what_is_said(steps):
    recipe, flops = measured(f"thinking.min_steps={steps}", f"thinking.max_steps={steps}")
    assert flops == pytest.approx(2 * cost(recipe, VOCAB).dual_stream(steps, steps), rel=0.15)


def test_learning_drawn_steps_costs_what_is_said():
    recipe = load_recipe(None, [*SIZE, "thinking.min_steps=3", "thinking.max_steps=3", "thinking.learned_steps=2"])
    step, draws = training_step(recipe, VOCAB), 30
    plans = [Plan.draw(recipe.thinking, recipe.training.seed, seed) for seed in range(draws)]
    flops = {plan.step_weights: counted_flops(step, seed) for seed, plan in enumerate(plans)}
    assert len(flops) == 3
    mean = sum(flops.values()) / 3  # each subset is as likely
    assert mean == pytest.approx(training_flops(recipe, cost(recipe, VOCAB)), rel=0.15)


@pytest.mark.parametrize(("loss", "learned"), [("every", 3), ("last", 1)])
def test_logits_made_anew_cost_what_is_said(loss, learned):
    steps = ("thinking.min_steps=3", "thinking.max_steps=3", f"thinking.loss={loss}")
    recipe, stored = measured(*steps)
    recipe, anew = measured(*steps, "thinking.regenerate=100")
    per_sample = cost(recipe, VOCAB)
    more = per_sample.dual_stream(3, learned, regenerate=True) - per_sample.dual_stream(3, learned)
    assert anew - stored == pytest.approx(2 * more)


def test_transformer_costs_what_is_said():
    recipe, flops = measured("model.architecture=transformer")
    # torch's flash attention on CPU is not counted, and nothing else is left out
    assert 0.8 <= flops / minimum_flops(recipe, VOCAB) <= 1.02
