"""Validation means are over positions that count, and text's measures are of them, too."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives.validation import validate
from ebt_megatron.prediction.logits import most_likely
from ebt_megatron.tasks.text import Text
from ebt_megatron.thinking.dual_stream import ThinkingOutput
from tests import builders


def objective_giving(*thoughts, answers=()):
    """An objective whose evaluations think these thoughts, after which the most likely tokens are `answers`."""
    recipe, left = builders.small_recipe(), iter(thoughts)

    def evaluate(sample, steps, observe):
        for answer in answers:
            observe(torch.tensor(answer))
        return next(left)

    return SimpleNamespace(
        state=builders.state(recipe),
        task=Text(recipe, 5),
        evaluate=evaluate,
        thinks=bool(answers),
        starts_at_context=False,
    )


def one_step(losses):
    losses = torch.tensor(losses)
    return ThinkingOutput(losses[None], torch.zeros(0, *losses.shape))


def batch(*targets, counts=None):
    tokens = torch.tensor([[0, *t] for t in targets])
    return MicroBatch(torch.arange(len(targets)), tokens, counts=None if counts is None else torch.tensor(counts))


def test_a_longer_micro_batch_counts_for_more():
    objective = objective_giving(one_step([[1.0]]), one_step([[4.0], [4.0], [4.0]]))
    result = validate(objective, [batch([1]), batch([1, 2, 3])], 1)
    assert result.losses.item() == pytest.approx(13 / 4)
    assert result.positions == 4
    assert dist.get_world_size() == 1


def test_unigram_entropy_is_that_of_the_targets():
    objective = objective_giving(one_step([[1.0], [1.0], [1.0], [1.0]]))
    measures = validate(objective, [batch([0, 0, 1, 2])], 1).measures
    assert measures == {"unigram_entropy": pytest.approx(1.5 * math.log(2))}


def test_perplexity_is_the_exponential_of_the_mean_and_finite_for_any_loss():
    describe = Text(builders.small_recipe(), 5).describe
    assert describe(math.log(7)) == {"perplexity": pytest.approx(7)}
    assert math.isfinite(describe(1e9)["perplexity"])


def test_samples_that_fill_a_micro_batch_do_not_count():
    objective = objective_giving(one_step([[1.0, math.nan], [2.0, 9.0]]))  # two positions of two samples
    result = validate(objective, [batch([1, 2], [3, 3], counts=[True, False])], 1)
    assert (result.losses.item(), result.positions) == (1.5, 2)
    assert result.measures["unigram_entropy"] == pytest.approx(math.log(2))


def test_right_and_changed_answers_are_counted_after_every_step(monkeypatch):
    monkeypatch.setattr("ebt_megatron.tasks.text.most_likely", lambda answer: answer)
    answers = [[[9, 9], [2, 9]], [[1, 3], [2, 9]], [[1, 3], [4, 3]]]  # [step][position][sample]
    objective = objective_giving(ThinkingOutput(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)), answers=answers)
    measures = validate(objective, [batch([1, 2], [3, 3], counts=[True, False])], 3).measures
    assert measures["accuracy"] == [0.5, 1, 0.5]
    assert math.isnan(measures["changed"][0]) and measures["changed"][1:] == [0.5, 0.5]


@pytest.mark.parametrize("options", [(), ("thinking.regenerate=3",), ("thinking.logits_dtype=bfloat16",)])
def test_the_most_likely_token_is_that_of_the_logits(options):
    recipe = builders.small_recipe(*options)
    thinker = builders.new_thinker(builders.build(recipe), recipe, builders.text_batch())
    seen = []
    thinker.descent.observe = lambda p: seen.append((most_likely(p), p.logits[..., : builders.VOCAB].argmax(-1)))
    thinker.think(3)
    assert len(seen) == 3 and all(torch.equal(ours, plain) for ours, plain in seen)
