"""`ebt_megatron.load` of text: three lines to a continuation, scores, energies and thinking step by step."""

import math
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

import ebt_megatron as ebt
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.scoring import score
from ebt_megatron.parallel import setup
from tests import shared_models

PROMPT = "Document 3 says"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return shared_models.text_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def models(runs):
    setup.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = torch.random.get_rng_state()
        out = {name: ebt.load(run) for name, run in runs.items()}
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are the caller's"
    yield out
    setup.shutdown()


def test_the_import_is_cheap_and_the_version_is_there():
    code = "import sys, ebt_megatron as e; assert not {'torch', 'numpy'} & set(sys.modules); print(e.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()[0].isdigit()
    assert {"load", "push_to_hub", "__version__"} <= set(dir(ebt))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ebt.lod


def test_several_models_in_one_process_each_continue_as_alone(models, runs):
    together = {name: model.generate(PROMPT, max_tokens=6, temperature=0).tokens for name, model in models.items()}
    for name, run in runs.items():
        assert ebt.load(str(run)).generate(PROMPT, max_tokens=6, temperature=0).tokens == together[name]
    assert repr(models["ebt"]).startswith("<TextModel run: EBT of ") and "for text, 3 steps, on cpu" in repr(
        models["ebt"]
    )


@pytest.mark.parametrize("name", shared_models.MODELS)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "top_k": 9}, {"stop": "wo"}])
def test_streaming_gives_the_text_of_generate(name, options, models):
    model = models[name]
    whole = model.generate(PROMPT, max_tokens=14, **options)  # longer than the window
    pieces = list(model.stream(PROMPT, max_tokens=14, **options))
    assert [p.token for p in pieces] == whole.tokens
    assert [p.log_p for p in pieces] == pytest.approx(whole.log_p, abs=1e-5)
    assert [p.steps for p in pieces] == whole.steps
    if model.thinks:
        assert [p.energy for p in pieces] == pytest.approx(whole.energies, rel=1e-4, abs=1e-5)
    if "stop" not in options:
        assert "".join(map(str, pieces)) == whole.text


def test_a_list_gives_a_list_and_no_prompt_is_no_work(models):
    several = models["ebt"].generate([PROMPT, "word"], max_tokens=3, temperature=0)
    assert [c.tokens for c in several] == [
        models["ebt"].generate(p, max_tokens=3, temperature=0).tokens for p in (PROMPT, "word")
    ]
    assert models["ebt"].generate([]) == []


def test_scores_are_those_of_what_is_generated(models):
    model = models["ebt"]
    text = PROMPT + model.generate(PROMPT, max_tokens=4, temperature=0, steps=3).text
    scored = model.score(text, steps=3)
    assert len(scored.log_p) == len(scored.energies) == len(model.encode(text)) - 1
    assert set(scored.steps) == {3} and all(map(math.isfinite, scored.energies)) and scored.total < 0
    tokens = model.encode(text)
    options = ThinkingOptions.of({"steps": 3, "final_energy": True})
    (found,) = score(model.predictor(options), [(tokens[:1], tokens[1:])])
    assert scored.log_p == pytest.approx(found.log_p, abs=1e-5)
    assert all(math.isnan(e) for e in models["transformer"].score(text).energies)


@pytest.mark.parametrize("name", ["ebt", "noisy"])
def test_thinking_step_by_step_ends_where_scoring_does(name, models):
    model = models[name]
    thoughts = list(model.think(PROMPT, steps=4, top=3, seed=0))
    assert [t.step for t in thoughts] == [0, 1, 2, 3, 4] and len(thoughts[0].top) == 3
    found = next(iter(model.stream(PROMPT, max_tokens=1, steps=4, temperature=0)))
    assert float(thoughts[-1].probabilities[found.token].log()) == pytest.approx(found.log_p, abs=1e-4)
    assert thoughts[-1].energy == pytest.approx(found.energy, rel=1e-4)
    assert float(thoughts[-1].probabilities.sum()) == pytest.approx(1, abs=1e-5)


def test_the_energy_of_a_continuation_is_the_models_own(models):
    model = models["ebt"]
    energies = model.energy(PROMPT, " word3 word6")
    tokens = model.encode(PROMPT), model.encode(" word3 word6")
    assert len(energies) == len(tokens[1])
    inner, (before, after) = model.run.model, tokens
    every = torch.tensor([[*before, *after]])
    with torch.no_grad():
        context = inner.modality.context(every[:, :-1])
        _, key_values = inner.context(context, every.shape[1] - 1, None, 9)
        table = inner.modality.prediction_embedding.weight[: model.run.task.vocab_size]
        p = torch.full((every.shape[1] - 1, len(table)), 1e-4 / (len(table) - 1))
        p[range(len(p)), every[0, 1:]] = 1 - 1e-4
        plain = inner.predict((p @ table)[:, None], key_values, len(p), None, 9, tangent=False)[:, 0]
    assert energies == pytest.approx(plain[len(before) - 1 :].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda m: m["ebt"].generate("a", candidates=2), "candidates=2: without noise every start"),
        (lambda m: m["transformer"].generate("a", steps=2), "is a baseline, which does not think"),
        (lambda m: m["transformer"].energy("a", "b"), "energy: run is a baseline, which does not think"),
        (lambda m: m["transformer"].think("a"), "think: run is a baseline"),
        (lambda m: m["ebt"].generate("a", stepz=2), "stepz=2: no such option; there are steps, "),
        (lambda m: m["ebt"].generate("a", temperature=-1), "temperature=-1: must be"),
        (lambda m: m["ebt"].think("a", energy_tolerance=0.1), "energy_tolerance: think shows every step"),
        (lambda m: m["ebt"].think("a", candidates=2), "candidates: think follows one prediction"),
        (lambda m: m["ebt"].stream("a", max_tokens=0), "max_tokens=0: must be at least 1"),
        (lambda m: m["ebt"].score("a"), "so two are the least to score"),
        (lambda m: ebt.load("runs/none"), "runs/none: no such folder; give a run"),
        (lambda m: ebt.load("/tmp", dtype="int8"), "dtype=int8: choose one of float32"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, line, models):
    with pytest.raises((ebt.RecipeError, ebt.DataError)) as error:
        call(models)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_other_precisions(models, runs):
    exact = ebt.load(runs["ebt"], device="cpu", dtype="float64")
    assert {p.dtype for p in exact.run.model.parameters()} == {torch.float64}
    ours, theirs = (m.score("Document 3 says word3 word6").log_p for m in (models["ebt"], exact))
    assert ours == pytest.approx(theirs, abs=1e-4)
    half = ebt.load(runs["ebt"], dtype=torch.bfloat16)
    assert half.score("Document 3 says word3 word6").log_p == pytest.approx(theirs, abs=0.2)


def test_the_example_runs_as_a_script(models, runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["examples/api.py", str(runs["ebt"])])
    runpy.run_module("examples.api")
    said = capsys.readouterr().out
    assert "<TextModel run" in said and "candidates=4: without noise every start" in said
    assert said.count("energy ") == 8 + 5
