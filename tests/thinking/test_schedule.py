"""The pipeline schedule: complete, causal, no worse than 1F1B, and what the stages really do."""

import itertools

import pytest

from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.schedule import FORWARD, StagePass, feed_forward_sweeps, gpt_bubble, simulate

PLANS = {
    "S1": Plan((0.5, 0.5), "detached"),
    "last": Plan((0.0, 0.0, 1.0), "detached"),
    "full": Plan((0.0, 1.0), "full"),
    "truncated": Plan((0.0, 0.0, 1.0), "truncated"),
}


@pytest.mark.parametrize(
    ("plan", "stages", "micro_batches", "in_flight", "sees"),
    itertools.product(PLANS, (1, 2, 4), (1, 3, 8), (None, 3), (False, True)),
)
def test_every_task_runs_once_after_what_it_needs(plan, stages, micro_batches, in_flight, sees):
    sweeps = PLANS[plan].sweeps(sees)
    schedule = simulate(stages, micro_batches, sweeps, in_flight=in_flight)
    tasks = [t for order in schedule.order for t in order]
    assert len(tasks) == len(set(tasks)) == stages * micro_batches * len(sweeps)
    for m in range(micro_batches):
        expected = []
        for index, (kind, step) in enumerate(sweeps):
            order = range(stages) if kind in FORWARD else reversed(range(stages))
            expected += [StagePass(m, index, kind, step, stage) for stage in order]
        for before, after in itertools.pairwise(expected):
            assert schedule.end[before] <= schedule.start[after]
    for order in schedule.order:
        for before, after in itertools.pairwise(order):
            assert schedule.end[before] <= schedule.start[after]
    assert max(schedule.live) <= (in_flight or 5 * stages)


@pytest.mark.parametrize(("stages", "micro_batches"), itertools.product((2, 4, 8), (1, 2, 4, 8, 16, 32)))
def test_the_bubble_is_at_most_that_of_one_forward_one_backward(stages, micro_batches):
    bubble = simulate(stages, micro_batches, PLANS["S1"].sweeps(False)).bubble
    assert bubble <= gpt_bubble(stages, micro_batches) + 1e-9


@pytest.mark.parametrize(("stages", "micro_batches"), itertools.product((2, 4, 8), (32, 128)))
def test_five_in_flight_for_each_stage_cost_less_than_a_point(stages, micro_batches):
    sweeps = PLANS["S1"].sweeps(False)
    default = simulate(stages, micro_batches, sweeps)
    all_at_once = simulate(stages, micro_batches, sweeps, in_flight=micro_batches)
    assert max(default.live) <= 5 * stages
    assert default.bubble < all_at_once.bubble + 0.01


def test_a_feed_forward_model_without_limit_reaches_the_known_bubble():
    schedule = simulate(4, 4, feed_forward_sweeps(), {"context_forward": 1.0, "context_backward": 2.0})
    assert schedule.bubble == pytest.approx(gpt_bubble(4, 4))


def test_a_sweep_goes_back_through_the_context_only_if_something_is_learned():
    assert Plan.thinking(2).sweeps(False)[-1] == ("propose_backward", 1)
    assert PLANS["S1"].sweeps(False)[-1] == ("context_backward", 0)
