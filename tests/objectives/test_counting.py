"""Positions that do not count are neither learned from nor in any mean."""

import pytest
import torch

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.objectives.validation import validate
from ebt_megatron.tasks.text import Text
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.tasks import latents

END = 7


def batch_of():
    """Two samples with ends of text in them, and marked answers."""
    batch = builders.micro_batch()
    batch.samples[0, 3] = batch.samples[1, 1] = batch.samples[1, 10] = END
    batch.beside["answers"] = (batch.samples % 3 == 0).long()
    return batch


def which(batch, option):
    """What counts, [S, B]."""
    tokens = batch.samples[:, 1:].t()
    return {"all": tokens >= 0, "text": tokens != END, "answers": tokens % 3 == 0}[option]


def made(*overrides):
    recipe = builders.small_recipe("thinking.max_steps=2", *overrides)
    task = Text(recipe, builders.VOCAB, end_of_text=END)
    model = builders.build(recipe, task=task)
    return recipe, task, model, builders.objective(model, recipe, task)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("option", ["text", "answers"])
@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_the_others_are_not_learned_from(architecture, option):
    recipe, task, model, objective = made(f"model.architecture={architecture}", f"data.learn_from={option}")
    batch = batch_of()
    counted, sample = which(batch, option), task.sample(batch, torch.device("cpu"))
    metrics = objective.train_batch([batch.part(0, 1), batch.part(1, 2)], 0)
    found, weight = gradients(model), counted.double() / counted.sum()
    if architecture == "ebt":
        plan = Plan.draw(recipe.thinking, recipe.training.seed, 0)
        thinker = builders.new_thinker(model, recipe, sample, plan)
        thinker.descent.weight = weight
        losses = thinker.train().losses
    else:
        losses = model(sample.observed, sample.targets)[None]
        (losses[0] * weight).sum().backward()
    torch.testing.assert_close(metrics.losses, (losses.double() * weight).sum((1, 2)).detach(), rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        assert builders.relative_error(found[name], gradient) < 1e-6, name


@pytest.mark.parametrize("option", ["all", "text", "answers"])
def test_validation_is_the_mean_over_those_that_count(option):
    _, task, _, objective = made(f"data.learn_from={option}")
    batch = batch_of()
    batch.counts = torch.tensor([True, False])
    counted = which(batch, option) & batch.counts
    thought = objective.evaluate(task.sample(batch, torch.device("cpu")), 2)
    result = validate(objective, [batch], 2)
    assert result.positions == counted.sum()
    torch.testing.assert_close(result.losses, thought.losses.double()[:, counted].mean(1), rtol=1e-6, atol=0)
    seen = torch.bincount(batch.samples[:, 1:].t()[counted]).double() / counted.sum()
    assert result.measures["unigram_entropy"] == pytest.approx(torch.special.entr(seen).sum().item())


def test_what_data_cannot_say_is_one_line():
    _, task, _, _ = made("data.learn_from=answers")
    with pytest.raises(DataError, match="the shards mark no answers"):
        task.sample(builders.micro_batch(), torch.device("cpu"))
    with pytest.raises(RecipeError, match="does not say what ends a text"):
        Text(builders.small_recipe("data.learn_from=text"), builders.VOCAB)
    with pytest.raises(RecipeError, match=r"data.learn_from=text is about text"):
        latents.task(latents.recipe("data.learn_from=text"))
