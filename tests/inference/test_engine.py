"""The engine thinks what training's evaluation thinks, from a context read in any pieces."""

import pytest
import torch

from ebt_megatron.inference.options import ThinkingOptions
from tests import builders
from tests.inference.models import engine_of, everywhere, run_of

CONDITIONING = ["none", "time_embed", "time_embed_sequence", "adaln", "adaln_zero", "adaln_sequence"]
S2 = ("thinking.loss=last", "thinking.langevin_noise=0.5", "thinking.learn_step_size=false")


def read(engine, context, tokens, chunk):
    """All of tokens [B, S], so many positions at a time."""
    for begin in range(0, tokens.shape[1], chunk):
        rows, positions, values = everywhere(tokens[:, begin : begin + chunk])
        engine.read(context, rows, positions + begin, values)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("rule", ["probability_descent", "logit_descent", "mirror_descent"])
def test_thinking_is_that_of_training(conditioning, rule):
    """Losses after every step, of every position, and energies before it; the same noise; five steps of three."""
    recipe = builders.small_recipe(f"model.conditioning={conditioning}", f"thinking.step_rule={rule}", *S2)
    run, sample = run_of(recipe), builders.sample(recipe)
    trained = run.objective.evaluate(sample, 5)
    engine = engine_of(run)
    context = engine.context(2, 10, 7)
    read(engine, context, sample.observed, 7)
    rows, positions, targets = everywhere(sample.targets)
    for steps in (1, 3, 5):
        thought = engine.think(context, rows, positions, ThinkingOptions(steps=steps), sample.sample_ids[rows])
        loss = -thought.state.log_probabilities().gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(loss.view(2, 10).T, trained.losses[steps - 1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(thought.energy.view(2, 10).T, trained.energies[steps - 1], rtol=1e-9, atol=1e-9)
        assert thought.steps.tolist() == [steps] * 20
