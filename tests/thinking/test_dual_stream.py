"""The dual-stream gradient is the double-backward gradient, in float64, for every mode."""

import itertools

import pytest
import torch

from ebt_megatron.thinking.dual_stream import Plan
from tests import builders

MODES = [
    ("every", "detached"),
    ("last", "detached"),
    ("every", "full"),
    ("last", "full"),
    ("last", "truncated"),
]
CONDITIONING = ["none", "time_embed", "time_embed_sequence", "adaln", "adaln_zero"]


def compare(*overrides: str, documents: bool = False, ours: tuple[str, ...] = ()) -> None:
    """With `ours`: overrides that double backward has no use for."""
    recipe = builders.small_recipe(*overrides)
    batch = builders.text_batch(documents=documents)
    plan = Plan.of(recipe.thinking, 3)
    model = builders.build(recipe)
    thoughts, grads = [], []
    for engine in (builders.double_backward, builders.dual_stream):
        model.zero_grad(set_to_none=True)
        thoughts.append(engine(model, recipe, batch, plan))
        recipe = builders.small_recipe(*overrides, *ours)
        grads.append(builders.gradients(model))
    assert builders.relative_error(thoughts[1].losses, thoughts[0].losses) < 1e-10
    assert builders.relative_error(thoughts[1].energies, thoughts[0].energies) < 1e-10
    assert set(grads[0]) == set(grads[1])
    for name, reference in grads[0].items():
        assert reference.abs().max() > 0, f"{name} gets no gradient: the comparison would be empty"
        assert builders.relative_error(grads[1][name], reference) < 1e-10, name


@pytest.mark.parametrize(("mode", "conditioning"), itertools.product(MODES, CONDITIONING))
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_every_mode_and_conditioning(mode, conditioning, kernels):
    loss, gradient = mode
    compare(f"thinking.loss={loss}", f"thinking.gradient={gradient}", f"model.conditioning={conditioning}",
            f"model.kernels={kernels}")  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_random_step_sizes_and_langevin_noise(mode):
    loss, gradient = mode
    compare(f"thinking.loss={loss}", f"thinking.gradient={gradient}", "thinking.step_size_scale=2",
            "thinking.langevin_noise=0.7", "thinking.initial=zeros")  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_document_masks(mode):
    compare(f"thinking.loss={mode[0]}", f"thinking.gradient={mode[1]}", documents=True)


@pytest.mark.parametrize(("mode", "conditioning"), [(m, CONDITIONING[i]) for i, m in enumerate(MODES)])
def test_reuse_gives_the_same_gradient(mode, conditioning):
    compare(f"thinking.loss={mode[0]}", f"thinking.gradient={mode[1]}", f"model.conditioning={conditioning}",
            "model.kernels=torch", "thinking.reuse=true")  # fmt: skip


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode[1] == "detached"])
@pytest.mark.parametrize("options", [("model.kernels=reference",), ("model.kernels=torch",), ("thinking.reuse=true",)])
def test_descending_on_probabilities(mode, options):
    compare(f"thinking.loss={mode[0]}", f"thinking.gradient={mode[1]}", "thinking.descend_on=probabilities",
            "thinking.langevin_noise=0.7", *options)  # fmt: skip


@pytest.mark.parametrize(("mode", "rows"), [*((mode, 7) for mode in MODES), (MODES[0], 1), (MODES[2], 1000)])
def test_regenerated_logits_give_the_same_gradient(mode, rows):
    compare(f"thinking.loss={mode[0]}", f"thinking.gradient={mode[1]}", "model.kernels=torch",
            "thinking.langevin_noise=0.7", ours=(f"thinking.regenerate={rows}",))  # fmt: skip


def test_regenerated_logits_with_reuse_and_on_probabilities():
    compare("thinking.loss=every", "model.kernels=torch", "thinking.reuse=true", "thinking.langevin_noise=0.7",
            "thinking.descend_on=probabilities", ours=("thinking.regenerate=6",))  # fmt: skip


@pytest.mark.parametrize("options", [
    ("thinking.loss=every", "model.kernels=reference"), ("thinking.loss=last", "model.kernels=torch"),
    ("thinking.reuse=true", "model.kernels=torch"), ("thinking.descend_on=probabilities", "model.kernels=torch"),
])  # fmt: skip
def test_the_gradient_of_logits_in_bf16_is_that_of_rounded_logits(options):
    compare("thinking.logits_dtype=bfloat16", "thinking.langevin_noise=0.7", *options)


@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_regenerated_logits_are_never_stored(gradient):
    recipe = builders.small_recipe("thinking.regenerate=4", f"thinking.gradient={gradient}")
    thinker = builders.new_thinker(builders.build(recipe), recipe, builders.text_batch(), Plan.of(recipe.thinking, 3))
    thinker.train()
    prediction = thinker.descent.prediction
    held = [t for t in vars(prediction).values() if isinstance(t, torch.Tensor)]
    held += [t for step in prediction.taken for t in vars(step).values()]
    wide = [t for t in held if t.shape[-1] == len(prediction.table)]
    assert len(wide) == (1 if gradient == "full" else 0)  # the adjoint
    assert prediction.logits.shape == (10, 2, len(prediction.table))


def test_recomputed_layers_give_the_same_gradient():
    compare("model.recompute_layers=true")


def test_a_clamped_step_size_gets_no_gradient():
    recipe = builders.small_recipe("thinking.step_size=0.5", "thinking.step_size_min=1.0")
    model = builders.build(recipe)
    builders.dual_stream(model, recipe, builders.text_batch(), Plan.of(recipe.thinking, 2))
    assert model.step_size.grad is None or model.step_size.grad.abs().max() == 0


def test_thinking_without_learning_gives_the_same_losses_and_no_gradient():
    recipe = builders.small_recipe()
    model, batch = builders.build(recipe), builders.text_batch()
    learned = builders.dual_stream(model, recipe, batch, Plan.of(recipe.thinking, 3))
    model.zero_grad(set_to_none=True)
    thought = builders.new_thinker(model, recipe, batch).think(3)
    torch.testing.assert_close(thought.losses, learned.losses, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in model.parameters())
