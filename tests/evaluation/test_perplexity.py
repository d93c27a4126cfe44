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
from tests import builders


def objective_giving(*losses):
    """An objective whose evaluations have these per-position losses, one step each."""
    thoughts = iter([Thought(torch.tensor(loss)[None], torch.zeros(0, *torch.tensor(loss).shape)) for loss in losses])
    return SimpleNamespace(
        state=SimpleNamespace(device=torch.device("cpu")), evaluate=lambda batch, steps, observe: next(thoughts)
    )


def batches(*targets):
    return [SimpleNamespace(tokens=torch.tensor([[0, *t]]), counts=None, sample_ids=[0]) for t in targets]


def test_a_longer_micro_batch_counts_for_more():
    state = initialize(ParallelConfig(), 0)
    objective = objective_giving([[1.0]], [[4.0], [4.0], [4.0]])
    result = validate(objective, batches([1], [1, 2, 3]), 1, 5, state.data_group, state.pipeline_group)
    assert result.losses.item() == pytest.approx(13 / 4)
    assert result.positions == 4
    assert result.counts.tolist() == [0, 2, 1, 1, 0]
    assert dist.get_world_size() == 1


def test_unigram_entropy_is_that_of_the_targets():
    counts = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert Validation(
        torch.zeros(1), torch.zeros(0), 4, counts, torch.zeros(1), torch.zeros(1)
    ).unigram_entropy() == pytest.approx(1.5 * math.log(2))


def test_perplexity_is_finite_for_any_loss():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9))


def test_samples_that_fill_a_micro_batch_do_not_count():
    state = initialize(ParallelConfig(), 0)
    objective = objective_giving([[1.0, math.nan], [2.0, 9.0]])  # two positions of two samples
    batch = SimpleNamespace(
        tokens=torch.tensor([[0, 1, 2], [0, 3, 3]]), counts=torch.tensor([True, False]), sample_ids=[0, 1]
    )
    result = validate(objective, [batch], 1, 5, state.data_group, state.pipeline_group)
    assert (result.losses.item(), result.positions, result.counts.tolist()) == (1.5, 2, [0, 1, 1, 0, 0])


def test_right_and_changed_answers_are_counted_after_every_step():
    state = initialize(ParallelConfig(), 0)
    tokens, counts = torch.tensor([[0, 1, 2], [0, 3, 3]]), torch.tensor([True, False])
    answers = [[[9, 9], [2, 9]], [[1, 3], [2, 9]], [[1, 3], [4, 3]]]  # [step][position][sample]

    def evaluate(batch, steps, observe):
        for answer in answers:
            observe(SimpleNamespace(most_likely=lambda answer=answer: torch.tensor(answer)))
        return Thought(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2))

    objective = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu")), evaluate=evaluate)
    batch = SimpleNamespace(tokens=tokens, counts=counts, sample_ids=[0, 1])
    result = validate(objective, [batch], 3, 5, state.data_group, state.pipeline_group)
    assert result.right.tolist() == [0.5, 1, 0.5]
    assert result.changed[1:].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("options", [(), ("thinking.regenerate=3",), ("thinking.logits_dtype=bfloat16",)])
def test_the_most_likely_token_is_that_of_the_logits(options):
    recipe = builders.small_recipe(*options)
    thinker = builders.new_thinker(builders.build(recipe), recipe, builders.text_batch())
    seen = []
    thinker.descent.observe = lambda p: seen.append((p.most_likely(), p.logits[..., : builders.VOCAB].argmax(-1)))
    thinker.think(3)
    assert len(seen) == 3 and all(torch.equal(ours, plain) for ours, plain in seen)
