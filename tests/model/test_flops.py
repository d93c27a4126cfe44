"""The count of FLOPs that speeds are stated against is what a step really does."""

import pytest

from benchmarks.step import counted_flops, least_flops, training_step
from ebt_megatron.config import load_recipe
from ebt_megatron.model.flops import cost
from ebt_megatron.objectives.flops import training_flops, vocabulary_products
from ebt_megatron.tasks.images import Images
from ebt_megatron.thinking.plan import Plan

SIZE = [
    "model.num_layers=2",
    "model.hidden_size=128",
    "model.num_attention_heads=2",
    "optimizer.lr=1e-3",
    "data.sequence_length=128",
    "training.micro_batch_size=2",
    "training.global_batch_size=2",
    "model.kernels=torch",
]
VOCAB = 1024
TINY = ["model.num_layers=1", "model.hidden_size=32", "data.sequence_length=32"]  # where counts are exact, not near
FEW = 128  # of a vocabulary


def measured(*overrides, vocab=VOCAB):
    recipe = load_recipe(None, [*SIZE, *overrides])
    return recipe, counted_flops(training_step(recipe, vocab))


def test_reuse_is_within_17_percent_of_the_minimum():
    recipe, flops = measured("thinking.reuse=true")
    assert 0.95 <= flops / least_flops(recipe, VOCAB) <= 1.17


def thinking(steps, *overrides):
    return [f"thinking.min_steps={steps}", f"thinking.max_steps={steps}", *overrides]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_dual_stream_costs_what_is_said(steps):
    recipe, flops = measured(*thinking(steps))
    assert flops == pytest.approx(training_flops(recipe, cost(recipe, VOCAB)), rel=0.15)


# Layers cost the same in all of these, so the difference is the vocabulary's, to the last product.
@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize("storage", ["thinking.reuse=false", "thinking.regenerate=100"])
@pytest.mark.parametrize(
    "other",
    [
        "thinking.initial_std=1",
        "thinking.langevin_noise=1",
        "thinking.step_rule=logit_descent",
        "thinking.step_rule=mirror_descent",
        "thinking.regenerate=50",
    ],
)
def test_products_over_the_vocabulary_are_counted_exactly(loss, storage, other):
    (base, flops), (recipe, others) = (
        measured(*TINY, *thinking(3, f"thinking.loss={loss}", *overrides), vocab=FEW)
        for overrides in ((storage,), (storage, other))
    )
    per_sample = cost(recipe, FEW)
    assert others - flops == pytest.approx(training_flops(recipe, per_sample) - training_flops(base, per_sample))


@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize("storage", ["thinking.reuse=true", "thinking.reuse=false", "thinking.regenerate=100"])
@pytest.mark.parametrize("rule", ["mirror_descent", "logit_descent thinking.langevin_noise=1"])
def test_products_from_the_context_s_prediction_are_counted_exactly(loss, storage, rule):
    """The layers do not see the vocabulary's size."""
    options = f"{storage} thinking.initial=context thinking.step_rule={rule} thinking.loss={loss}"
    recipe = load_recipe(None, [*SIZE, *TINY, *thinking(3, *options.split())])
    small, large = (counted_flops(training_step(recipe, vocab)) for vocab in (FEW, 2 * FEW))
    said = [training_flops(recipe, cost(recipe, vocab)) for vocab in (FEW, 2 * FEW)]
    assert large - small == pytest.approx(said[1] - said[0])


def test_a_step_from_the_context_s_prediction_takes_eight_products():
    """The output and its two gradients, p W, G W^T, p' W, and the embedding's two gradients."""
    context = ["thinking.reuse=true", "thinking.initial=context", "thinking.step_rule=mirror_descent"]
    recipe = load_recipe(None, [*SIZE, *thinking(1, *context)])
    (plan,) = (plan for _, plan in Plan.distribution(recipe.thinking))
    assert vocabulary_products(recipe, plan) == 8


def test_products_with_the_numbers_of_a_patch_are_counted_exactly():
    recipe = load_recipe(
        None,
        [
            *SIZE,
            "data.modality=images",
            "data.sequence_length=16",
            "model.conditioning=none",
            "thinking.initial=observed",
            "thinking.reuse=true",
        ],
    )
    narrow, wide = (counted_flops(training_step(recipe, width)) for width in (16, 48))
    said = [training_flops(recipe, Images(recipe, [16, width]).cost()) for width in (16, 48)]
    assert wide - narrow == pytest.approx(said[1] - said[0])


def test_learning_drawn_steps_costs_what_is_said():
    recipe = load_recipe(None, [*SIZE, "thinking.min_steps=3", "thinking.max_steps=3", "thinking.learned_steps=2"])
    step = training_step(recipe, VOCAB)
    drawn = {Plan.draw(recipe.thinking, recipe.training.seed, seed).step_weights: seed for seed in range(30)}
    assert len(drawn) == 3
    mean = sum(counted_flops(step, seed) for seed in drawn.values()) / 3  # each subset is as likely
    assert mean == pytest.approx(training_flops(recipe, cost(recipe, VOCAB)), rel=0.15)


def test_transformer_costs_what_is_said():
    recipe, flops = measured("model.architecture=baseline")
    # torch's flash attention on CPU is not counted, or from 2.15 on as if it were not causal
    assert 0.8 <= flops / least_flops(recipe, VOCAB) <= 1.12
