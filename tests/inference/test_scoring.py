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
