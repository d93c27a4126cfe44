"""Scores are those of a direct computation, through lm-evaluation-harness as well."""

import json

import pytest
import torch

from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import predictor_of
from ebt_megatron.inference.scoring import score
from ebt_megatron.tasks.interface import Sample
from tests import builders
from tests.inference.models import END, predictor, run_of, texts_of

RECIPES = {
    "ebt": builders.small_recipe("thinking.langevin_noise=0.5"),
    "baseline": builders.small_recipe("model.architecture=baseline"),
}
STEPS = {"ebt": {"steps": 4}, "baseline": {}}


def direct(run, context, rest, steps):
    """Log-probabilities of a continuation by what trains: the whole text at once, without a cache."""
    tokens = torch.tensor([*context, *rest] + [END] * (11 - len(context) - len(rest)))[None]
    sample = Sample(tokens[:, :-1], tokens[:, 1:], torch.tensor([stable_seed("context", tuple(context))]))
    losses = run.objective.evaluate(sample, steps).losses[-1, :, 0]
    return -losses[len(context) - 1 : len(context) + len(rest) - 1]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("architecture", RECIPES)
def test_scores_over_shared_contexts(architecture, batch):
    run = run_of(RECIPES[architecture])
    predict = predictor(run, **STEPS[architecture])
    requests = [
        ([5, 9, 2], [7, 7]),
        ([5, 9, 2], [1, 2, 3, 4]),
        ([8], [6]),
        ([5, 9, 2], [7, 7, 7]),
        ([1, 2, 3, 4, 5], [9]),
    ]
    for (context, rest), found in zip(requests, score(predict, requests, batch, chunk=2), strict=True):
        assert found.log_p == pytest.approx(direct(run, context, rest, 4).tolist(), rel=1e-5)
        assert len(found.energies) == len(rest) and not found.greedy and found.flops > 0
    every = list(score(predict, [([5, 9], [token]) for token in range(builders.VOCAB)], builders.VOCAB))
    assert [found.greedy for found in every].index(True) == max(range(len(every)), key=lambda i: every[i].log_p[0])
    assert sum(found.greedy for found in every) == 1


QUESTIONS = [("ab", ["cd", "efg", "c"], 0), ("Is it", ["so?", "not"], 1), ("zz", ["z", "yy", "xx"], 2)]


@pytest.mark.parametrize("architecture", RECIPES)
def test_the_harness_gets_what_a_direct_computation_gives(architecture, tmp_path, monkeypatch):
    """A multiple-choice task of local files: accuracy by summed log-probabilities, and by those per character."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from ebt_megatron.inference.lm_eval_adapter import RunLM

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ntarget_delimiter: ' '\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    run = run_of(RECIPES[architecture])
    letters = texts_of(run, tmp_path)
    lm = RunLM.of(predictor_of(run, ThinkingOptions.of(STEPS[architecture])), letters, batch_size=4)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=tasks, bootstrap_iters=0, log_samples=True)
    right, by_length = [], []
    for sample, (question, choices, answer) in zip(found["samples"]["local"], QUESTIONS, strict=True):
        sums = []
        for choice, ((log_p, _),) in zip(choices, sample["resps"], strict=True):
            want = direct(run, letters.encode(question), letters.encode(f" {choice}"), 4).sum().item()
            assert log_p == pytest.approx(want, rel=1e-5)
            sums.append(want)
        right.append(max(range(len(sums)), key=sums.__getitem__) == answer)
        each = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        by_length.append(max(range(len(each)), key=each.__getitem__) == answer)
    results = found["results"]["local"]
    assert (results["acc,none"], results["acc_norm,none"]) == (sum(right) / 3, sum(by_length) / 3)


def test_whole_texts_and_generation_for_the_harness(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from ebt_megatron.inference.lm_eval_adapter import RunLM

    run = run_of(RECIPES["ebt"])
    letters = texts_of(run, tmp_path)
    lm = RunLM.of(predictor(run, steps=4), letters)

    def requests(kind, *arguments):
        return [Instance(kind, {}, given, 0) for given in arguments]

    text = "A text of more than ten."  # windows of ten, the first after the end of a text
    tokens = [END, *letters.encode(text)]
    windows = [(tokens[:1], tokens[1:11]), (tokens[10:11], tokens[11:21])]
    last = tokens[-11:]
    windows.append((last[:7], last[7:]))  # 24 tokens: of the last window four are new
    want = sum(direct(run, context, rest, 4).sum().item() for context, rest in windows)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,))) == [pytest.approx(want, rel=1e-5)]
    asked = {"until": ["e", "t"], "max_gen_toks": 20, "do_sample": False}
    found = lm.generate_until(requests("generate_until", ("ab", asked), ("", asked | {"max_gen_toks": 3})))
    assert len(found) == 2 and not any(c in t for t in found for c in "et") and len(found[1]) <= 3
    again = lm.generate_until(requests("generate_until", ("ab", asked)))
    assert again == found[:1]


@pytest.fixture
def lm(tmp_path):
    """The harness's model, with a tokenizer of letters that knows "he" and "hello" as tokens of their own."""
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, decoders, models

    from ebt_megatron.inference.lm_eval_adapter import RunLM
    from tests.inference.models import texts_with

    run = run_of(RECIPES["baseline"])
    pieces = ["<|endoftext|>", *"abcdehlo w", "he", "hel", "lo", "hello"]
    merges = [("h", "e"), ("he", "l"), ("l", "o"), ("hel", "lo")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.decoder = decoders.Fuse()
    lm = RunLM.of(predictor(run), texts_with(tokenizer, run, tmp_path))
    lm.run = run
    return lm


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0) for given in arguments]


def test_continuations_that_merge_into_their_context_or_are_empty(lm):
    token = lm.tok_encode
    hello, he, hel, lo, a, b, space = (token(s)[0] for s in ("hello", "he", "hel", "lo", "a", "b", " "))
    assert (token("hello"), token("hel"), token("lo")) == ([hello], [hel], [lo])
    pairs = {
        ("a", "b"): ([a], [b]),
        ("hel", "lo"): ([END], [hello]),  # all of it is one token: it follows what comes before
        ("ahel", "lo"): ([a], [hello]),
        ("ah", "eb"): ([a, he], [b]),  # the harness's own boundary, after as many tokens as the context has
        ("a ", "b"): ([a], [space, b]),
        ("  ", "b"): ([END], [space, space, b]),
        ("", "b"): ([END], [b]),
    }
    found = lm.loglikelihood(asked("loglikelihood", *pairs, ("a", ""), ("", ""), ("", "\u2603")))
    for (log_p, _), (context, rest) in zip(found, pairs.values(), strict=False):
        assert log_p == pytest.approx(direct(lm.run, context, rest, 4).sum().item(), rel=1e-5)
    assert found[len(pairs) :] == [(0.0, True)] * 3
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",))) == [0.0]


def test_every_token_of_an_answer_longer_than_the_window_counts(lm):
    context, answer = [1, 2, 3], [i % 9 + 1 for i in range(23)]
    ((log_p, _),) = lm._loglikelihood_tokens([(None, context, answer)])
    windows = [(context[-1:], answer[:10]), (answer[9:10], answer[10:20]), (answer[12:20], answer[20:])]
    assert log_p == pytest.approx(sum(direct(lm.run, *window, 4).sum().item() for window in windows), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"max_new_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_gen_toks": 5, "max_tokens": 7}, {"max_tokens": 5}),
        ({}, {"max_tokens": 256}),
        ({"until": [None, "\n", ""]}, {"stop": ("\n",)}),
        ({"until": "x"}, {"stop": ("x",)}),
        ({"until": None}, {"stop": ()}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": None, "do_sample": True}, {"temperature": 0.0}),
        ({"temperature": 1, "top_p": 0}, {"temperature": 0.0, "top_p": 1.0}),
        ({"temperature": 1, "top_k": 0}, {"top_k": None}),
        ({"temperature": 1, "top_k": -1, "top_p": 0.9}, {"top_k": None, "top_p": 0.9}),
        ({"temperature": 1, "top_k": 5}, {"top_k": 5}),
    ],
)
def test_generation_arguments_are_what_the_harness_makes_of_them(given, wanted, lm):
    options = lm._generation(given)
    found = {**vars(options), **vars(options.sampling)}
    assert {name: found[name] for name in wanted} == wanted


def test_arguments_that_are_not_supported_are_named_once(lm, capsys):
    for _ in range(2):
        lm._generation({"num_beams": 4, "use_cache": True, "repetition_penalty": 1.0})
    assert capsys.readouterr().err == "note: generation argument num_beams=4 is not supported, and left out\n"


def test_a_text_with_characters_that_are_lacking_is_scored_and_said_once(lm, capsys):
    texts = ("caf\u00e9 \udcff", "b"), ("a", "\u2603b")
    first, second = lm.loglikelihood(asked("loglikelihood", *texts))
    assert first[0] < 0 and second[0] < 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("note: 7 characters or words that the run's tokenizer lacks were")


def test_model_arguments(lm, tmp_path, monkeypatch):
    from ebt_megatron.core.errors import RecipeError
    from ebt_megatron.inference import lm_eval_adapter
    from ebt_megatron.inference.lm_eval_adapter import RunLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    with pytest.raises(RecipeError, match="2024 is not a run directory"):
        RunLM(run=2024)
    with pytest.raises(RecipeError, match=r"run=7: the harness reads this as a int: give run=./FOLDER"):
        RunLM(run=7)
    with pytest.raises(RecipeError, match="batch_size=some: must be a number of at least 1, or auto"):
        RunLM.of(lm.predictor, lm.texts, "some")
    assert RunLM.of(lm.predictor, lm.texts, "auto").batch == 64
    assert RunLM.of(lm.predictor, lm.texts, "8").batch == 8
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    few = RunLM.of(lm.predictor, lm.texts, "auto:4").batch
    lm.predictor.check_batch(few, 10, 256)
    with pytest.raises(RecipeError):
        lm.predictor.check_batch(2 * few, 10, 256)
    assert lm_eval_adapter._MOST > few >= 1
