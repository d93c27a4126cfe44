"""The engine thinks what training's evaluation thinks, from a context read in any pieces."""

from types import SimpleNamespace

import pytest
import torch

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import predictor_of
from ebt_megatron.inference.reader import chunks
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


CONTEXT = ("thinking.initial=context", "thinking.step_rule=mirror_descent")


@pytest.mark.parametrize("logits", ["float32", "bfloat16"])
def test_thinking_from_the_context_s_prediction_is_that_of_training(logits):
    recipe = builders.small_recipe(*CONTEXT, f"thinking.logits_dtype={logits}")
    run, sample = run_of(recipe), builders.sample(recipe)
    trained = run.objective.evaluate(sample, 2)
    rows, positions, targets = everywhere(sample.targets)
    for steps, expected in enumerate([trained.initial, *trained.losses]):
        predict = predictor_of(run, ThinkingOptions(steps=steps))
        context = predict.context(2, 10, 10)
        every = torch.ones_like(rows, dtype=torch.bool)
        forecast = predict(context, rows, positions, sample.observed.flatten(), every, sample.sample_ids)
        loss = -forecast.log_p.gather(1, targets[:, None])[:, 0].view(2, 10).T
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        assert forecast.steps.tolist() == [steps] * 20
        assert forecast.energy.isnan().all() == (steps == 0)


def test_a_token_stops_before_the_first_step_where_the_context_is_confident():
    recipe = builders.small_recipe(*CONTEXT)
    run, sample = run_of(recipe), builders.sample(recipe)
    rows, positions, _ = everywhere(sample.targets)

    def forecast(**options):
        predict = predictor_of(run, ThinkingOptions(**options))
        every = torch.ones_like(rows, dtype=torch.bool)
        return predict(predict.context(2, 10, 10), rows, positions, sample.observed.flatten(), every, sample.sample_ids)

    start, end = forecast(steps=0), forecast(steps=1)
    sure = start.log_p.amax(1).exp()
    some = forecast(steps=1, confidence=sure.median().item())
    stopped = sure >= sure.median()
    assert torch.equal(some.steps, (~stopped).long()) and 0 < stopped.sum() < 20
    torch.testing.assert_close(some.log_p, torch.where(stopped[:, None], start.log_p, end.log_p))
    assert start.flops < some.flops < end.flops
    free = forecast(steps=1, flops=1.0)  # a budget that pays for no step leaves the context's answers
    assert free.steps.sum() == 0 and torch.equal(free.log_p, start.log_p)


@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
@pytest.mark.parametrize("chunk", [1, 7, 10])
def test_logits_are_those_of_the_whole_text_at_once(architecture, chunk):
    """Texts of uneven lengths, read in chunks in one batch, against each alone and uncached; fp32."""
    recipe = builders.small_recipe(f"model.architecture={architecture}", "model.kernels=torch")
    run, sample = run_of(recipe, torch.float32), builders.sample(recipe)
    lengths = torch.tensor([10, 4])
    whole = whole_logits(run, sample)
    predict = predictor_of(run, ThinkingOptions())
    context, seen = predict.context(2, 10, chunk), 0
    texts = [row[:n].tolist() for row, n in zip(sample.observed, lengths, strict=True)]
    for rows, positions, tokens in chunks(texts, chunk, torch.device("cpu")):
        every = torch.ones_like(rows, dtype=torch.bool)
        log_p = predict(context, rows, positions, tokens, every, sample.sample_ids).log_p
        torch.testing.assert_close(log_p, whole[positions, rows], rtol=0, atol=1e-5)
        seen += len(rows)
    assert seen == 14


def whole_logits(run, sample):
    """Log-probabilities [S, B, V], by what trains."""
    if run.recipe.model.architecture == "ebt":
        seen = []
        run.objective.evaluate(sample, 3, lambda prediction: seen.append(prediction.logits))
        return seen[-1][..., : builders.VOCAB].log_softmax(-1)
    h = run.model.hidden(run.model.embedding(sample.observed), 10, None)
    return run.model.output.logits(h)[..., : builders.VOCAB].log_softmax(-1).detach()


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("conditioning", ["none", "time_embed_sequence"])
def test_beyond_the_trained_length_the_last_positions_are_seen(conditioning, chunk):
    """A window of 10 over 25 positions, written over in place, against one cache that holds all and hides the rest."""
    recipe = builders.small_recipe(f"model.conditioning={conditioning}")
    run, tokens = run_of(recipe), torch.randint(builders.VOCAB, (1, 25), generator=torch.Generator().manual_seed(1))
    engine, rows, positions = engine_of(run), torch.zeros(1, dtype=torch.int64), torch.tensor([24])
    found = []
    for room in (chunk, 25):
        context = engine.context(1, 25, room)
        read(engine, context, tokens, chunk)
        found.append(engine.think(context, rows, positions, ThinkingOptions()).state.log_probabilities())
        assert context.caches[0].positions.shape[1] == min(25, 9 + room) + engine.sinks
    torch.testing.assert_close(*found)
    engine.window = 25
    context = engine.context(1, 25, 25)
    read(engine, context, tokens, 25)
    all_of_it = engine.think(context, rows, positions, ThinkingOptions()).state.log_probabilities()
    assert (all_of_it - found[0]).abs().max() > 1e-3


def test_candidates_are_independent_starts_over_one_context():
    """The first is what thinking alone gives; the best is the lowest of all; a mixture is a distribution."""
    recipe = builders.small_recipe(*S2)
    run, sample = run_of(recipe), builders.sample(recipe)
    engine = engine_of(run)
    context = engine.context(2, 10, 10)
    read(engine, context, sample.observed, 10)
    rows, positions, _ = everywhere(sample.observed)

    def think(**options):
        how = ThinkingOptions.of({"final_energy": True, **options})
        return engine.think(context, rows, positions, how, sample.sample_ids[rows])

    energies = torch.stack([think(candidates=m).energy for m in (1, 2, 3, 8)])
    assert (energies[1:] <= energies[:-1]).all() and (energies[1:] < energies[:-1]).any(1).all()
    mixture = think(candidates=8, choose="mixture", tau=0.1).state.log_probabilities().exp().sum(1)
    torch.testing.assert_close(mixture, torch.ones_like(mixture))
    cold = think(candidates=8, choose="mixture", tau=1e-6).state.log_probabilities()
    torch.testing.assert_close(cold, think(candidates=8).state.log_probabilities(), rtol=1e-6, atol=1e-6)


def test_a_device_without_memory_for_the_cache(monkeypatch):
    engine = engine_of(run_of(builders.small_recipe()))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(RecipeError, match=r"3 contexts of 10 positions takes 1.54e-05 GB, cpu has 1e-05 left"):
        engine.context(3, 10, 10)
