"""Fits of scaling laws find what was planted, with intervals that hold it as often as they say."""

import numpy as np
import pytest

from benchmarks.fits import Law, Runs, detectable, fit, ratio

X = np.geomspace(1, 64, 7).repeat(3)  # seven budgets, three seeds each
FIRST, FASTER = Law(2.0, (1.7,), (0.35,)), Law(2.0, (1.8,), (0.35 * 1.3,))
NOISE = 0.006  # of log L between seeds: what the seeds of S1 and Transformer++ differ by, or more


def drawn(law, noise, seed, x=X):
    return Runs(x, law(x) * np.exp(np.random.default_rng(seed).normal(0, noise, len(x))))


def test_without_noise_a_law_is_found_exactly():
    (found,) = fit([Runs(X, FIRST(X))])
    assert (found.floor, *found.scales, *found.exponents) == pytest.approx((2.0, 1.7, 0.35), rel=1e-4)
    both = fit([Runs(X, FIRST(X)), Runs(X, FASTER(X))], shared_floor=True)
    assert [law.exponents[0] for law in both] == pytest.approx([0.35, 0.455], rel=1e-4)


def test_two_axes_are_found_together():
    law = Law(1.5, (2.0, 1.2), (0.3, 0.45))
    x = np.stack([a.ravel() for a in np.meshgrid(np.geomspace(1, 64, 5), np.geomspace(1, 64, 5))], 1)
    (found,) = fit([Runs(x, law(x))])
    assert (found.floor, *found.exponents) == pytest.approx((1.5, 0.3, 0.45), rel=1e-3)


def test_one_run_that_went_wrong_moves_little():
    runs = drawn(FIRST, 0.001, 0)
    runs.loss[4] *= 1.3
    assert fit([runs])[0].exponents[0] == pytest.approx(0.35, rel=0.1)


def test_the_slope_is_that_of_the_logarithms():
    x = np.array([3.0, 30.0])
    by_hand = -(np.log(FIRST(x * 1.001)) - np.log(FIRST(x / 1.001))) / (2 * np.log(1.001))
    assert FIRST.slope(x) == pytest.approx(by_hand, rel=1e-4)


def held(studies, second, shared, draws):
    """In how many studies of this seed noise the interval holds the planted ratio."""
    truth = second.exponents[0] / FIRST.exponents[0]
    pairs = ((drawn(FIRST, NOISE, 2 * s), drawn(second, NOISE, 2 * s + 1)) for s in range(studies))
    return sum(ratio(*pair, shared, draws).holds(truth) for pair in pairs)


def test_intervals_hold_the_planted_ratio():
    assert held(6, FASTER, True, 50) >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("second", [FASTER, FIRST], ids=["faster", "no difference"])
def test_intervals_hold_the_planted_ratio_as_often_as_they_say(second, shared):
    assert 90 <= held(100, second, shared, 100) <= 99


def parabola_ratio(law, budgets):
    """Approach 2: the exponent of the best number of parameters in the budget, by parabolas over log N."""
    best = []
    for c in budgets:
        n = np.geomspace(c**0.2, c**0.9, 9)
        a, b, _ = np.polyfit(np.log(n), law(np.stack([n, c / n], 1)), 2)
        best.append(-b / (2 * a))
    return np.polyfit(np.log(budgets), best, 1)[0]


def test_parabolas_miss_what_the_law_of_two_axes_finds():
    law = Law(1.5, (2.0, 1.2), (0.3, 0.6))  # alpha and beta: the best N grows as C^(beta / (alpha + beta))
    budgets, truth = np.geomspace(1e2, 1e4, 5), 0.6 / 0.9
    n = np.concatenate([np.geomspace(c**0.2, c**0.9, 9) for c in budgets])
    x = np.stack([n, budgets.repeat(9) / n], 1)
    (found,) = fit([Runs(x, law(x))])
    assert found.exponents[1] / sum(found.exponents) == pytest.approx(truth, rel=1e-3)
    assert abs(parabola_ratio(law, budgets) / truth - 1) > 0.03


def test_power_is_what_studies_show():
    least = detectable(FIRST, FIRST, X, (NOISE, NOISE), True)
    second = Law(2.0, (1.7,), (0.35 * least,))
    found = [fit([drawn(FIRST, NOISE, 2 * s), drawn(second, NOISE, 2 * s + 1)], True) for s in range(40)]
    spread = np.std([np.log(b.exponents[0] / a.exponents[0]) for a, b in found])
    assert np.log(least) == pytest.approx(2.8 * spread, rel=0.35)
    assert (
        detectable(FIRST, FIRST, X, (3 * NOISE, 3 * NOISE), True)
        > least
        < detectable(FIRST, FIRST, X, (NOISE,) * 2, False)
    )
