"""The control of thinking from the context: a first prediction as Transformer++ makes it, and a learned second."""

import pytest
import torch

from benchmarks.refinement import Refinement
from tests import builders


def test_the_second_prediction_is_a_change_of_the_first_and_the_loss_is_of_both():
    recipe = builders.small_recipe("model.architecture=baseline")
    model = builders.build(recipe, torch.float64, Refinement(recipe, builders.VOCAB))
    batch = builders.text_batch()
    first, second = model.predictions(batch.observed)
    plain = model.output.logits(model.hidden(model.embedding(batch.observed), batch.observed.shape[1], None))
    assert torch.allclose(first, plain) and not torch.allclose(first, second, rtol=1e-2)
    targets = batch.targets.t().flatten()
    losses = [torch.nn.functional.cross_entropy(z.flatten(0, 1)[:, : builders.VOCAB], targets) for z in (first, second)]
    both = model(batch.observed, batch.targets).mean()
    assert both.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    with torch.no_grad():
        assert model(batch.observed, batch.targets).mean().item() == pytest.approx(losses[1].item(), rel=1e-6)
    both.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
