"""Every way of thinking, on energies whose descent is known in closed form."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.engine import Engine
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.stages import Stages
from ebt_megatron.model.layers import Rotary
from tests import builders

SIZE = 0.1  # the trained step size
STARTS = {0: 2.0, 1: -3.0, 2: 0.5}  # of positions


class Number:
    """A `State` of one number y a row, embedded as it is; the noise is 1, 2, 3 ... x its deviation."""

    def __init__(self, y):
        self.y = y

    def perturb(self, step, std):
        self.y = self.y + std * (step + 1)

    def embed(self):
        return self.y[:, None, None]

    def step(self, energy_grad, alpha):
        self.y = self.y - alpha * energy_grad[:, 0, 0]

    def distance(self, other):
        return (self.y - other.y).abs()

    def take(self, rows):
        return Number(self.y[rows])

    def where(self, keep, other):
        return Number(torch.where(keep, self.y, other.y))

    def join(self, others):
        return Number(torch.cat([self.y, *(other.y for other in others)]))

    def mixed(self, weights):
        return Number((weights * self.y.view(weights.shape)).sum(0))


class Energy(torch.nn.Module):
    """energy(y, landscape), of landscapes 0, 1, 2."""

    starts_thinking = False

    context_sees_step, step_tokens, num_landscapes = False, 0, 3

    def __init__(self, energy, start):
        super().__init__()
        sizes = {"hidden_size": 1, "num_layers": 0, "num_query_groups": 1, "kv_channels": 2}
        one = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
        self.config = SimpleNamespace(**sizes, **one, params_dtype=torch.float64)
        self.step_size = torch.nn.Parameter(torch.tensor(SIZE, dtype=torch.float64))
        self.rotary, self.energy = Rotary(2, 1e4), energy
        self.modality = SimpleNamespace(context=None, start=start)
        self.weighed = []  # rows of each pass

    def weigh(self, h, rotations, attend, step):
        self.weighed.append(len(h))
        return self.energy(h[..., 0], step)


def quadratic(y, landscape):
    return y**2 / 2  # y' = (1 - alpha) y


def wells(y, landscape):
    """Wells at -1 and 1, the latter the deeper."""
    return (y**2 - 1) ** 2 - 0.3 * y


@functools.cache
def recipe_of():
    return builders.small_recipe("thinking.langevin_noise=0")


def think(energy, starts=None, candidates=None, **options):
    """The engine's thought from given starts, one a position, and the model; `candidates`: M starts of each instead."""
    starts = list(STARTS.values()) if starts is None else starts

    def start(sample_ids, positions, thinking, seed, read):
        y = torch.tensor(starts if candidates is None else candidates, dtype=torch.float64).flatten()
        assert len(y) == len(sample_ids) == len(set(zip(sample_ids.tolist(), positions.tolist(), strict=True)))
        return Number(y)

    model = Energy(energy, start)
    recipe = recipe_of()
    engine = Engine(model, recipe, Stages(builders.state(recipe), model.config), 10, 1.0)
    rows = torch.arange(len(starts))
    how = ThinkingOptions.of({"candidates": 1 if candidates is None else len(candidates), **options})
    return engine.think(engine.context(len(starts), 4, 4), rows, torch.zeros_like(rows), how), model


def values(thought):
    return thought.state.y.tolist()


def expected(factor):
    return pytest.approx([y * factor for y in STARTS.values()])


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps(steps):
    thought, model = think(quadratic, steps=steps)
    assert values(thought) == expected((1 - SIZE) ** steps) and thought.steps.tolist() == [steps] * 3
    assert thought.energy.tolist() == pytest.approx([(y * (1 - SIZE) ** (steps - 1)) ** 2 / 2 for y in STARTS.values()])
    assert model.weighed == [3] * steps


def test_the_energy_of_what_thinking_ends_with():
    thought, model = think(quadratic, steps=2, final_energy=True)
    assert thought.energy.tolist() == pytest.approx([(y * (1 - SIZE) ** 2) ** 2 / 2 for y in STARTS.values()])
    assert len(model.weighed) == 3


def tilted(y, landscape):
    return y * [1.0, 10.0, 100.0][landscape]  # a step on a landscape is 0.1, 1 or 10


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, 11.1),
        ({"steps": 5}, 31.1),
        ({"steps": 5, "more_steps": "every"}, 0.2 + 2 + 10),
        ({"steps": 2}, 1.1),
        ({"steps": 6, "more_steps": "every"}, 22.2),
        ({"step_size": 0.2}, 22.2),
        ({"step_size": 0.2, "step_size_on": "last"}, 21.1),
        ({"step_size_scale": 3}, 33.3),
        ({"step_size": 0.2, "step_size_scale": 0.5, "step_size_on": "last"}, 11.1),
    ],
)
def test_landscapes_and_step_sizes(options, moved):
    thought, _ = think(tilted, **options)
    assert values(thought) == pytest.approx([y - moved for y in STARTS.values()])


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"langevin_noise": 0.5}, 0.5 * 6),
        ({"langevin_noise": 0.5, "langevin_first_only": True}, 0.5),
        ({"langevin_noise": 0.0}, 0),
    ],
)
def test_noise_before_steps(options, moved):
    """On a flat energy the noise of three steps is all that moves."""
    thought, _ = think(lambda y, landscape: 0 * y, **options)
    assert values(thought) == pytest.approx([y + moved for y in STARTS.values()])


def test_a_token_stops_when_its_energy_does_and_costs_nothing_any_more():
    """E_i = E_0 (1 - alpha)^2i: from a known step on it changes by less than the tolerance."""
    tolerance, shrink = 0.01, (1 - SIZE) ** 2
    thought, model = think(quadratic, steps=60, energy_tolerance=tolerance)
    want = []
    for y in STARTS.values():
        energies = [y**2 / 2 * shrink**i for i in range(61)]
        # two steps are on landscapes of their own: only from the fourth energy on are there two to compare
        want.append(next(i for i in range(3, 61) if energies[i - 1] - energies[i] <= tolerance))
    assert thought.steps.tolist() == want and len(set(want)) == 3
    assert values(thought) == pytest.approx([y * (1 - SIZE) ** n for y, n in zip(STARTS.values(), want, strict=True)])
    assert model.weighed == [sum(n >= i for n in want) for i in range(max(want) + 1)]


def test_a_token_that_stops_is_as_it_was_before_the_noise():
    """On a flat energy tokens stop at the first two steps of one landscape, the third and the fourth."""
    thought, _ = think(lambda y, landscape: 0 * y, steps=9, langevin_noise=0.5, energy_tolerance=0.0)
    assert values(thought) == pytest.approx([y + 0.5 * 6 for y in STARTS.values()])


def test_a_token_stops_when_its_prediction_does():
    thought, model = think(quadratic, steps=60, prediction_tolerance=0.045)
    # step i moves y by alpha |y| (1 - alpha)^(i - 1)
    want = [1 + max(0, math.ceil(math.log(0.045 / (SIZE * abs(y))) / math.log(1 - SIZE))) for y in STARTS.values()]
    assert thought.steps.tolist() == want and len(set(want)) == 3
    assert model.weighed == [sum(n > i for n in want) for i in range(max(want))]


def test_flops_are_counted_and_kept_to():
    """A token's step is two passes of the layers and two of the vocabulary; the one that fell most goes on longest."""
    each = think(quadratic, starts=[2.0], steps=1)[0].flops
    assert each == 2 * (0 + 1.0) + 2 * think_layers()
    thought, model = think(quadratic, steps=9, flops=each * 10.5)
    assert thought.flops == pytest.approx(each * 10) and sum(model.weighed) == 10
    assert thought.steps.tolist() == [3, 4, 3]  # of -3.0 the energy fell most
    with pytest.raises(RecipeError, match=r"flops=.* does not pay for one step of a batch of 3 tokens: give at least"):
        think(quadratic, flops=each * 2.9)


def think_layers():
    from ebt_megatron.model.flops import position_flops

    return position_flops(recipe_of(), 2)  # position 0 sees itself and its context


def test_a_step_that_does_not_lower_the_energy_is_not_taken():
    """alpha = 2.5 on a quadratic: y' = -1.5 y is refused, and y kept; then nothing is left to try."""
    thought, model = think(quadratic, steps=9, step_size=2.5, accept_only=True)
    assert values(thought) == list(STARTS.values())
    assert thought.energy.tolist() == [y**2 / 2 for y in STARTS.values()]
    # the first steps are on landscapes of their own, which might be others
    assert thought.steps.tolist() == [3] * 3 and sum(model.weighed) == 3 * 2 * 3
    thought, _ = think(quadratic, steps=9, step_size=1.5, accept_only=True)  # y' = -y / 2: taken
    assert values(thought) == expected(0.5**9 * -1)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("size", [0.02, 0.2, 0.9])
def test_accepted_steps_never_raise_an_energy(size, noise):
    starts = torch.linspace(-2, 2, 41).tolist()
    before = wells(torch.tensor(starts, dtype=torch.float64), 0)
    for steps in (1, 2, 3, 7):
        options = {"steps": steps, "step_size": size, "langevin_noise": noise}
        free, _ = think(wells, starts, final_energy=True, **options)
        kept, _ = think(wells, starts, final_energy=True, accept_only=True, **options)
        assert (kept.energy <= before).all() and (kept.energy == wells(kept.state.y, 0)).all()
        before = kept.energy
    assert (free.energy > wells(torch.tensor(starts, dtype=torch.float64), 0)).any() or (size, noise) == (0.02, 0.0)


LEFT, RIGHT = -0.9596, 1.0353  # where wells' gradient 4 y^3 - 4 y - 0.3 is zero


def test_of_two_wells_the_deeper_is_kept():
    thought, _ = think(wells, [0.0] * 2, [[-0.5, 1.2], [0.6, -1.4]], steps=300, step_size=0.05)
    assert values(thought) == pytest.approx([RIGHT, RIGHT], abs=1e-3)
    highest, _ = think(wells, [0.0] * 2, [[-0.5, 1.2], [0.6, -1.4]], steps=300, step_size=0.05, choose="max")
    assert values(highest) == pytest.approx([LEFT, LEFT], abs=1e-3)
    alone, _ = think(wells, [-0.5, 1.2], steps=300, step_size=0.05)
    assert values(alone) == pytest.approx([LEFT, RIGHT], abs=1e-3)


def test_the_largest_drop_is_kept():
    """From -3 the energy falls by more than from 0.5, though not as low."""
    thought, _ = think(wells, [0.0], [[-3.0], [0.5]], steps=300, step_size=0.01, choose="drop")
    assert values(thought) == pytest.approx([LEFT], abs=1e-3)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_a_mixture_is_weighted_by_energies(tau):
    thought, _ = think(wells, [0.0], [[-0.5], [0.5]], steps=300, step_size=0.05, choose="mixture", tau=tau)
    low, high = (math.exp(-wells(y, 0) / tau) for y in (LEFT, RIGHT))
    assert values(thought) == pytest.approx([(low * LEFT + high * RIGHT) / (low + high)], abs=1e-3)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"steps": -1}, "steps=-1: must be at least 0"),
        ({"candidates": 0}, "candidates=0: must be at least 1"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number"),
        ({"choose": "best"}, "choose=best: choose one of energy"),
        ({"flops": 0}, "flops=0.0: must be greater than 0, and at most"),
        ({"stpes": 3}, "stpes=3: no such option"),
        ({"langevin_noise": -1}, "langevin_noise=-1.0: must be from 0 to"),
        ({"tau": float("nan")}, "tau=nan: must be greater than 0"),
        ({"accept_only": 3}, "accept_only=3: must be"),
    ],
)
def test_options_that_do_not_do(given, line):
    with pytest.raises(RecipeError, match=line):
        ThinkingOptions.of(given)
