"""The dual-stream gradient is the double-backward gradient, in float64, for every mode."""

import pytest
import torch

from ebt_megatron.core.timing import Timers
from ebt_megatron.kernels import StepRule
from ebt_megatron.objectives import build_objective
from ebt_megatron.tasks.text import Text
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.cases import thinned

MODES = [
    ("every", "detached"),
    ("last", "detached"),
    ("every", "full"),
    ("last", "full"),
    ("every", "truncated"),
    ("last", "truncated"),
]
CONDITIONING = ["none", "time_embed", "time_embed_sequence", "adaln", "adaln_zero", "adaln_sequence"]
RULES = list(StepRule)
STORAGE = {  # what double backward has no use for, and what it must do as well
    "reuse": (("thinking.reuse=true",), ()),
    "bf16": ((), ("thinking.logits_dtype=bfloat16",)),
    "bf16, reuse": (("thinking.reuse=true",), ("thinking.logits_dtype=bfloat16",)),
    "regenerated": (("thinking.regenerate=7",), ()),
    "regenerated, reuse": (("thinking.regenerate=1000", "thinking.reuse=true"), ()),
}
# From a start at 0, and after a step without noise, the embedding is known without a product over the vocabulary.
NOISE = ["thinking.langevin_noise=0.7", "thinking.initial_std=1", "thinking.initial_std=0"]


def compare(
    *overrides: str, documents: bool = False, ours: tuple[str, ...] = (), drawn: tuple[int, ...] | None = None
) -> None:
    """With `ours`: overrides that double backward has no use for."""
    recipe = builders.small_recipe(*overrides)
    batch = builders.text_batch(documents=documents)
    plan = Plan.of(recipe.thinking, 3, drawn)
    model = builders.build(recipe)
    thoughts, grads = [], []
    for engine in (builders.double_backward, builders.dual_stream):
        model.zero_grad(set_to_none=True)
        thoughts.append(engine(model, recipe, batch, plan))
        recipe = builders.small_recipe(*overrides, *ours)
        grads.append(builders.gradients(model))
    assert builders.relative_error(thoughts[1].losses, thoughts[0].losses) < 1e-10
    assert builders.relative_error(thoughts[1].energies, thoughts[0].energies) < 1e-10
    if model.starts_thinking:
        assert builders.relative_error(thoughts[1].initial, thoughts[0].initial) < 1e-10
    assert set(grads[0]) == set(grads[1])
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, reference in grads[0].items():
        if name not in learned:
            continue
        assert reference.abs().max() > 0, f"{name} gets no gradient: the comparison would be empty"
        assert builders.relative_error(grads[1][name], reference) < 1e-10, name


def options_of(mode: tuple[str, str], rule: StepRule = StepRule.PROBABILITY) -> list[str]:
    return [f"thinking.loss={mode[0]}", f"thinking.gradient={mode[1]}", f"thinking.step_rule={rule}"]


@pytest.mark.parametrize(("mode", "conditioning"), thinned(MODES, CONDITIONING, every=2))
def test_every_mode_and_conditioning(mode, conditioning):
    compare(*options_of(mode), f"model.conditioning={conditioning}", "model.kernels=torch")


@pytest.mark.parametrize(("mode", "rule", "kernels"), thinned(MODES, RULES, ["reference", "torch"], every=2))
def test_every_mode_and_step_rule(mode, rule, kernels):
    compare(
        *options_of(mode, rule),
        f"model.kernels={kernels}",
        "thinking.step_size_scale=2",
        "thinking.langevin_noise=0.7",
    )


@pytest.mark.parametrize(("mode", "rule", "storage"), thinned(MODES, RULES, STORAGE, every=3))
def test_every_mode_and_step_rule_in_every_storage(mode, rule, storage):
    ours, both = STORAGE[storage]
    i = MODES.index(mode) + RULES.index(rule)
    noise = NOISE[(MODES.index(mode) + list(STORAGE).index(storage)) % len(NOISE)]
    compare(
        *options_of(mode, rule),
        *both,
        "model.kernels=torch",
        noise,
        f"model.conditioning={CONDITIONING[i % len(CONDITIONING)]}",
        ours=ours,
    )


CONTEXT = ("thinking.initial=context", "thinking.initial_loss_weight=3")


@pytest.mark.parametrize(
    ("mode", "rule", "storage"),
    thinned(MODES, [StepRule.MIRROR, StepRule.LOGIT], [*STORAGE, "torch", "reference"], every=2),
)
def test_thinking_from_the_context_s_prediction(mode, rule, storage):
    ours, both = STORAGE.get(storage, ((), (f"model.kernels={storage}",)))
    i = MODES.index(mode) + list(RULES).index(rule)
    compare(
        *options_of(mode, rule),
        *CONTEXT,
        *both,
        "thinking.langevin_noise=0.7" if i % 2 else "thinking.step_size_scale=2",
        f"model.conditioning={['none', 'time_embed', 'adaln', 'adaln_zero'][i % 4]}",
        "model.energy_head=quadratic",
        documents=i % 3 == 0,
        ours=ours,
    )


@pytest.mark.parametrize("gradient", ["detached", "full", "truncated"])
@pytest.mark.parametrize("drawn", [(0,), (1,), (0, 2)])
def test_thinking_from_the_context_s_prediction_with_drawn_losses_and_a_fixed_step_size(gradient, drawn):
    compare(*options_of(("every", gradient), StepRule.MIRROR), *CONTEXT, "thinking.learn_step_size=false", drawn=drawn)


def test_truncated_from_the_context_s_prediction_is_not_detached():
    """The start is learned, and acts before the last step."""
    compare(*options_of(("last", "truncated"), StepRule.MIRROR), *CONTEXT, "thinking.learn_step_size=false")


def test_the_context_s_own_prediction_is_a_transformer_s():
    """Zero steps: as Transformer++ with the same weights."""
    recipe = builders.small_recipe(*CONTEXT, "thinking.step_rule=mirror_descent")
    model, batch = builders.build(recipe), builders.text_batch()
    baseline = builders.build(builders.small_recipe("model.architecture=baseline"))
    ours = dict(model.named_parameters())
    names = {"embedding": "modality.context", "final_norm": "context_norm", "output": "modality.output"}
    with torch.no_grad():
        for name, parameter in baseline.named_parameters():
            part = name.partition(".")[0]
            parameter.copy_(ours[name.replace(part, names.get(part, part), 1)])
    thought = builders.new_thinker(model, recipe, batch).think(0)
    assert thought.losses.shape == thought.energies.shape == (0, 10, 2)
    torch.testing.assert_close(thought.initial, baseline(batch.observed, batch.targets).to(torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditioning", ["time_embed_sequence", "adaln_sequence"])
def test_a_quadratic_energy_head(mode, conditioning):
    compare(
        *options_of(mode),
        "model.energy_head=quadratic",
        f"model.conditioning={conditioning}",
        "thinking.step_size_scale=2",
        ours=("thinking.reuse=true",),
    )


@pytest.mark.parametrize("mode", MODES)
def test_document_masks(mode):
    compare(*options_of(mode), documents=True)


@pytest.mark.parametrize("gradient", ["detached", "full"])
@pytest.mark.parametrize("drawn", [(0,), (1,), (0, 2)])
def test_losses_of_some_steps(gradient, drawn):
    compare(*options_of(("every", gradient)), drawn=drawn)


@pytest.mark.parametrize(("steps", "learned"), [(2, 1), (3, 1), (3, 2), (5, 3)])
def test_the_weights_of_drawn_losses_are_those_of_all_in_the_mean(steps, learned):
    recipe = builders.small_recipe(
        f"thinking.min_steps={steps}", f"thinking.max_steps={steps}", f"thinking.learned_steps={learned}"
    )
    draws = 20_000
    mean = torch.zeros(steps, dtype=torch.float64)
    for iteration in range(draws):
        plan = Plan.draw(recipe.thinking, 7, iteration)
        assert len(plan.learned) == learned
        mean[: plan.steps] += torch.tensor(plan.step_weights) / draws
    deviation = (steps / learned - 1) ** 0.5 / steps / draws**0.5  # of a weight that is 1/k with probability k/n
    assert (mean - 1 / steps).abs().max() < 4.5 * deviation


@pytest.mark.parametrize("rule", RULES)
def test_with_a_fixed_step_size_truncated_is_detached(rule):
    """Only the last step's energy is learned from, and nothing else depends on a parameter."""
    recipe = builders.small_recipe(
        *options_of(("last", "truncated"), rule), "thinking.learn_step_size=false", "thinking.langevin_noise=0.7"
    )
    model, batch, grads = builders.build(recipe), builders.text_batch(), []
    assert Plan.of(recipe.thinking, 3).gradient == "detached"
    for gradient in ("detached", "truncated"):
        model.zero_grad(set_to_none=True)
        builders.dual_stream(model, recipe, batch, Plan((0.0, 0.0, 1.0), gradient))
        grads.append(builders.gradients(model))
    for name, detached in grads[0].items():
        assert builders.relative_error(grads[1][name], detached) < 1e-12, name


def test_langevin_noise_in_evaluation_can_be_switched_off():
    losses = []
    for switch in ("true", "false"):
        recipe = builders.small_recipe("thinking.langevin_noise=3", f"thinking.langevin_in_evaluation={switch}")
        objective = build_objective(
            builders.build(recipe), recipe, Text(recipe, builders.VOCAB), builders.state(recipe), Timers()
        )
        losses.append(objective.evaluate(builders.sample(recipe), 3).losses)
    recipe = builders.small_recipe()
    objective = build_objective(
        builders.build(recipe), recipe, Text(recipe, builders.VOCAB), builders.state(recipe), Timers()
    )
    quiet = objective.evaluate(builders.sample(recipe), 3).losses
    assert torch.equal(losses[1], quiet) and not torch.equal(losses[0], quiet)


@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_regenerated_logits_are_never_stored(gradient):
    recipe = builders.small_recipe("thinking.regenerate=4", f"thinking.gradient={gradient}")
    thinker = builders.new_thinker(builders.build(recipe), recipe, builders.text_batch(), Plan.of(recipe.thinking, 3))
    thinker.train()
    prediction = thinker.descent.prediction
    holders = [prediction, prediction.stored, *prediction.stored.steps]
    holders += [thinker.descent._adjoint] if gradient == "full" else []
    held = [t for holder in holders for t in vars(holder).values() if isinstance(t, torch.Tensor)]
    wide = [t for t in held if t.shape[-1] == len(prediction.table)]
    assert len(wide) == (1 if gradient == "full" else 0)  # the adjoint
    assert prediction.logits.shape == (10, 2, len(prediction.table))


@pytest.mark.parametrize("reuse", ["true", "false"])
def test_recomputed_layers_give_the_same_gradient(reuse):
    compare("model.recompute_layers=true", f"thinking.reuse={reuse}")


def test_a_step_size_that_fell_below_its_least_may_rise_again():
    gradients = []
    for step_size in (0.5, 1.0):
        recipe = builders.small_recipe("thinking.step_size_min=1.0")
        model = builders.build(recipe)
        torch.nn.init.constant_(model.step_size, step_size)
        builders.dual_stream(model, recipe, builders.text_batch(), Plan.of(recipe.thinking, 2))
        gradients.append(model.step_size.grad.item())
    assert gradients[0] == gradients[1] != 0


def test_thinking_without_learning_gives_the_same_losses_and_no_gradient():
    recipe = builders.small_recipe()
    model, batch = builders.build(recipe), builders.text_batch()
    learned = builders.dual_stream(model, recipe, batch, Plan.of(recipe.thinking, 3))
    model.zero_grad(set_to_none=True)
    thought = builders.new_thinker(model, recipe, batch).think(3)
    torch.testing.assert_close(thought.losses, learned.losses, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in model.parameters())
