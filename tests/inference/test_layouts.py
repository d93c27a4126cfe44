"""Thinking at inference gives the same on every layout."""

import numpy as np

from ebt_megatron.parallel import setup
from tests import builders
from tests.distributed_utils import run_ranks
from tests.inference.models import everywhere, predictor, run_on_layout

SEQUENCE = ("model.conditioning=time_embed_sequence", "thinking.langevin_noise=0.5")
CASES = [  # overrides, and how to think
    ((), {}),
    (SEQUENCE, {"steps": 6, "candidates": 3, "accept_only": True, "energy_tolerance": 1e-3}),
    (
        ("thinking.initial_std=1",),
        {"steps": 6, "prediction_tolerance": 0.1, "flops": 4e7, "candidates": 2, "choose": "mixture"},
    ),
    (("model.architecture=baseline",), {}),
]


def _forecasts(layout):
    """Of the newest positions and of earlier ones, read three positions at a time."""
    setup.shutdown()
    found = []
    for overrides, options in CASES:
        recipe = builders.small_recipe("model.kernels=torch", *layout, *overrides)
        run, sample = run_on_layout(recipe), builders.sample(recipe)
        predict = predictor(run, **options)
        context = predict.context(2, 10, 3)
        for begin in (0, 3, 6, 9):
            rows, positions, tokens = everywhere(sample.observed[:, begin : begin + 3])
            wanted = (positions + begin) % 4 != 2
            forecast = predict(context, rows, positions + begin, tokens, wanted, sample.sample_ids)
            values = forecast.log_p, forecast.energy, forecast.steps
            found.append((*(v.double().numpy() for v in values), forecast.flops))
    return found


def _on(layouts):
    return [_forecasts(layout) for layout in layouts]


def test_tensor_and_pipeline_parallel():
    (alone,) = _on([()])
    assert len({tuple(steps) for _, _, steps, _ in alone}) > 3
    tensor = "parallel.tensor=2", "parallel.sequence_parallel=false"
    for rank in run_ranks(_on, 2, [tensor, ("parallel.pipeline=2",)]):
        for layout in rank:
            for ours, theirs in zip(layout, alone, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
