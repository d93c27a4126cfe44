"""What a step does to its energy: beside an energy that is known, and beside energies of the model itself."""

import pytest
import torch

from ebt_megatron.evaluation.descent import descent
from ebt_megatron.evaluation.lines import warnings_of
from tests import builders


@pytest.mark.parametrize(
    "more", [[], ["model.conditioning=none", "thinking.initial=context", "thinking.step_rule=mirror_descent"]]
)
def test_a_small_step_lowers_the_energy_by_what_the_model_says(more):
    recipe = builders.small_recipe("thinking.step_rule=mirror_descent", "thinking.step_size=1e-3", *more)
    objective = builders.objective(builders.build(recipe), recipe)
    sample = builders.sample(recipe)
    rows = descent(objective, sample, 2)
    assert len(rows) == 2 and all(row["raised"] < 0.05 and row["energy_drop"] > 0 for row in rows)
    assert all(abs(row["curvature"]) < 0.05 for row in rows), "a small step is straight"
    if "model.conditioning=none" in more:  # one landscape: the next step's energy is this one's end
        energies = objective.evaluate(sample, 3).energies.double().mean((1, 2))
        drops = (energies[:-1] - energies[1:]).tolist()
        assert [row["energy_drop"] for row in rows] == pytest.approx(drops, rel=1e-3)


@pytest.mark.parametrize(("alpha", "raised"), [(0.5, 0), (1.0, 0), (3.0, 1)])
def test_of_a_parabola_the_curvature_is_the_step_sizes_share_of_it(alpha, raised, monkeypatch):
    recipe = builders.small_recipe()
    objective = builders.objective(builders.build(recipe), recipe)

    class Parabola:
        """E = |x|^2 / 2 at each position, whose Hessian is 1, and gradient descent on it."""

        def __init__(self):
            self.x = torch.arange(1.0, 13).double().view(2, 2, 3)
            self.descent = self.prediction = self
            self.model = type("M", (), {"separable": True, "starts_thinking": False, "context_sees_step": False})

        def context_forward(self, step):
            pass

        def propose_input(self, step):
            return self.x

        def propose_forward(self, step, x):
            return (x**2).sum(-1) / 2

        def propose_backward(self, step):
            self.x = self.x - alpha * self.x

        def embed(self):
            return self.x

    monkeypatch.setattr(objective, "thinker", lambda sample: Parabola())
    (row,) = descent(objective, builders.sample(recipe), 1)
    assert row["curvature"] == pytest.approx(alpha) and row["raised"] == raised


@pytest.mark.parametrize(
    ("changed", "raised", "said"),
    [(0.2, 0.1, []), (0.001, 0.1, ["does nothing"]), (0.2, 0.6, ["too large"]), (None, None, [])],
)
def test_a_trained_step_that_does_nothing_or_climbs_is_named(changed, raised, said):
    rows = [{"steps": 1, "changed": None}, {"steps": 2, "changed": changed, "raised": raised}]
    lines = list(warnings_of({"trained_steps": 2, "thinking": rows}))
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))
