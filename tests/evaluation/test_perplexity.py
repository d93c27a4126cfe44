"""Validation means are over tokens, and perplexity is the exponential of the mean."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ebt_megatron.config import ParallelConfig
from ebt_megatron.evaluation.perplexity import Validation, perplexity, validate
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.thinking.dual_stream import Thought


def objective_giving(*losses):
    """An objective whose evaluations have these per-position losses, one step each."""
    thoughts = iter([Thought(torch.tensor(loss)[None], torch.zeros(0, *torch.tensor(loss).shape)) for loss in losses])
    return SimpleNamespace(
        state=SimpleNamespace(device=torch.device("cpu")), evaluate=lambda batch, steps: next(thoughts)
    )


def batches(*targets):
    return [SimpleNamespace(tokens=torch.tensor([[0, *t]]), counts=None) for t in targets]


def test_a_longer_micro_batch_counts_for_more():
    state = initialize(ParallelConfig(), 0)
    objective = objective_giving([[1.0]], [[4.0, 4.0, 4.0]])
    result = validate(objective, batches([1], [1, 2, 3]), 1, 5, state.data_group, state.pipeline_group)
    assert result.losses.item() == pytest.approx(13 / 4)
    assert result.positions == 4
    assert result.counts.tolist() == [0, 2, 1, 1, 0]
    assert dist.get_world_size() == 1


def test_unigram_entropy_is_that_of_the_targets():
    counts = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert Validation(torch.zeros(1), torch.zeros(0), 4, counts).unigram_entropy() == pytest.approx(1.5 * math.log(2))


def test_perplexity_is_finite_for_any_loss():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9))


def test_samples_that_fill_a_micro_batch_do_not_count():
    state = initialize(ParallelConfig(), 0)
    objective = objective_giving([[1.0, math.nan], [2.0, 9.0]])  # two positions of two samples
    batch = SimpleNamespace(tokens=torch.tensor([[0, 1, 2], [0, 3, 3]]), counts=torch.tensor([True, False]))
    result = validate(objective, [batch], 1, 5, state.data_group, state.pipeline_group)
    assert (result.losses.item(), result.positions, result.counts.tolist()) == (1.5, 2, [0, 1, 1, 0, 0])
