"""Where predictions see each other, the dual-stream gradient is the double-backward gradient as well, in float64."""

from functools import cache, partial

import pytest
import torch

from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import cut_dimension
from ebt_megatron.thinking import double_backward
from ebt_megatron.thinking.dual_stream import Descent, Thinker
from ebt_megatron.thinking.pipeline import Pipeline
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.distributed_utils import run_ranks
from tests.thinking import joint_toy
from tests.thinking.joint_toy import JointToy, LatentPrediction

LENGTH, BATCH = 6, 4
GRADIENTS = ("detached", "full", "truncated")
PLANS = [Plan((0.25, 0.35, 0.4), gradient) for gradient in GRADIENTS]
LAYOUTS = {
    "TP 2": ["parallel.tensor=2"],
    "TP 2 + SP": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "PP 2": ["parallel.pipeline=2"],
    "PP 2, reuse": ["parallel.pipeline=2", "thinking.reuse=true"],
}
LAST = [Plan((0.0, 0.0, 1.0), gradient) for gradient in GRADIENTS]


def draw(*shape, seed):
    return torch.randn(LENGTH, BATCH, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descent(model, plan, rows=slice(None), separable=False):
    """Uneven weights; a step size that is random for each position and, besides, for each sample."""
    start, target = draw(joint_toy.CHANNELS, seed=1), 2 * draw(joint_toy.CHANNELS, seed=2)
    factor = draw(seed=3).exp() * draw(seed=4)[:1].exp()
    weight = draw(seed=5).exp() / BATCH
    group = TensorGroup(model.config.sequence_parallel)
    prediction = LatentPrediction(model.embedding, start[:, rows], target[:, rows], group)
    alpha = (model.step_size.detach() * factor)[:, rows]
    return Descent(prediction, model.step_size, alpha, factor[:, rows], plan, weight[:, rows], separable=separable)


def observed(rows=slice(None)):
    return draw(joint_toy.CHANNELS, seed=6)[:, rows]


def embedded(model, rows=slice(None)):
    return TensorGroup(model.config.sequence_parallel).own_positions(observed(rows)) @ model.condition.T


def think(model, plan, reuse=False, separable=False):
    side = descent(model, plan, separable=separable)
    return Thinker(model, BATCH, LENGTH, None, plan.learned, partial(embedded, model), side, reuse).train()


def named_gradients(model):
    return dict(zip((n for n, _ in joint_toy.named_weights(model)), builders.gradients(model).values(), strict=True))


@cache
def reference(plan):
    """What double backward thinks, and its gradients."""
    recipe = joint_toy.recipe()
    builders.state(recipe)
    model = JointToy(recipe)
    thought = double_backward.train(partial(joint_toy.plain_energies, model, observed()), descent(model, plan))
    return thought, named_gradients(model)


def single(plan, **options):
    recipe = joint_toy.recipe()
    builders.state(recipe)
    model = JointToy(recipe)
    return think(model, plan, **options), named_gradients(model)


def errors(ours, expected):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient: the comparison would be empty"
    return {name: builders.relative_error(ours[name], gradient) for name, gradient in expected.items()}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("plan", PLANS + LAST, ids=str)
def test_every_mode(plan, reuse):
    (expected, gradients), (thought, ours) = reference(plan), single(plan, reuse=reuse)
    assert builders.relative_error(thought.losses, expected.losses) < 1e-12
    assert builders.relative_error(thought.energies, expected.energies) < 1e-12
    assert max(errors(ours, gradients).values()) < 1e-10


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_factors_before_the_energies_would_be_wrong(plan):
    """The toy is a judge: what is exact for a separable energy is far from exact here."""
    _, gradients = reference(plan)
    _, ours = single(plan, separable=True)
    assert errors(ours, gradients)["layers.0.qkv.weight"] > 1e-2


def think_in_stages(model, plan, reuse):
    """Train on two micro-batches of two samples, on this rank's stage."""

    def begin(index):
        rows = slice(2 * index, 2 * index + 2)
        first = (partial(embedded, model, rows), descent(model, plan, rows)) if model.first else (None, None)
        return Thinker(model, 2, LENGTH, None, plan.learned, *first, reuse)

    def end(_, thinker):
        thinker.finish(plan.steps)

    Pipeline(model, plan, [2, 2], LENGTH, begin, end, None, reuse).run()


def on_layout(overrides):
    """Gradients of this rank for each plan, as {name: (how to join those of all ranks, gradient)}."""
    recipe = joint_toy.recipe(*overrides)
    builders.state(recipe)
    out = []
    for plan in PLANS:
        model = JointToy(recipe)
        if recipe.parallel.pipeline == 1:
            think(model, plan, recipe.thinking.reuse)
        else:
            think_in_stages(model, plan, recipe.thinking.reuse)
        gradients = zip(named_gradients(model).items(), map(how_to_join, model.parameters()), strict=True)
        out.append({name: (how, gradient.numpy()) for (name, gradient), how in gradients})
    return out


def how_to_join(parameter):
    if (dim := cut_dimension(parameter)) is not None:
        return dim
    return "sum" if getattr(parameter, "sequence_parallel", False) else "same"


def join(how, gradients):
    gradients = [torch.from_numpy(g) for g in gradients]
    if how == "sum":
        return sum(gradients)
    if how == "same":
        assert all(torch.equal(g, gradients[0]) for g in gradients)
        return gradients[0]
    return torch.cat(gradients, how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_two_ranks(layout):
    ranks = run_ranks(on_layout, 2, LAYOUTS[layout])
    for index, plan in enumerate(PLANS):
        _, expected = reference(plan)
        ours = {}
        for name in expected:
            held = [gradients[index][name] for gradients in ranks if name in gradients[index]]
            ours[name] = join(held[0][0], [gradient for _, gradient in held])
        assert max(errors(ours, expected).values()) < 1e-10, plan
