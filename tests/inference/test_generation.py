"""Texts are continued as if each were alone, and end where they should."""

import math
from types import SimpleNamespace

import pytest
import torch

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.generation import GenerationOptions, generate
from ebt_megatron.inference.predictor import Forecast
from ebt_megatron.inference.sampling import Sampling
from tests import builders
from tests.inference.models import END, predictor, run_of, texts_of

PROMPTS = ["hello", "a", "What is the answer? It is"]  # the last is longer than the trained ten positions
SHORT = builders.small_recipe("thinking.langevin_noise=0.5", "model.kernels=torch")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return texts_of(run_of(SHORT), tmp_path_factory.mktemp("tokenizer"))


def continuations(predict, letters, prompts=PROMPTS, watch=None, **options):
    sampling = Sampling(
        **{name: options.pop(name) for name in ("temperature", "top_k", "top_p", "seed") if name in options}
    )
    how = GenerationOptions(sampling=sampling, **{"max_tokens": 6, **options})
    how.check()
    return list(generate(predict, letters, [letters.prompt(p, 1) for p in prompts], how, watch))


@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_a_batch_of_uneven_prompts_is_each_alone(architecture, letters):
    recipe = builders.small_recipe(f"model.architecture={architecture}", "thinking.langevin_noise=0.5")
    run = run_of(recipe)
    predict = predictor(run, **({"energy_tolerance": 0.05, "steps": 5} if architecture == "ebt" else {}))
    together = continuations(predict, letters, chunk=3)
    alone = continuations(predict, letters, batch=1)
    assert [c.prompt for c in together] == [0, 1, 2] and sum(len(c.tokens) for c in together) > 12
    for one, other in zip(alone, together, strict=True):
        assert (one.tokens, one.text, one.steps, one.finish) == (other.tokens, other.text, other.steps, other.finish)
        assert one.log_p == pytest.approx(other.log_p)
        assert one.energies == pytest.approx(other.energies, nan_ok=True)


def test_the_same_seed_draws_the_same_text_and_another_another(letters):
    predict = predictor(run_of(SHORT))
    texts = [[c.text for c in continuations(predict, letters, seed=seed)] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


class Scripted:
    """A predictor that is certain of a text, whatever was read: of the next letter of `says`, by position."""

    thinks, window, vocab_size, device = True, 100, builders.VOCAB, torch.device("cpu")

    def __init__(self, letters, says, energies=None):
        self.says, self.energies = [*letters.encode(says), END], energies

    def check_batch(self, rows, length, chunk):
        return length

    def context(self, rows, length, chunk):
        return SimpleNamespace(select=lambda rows: None)

    def __call__(self, context, rows, positions, tokens, wanted, sample_ids, seed=None):
        at = positions[wanted]
        log_p = torch.full((len(at), self.vocab_size), -math.inf)
        log_p[torch.arange(len(at)), torch.tensor(self.says)[at]] = 0
        energy = torch.zeros(len(at)) if self.energies is None else self.energies(rows[wanted])
        return Forecast(log_p, energy, torch.full_like(at, 2), 10.0)


@pytest.mark.parametrize(
    ("options", "text", "finish", "tokens"),
    [
        ({"max_tokens": 3}, "bcd", "length", 3),
        ({}, "bcdefgh", "end", 8),
        ({"stop": ("ef", "xy")}, "bcd", "stop", 5),
        ({"stop": ("b",)}, "", "stop", 1),
        ({"stop": ("ef", "def")}, "bc", "stop", 5),
        ({"stop": ("gx",), "max_tokens": 9}, "bcdefgh", "end", 8),
        ({"stop": ("cdx", "efx"), "max_tokens": 5}, "bcdef", "length", 5),
    ],
)
def test_where_a_text_ends(options, text, finish, tokens, letters):
    predict, seen = Scripted(letters, "bcdefgh"), []
    (found,) = continuations(
        predict, letters, ["a"], lambda draft, piece: seen.append(piece), **{"max_tokens": 20, **options}
    )
    assert (found.text, found.finish, len(found.tokens)) == (text, finish, tokens)
    assert len(seen) == tokens and found.steps == [2] * tokens and found.flops == 10.0 * tokens
    assert "".join(seen) == text, "what a stop string may take away is held back"


def test_of_several_continuations_one_is_kept(letters):
    """The second of three has the lowest energies; by log-probability they are alike, and the first stays."""
    lowest = Scripted(
        letters, "bcd", lambda rows: torch.tensor([3.0, -1.0, 2.0])[rows] if len(rows) == 3 else rows * 0.0
    )
    kept = continuations(lowest, letters, ["a"], continuations=3)[0]
    assert kept.energies == [0.0, -1.0, -1.0, -1.0]
    assert continuations(lowest, letters, ["a"], continuations=3, keep="log_p")[0].energies == [0.0, 3.0, 3.0, 3.0]
    plain = predictor(run_of(builders.small_recipe("model.architecture=baseline")))
    several = [continuations(plain, letters, ["a"], continuations=n, keep="log_p")[0] for n in (1, 4)]
    assert sum(several[1].log_p) > sum(several[0].log_p)
    with pytest.raises(RecipeError, match="keep=energy: the model has no energies"):
        continuations(plain, letters, ["a"], continuations=2)


LOG_P = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.8}, [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
        ({"top_k": 9}, [0.1, 0.5, 0.15, 0.25]),
    ],
)
def test_tokens_are_drawn_in_their_shares(options, shares):
    count = 2000
    texts = torch.arange(count)
    drawn = Sampling(**options).draw(LOG_P.expand(count, -1), texts, torch.zeros_like(texts))
    found = drawn.bincount(minlength=4) / count
    assert found.tolist() == pytest.approx(shares, abs=0.04)
    assert all(bool(f) == bool(s) for f, s in zip(found.tolist(), shares, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-8])
def test_next_to_no_temperature_is_none(temperature, dtype):
    texts = torch.arange(50)
    drawn = Sampling(temperature).draw(LOG_P.to(dtype).expand(50, -1), texts, torch.zeros_like(texts))
    assert drawn.tolist() == [1] * 50


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"temperature": -1}, "temperature=-1: must be a finite number of"),
        ({"top_k": 0}, "top_k=0: must be at"),
        ({"top_p": 0}, "top_p=0: must be greater than 0"),
        ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
        ({"stop": ("",)}, "an empty string stops everything"),
        ({"keep": "best"}, "keep=best: choose one of energy, log_p"),
    ],
)
def test_options_that_do_not_do(options, line, letters):
    with pytest.raises(RecipeError, match=line):
        continuations(None, letters, **options)


def test_a_memory_that_is_too_small_is_noticed_before_the_first_batch(letters, monkeypatch):
    predict = predictor(run_of(SHORT))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 12_000}))
    seen = []
    with pytest.raises(RecipeError, match="the cache of 1 contexts of 31 positions takes"):
        continuations(predict, letters, batch=1, watch=lambda *_: seen.append(1))
    assert not seen
