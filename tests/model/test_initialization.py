"""Initial weights: the first step's logits do not depend on vocabulary and width; the paper's draws stay available."""

import pytest
import torch

from ebt_megatron.config import load_recipe
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.text import Text
from tests import builders

SIZES = {96: (2, 2), 256: (4, 4), 384: (6, 6)}  # width: layers, heads


def first_logits(width: int, vocab: int, *overrides: str) -> torch.Tensor:
    """After one step from random tokens, with each position's mean taken off; [S, 1, V]."""
    layers, heads = SIZES[width]
    recipe = load_recipe(
        None,
        [
            f"model.num_layers={layers}",
            f"model.num_attention_heads={heads}",
            f"model.hidden_size={width}",
            "optimizer.lr=1e-3",
            "data.sequence_length=16",
            "model.kernels=torch",
            *overrides,
        ],
    )
    builders.state(recipe)
    model = build_model(recipe, Text(recipe, vocab))
    tokens = torch.randint(vocab, (1, 17), generator=torch.Generator().manual_seed(0))
    batch = builders.Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(1))
    thinker = builders.new_thinker(model, recipe, batch)
    thinker.think(1)
    logits = thinker.descent.prediction.logits[..., :vocab]
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("head", ["linear", "quadratic"])
@pytest.mark.parametrize("vocab", [1024, 8192, 50304])
@pytest.mark.parametrize("width", SIZES)
def test_the_first_logits_are_of_order_one_at_any_size(width, vocab, head):
    assert 0.4 < first_logits(width, vocab, f"model.energy_head={head}").std() < 2.5


@pytest.mark.parametrize("conditioning", ["none", "time_embed_sequence", "adaln", "adaln_zero"])
def test_the_first_logits_are_of_order_one_with_any_conditioning(conditioning):
    assert 0.4 < first_logits(96, 1024, f"model.conditioning={conditioning}").std() < 2.5


def test_the_step_size_sets_how_fast_logits_are_learned_but_not_how_large_they_start():
    small, large = (first_logits(96, 1024, f"thinking.step_size={alpha}").std().item() for alpha in (1, 100))
    assert large == pytest.approx(small, rel=0.2)


def test_the_first_step_may_begin_smaller():
    small, usual = (first_logits(96, 1024, f"thinking.first_step_std={std}").std().item() for std in (0.1, 1))
    assert small == pytest.approx(usual / 10, rel=0.2)


def test_the_papers_draws():
    recipe = builders.small_recipe("model.initialization=paper", "model.hidden_size=128")
    builders.state(recipe)
    model = build_model(recipe, Text(recipe, 4000))
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert std["modality.context.table.weight"] == pytest.approx(1, rel=0.02)
    assert std["step_embedding"] == pytest.approx(1, rel=0.2)
    assert std["modality.prediction_embedding.weight"] == pytest.approx((2 / 4128) ** 0.5, rel=0.02)


def test_a_shared_row_moves_no_logit_against_another():
    """Losses and energies of a first step are the same with any vector added to every row, but for the start."""
    recipe = builders.small_recipe()
    model, batch = builders.build(recipe), builders.text_batch()
    shared = torch.randn(32, dtype=torch.float64)
    before = builders.new_thinker(model, recipe, batch).think(1)
    with torch.no_grad():  # what every prediction starts from moves into the step's embedding
        model.modality.prediction_embedding.weight.add_(shared)
        model.step_embedding.sub_(shared)
    after = builders.new_thinker(model, recipe, batch).think(1)
    torch.testing.assert_close(after.losses, before.losses)
