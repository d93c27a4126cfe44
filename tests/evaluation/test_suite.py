"""The suite's parts give known answers on scores made by hand, and its scores are those of validation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ebt_megatron.config import RecipeError
from ebt_megatron.evaluation import statistics, suite
from ebt_megatron.evaluation.interface import SuiteOptions
from ebt_megatron.evaluation.tables import suite_tables
from ebt_megatron.evaluation.token_scores import CORRUPTIONS, TokenScores, corrupted, score
from ebt_megatron.parallel import setup
from tests import builders, shared_models


def scores(loss, energy=(), answer=None, moved=None, **more):
    """Of positions whose target is token 0."""
    loss = np.array(loss, float)
    zeros = np.zeros_like(loss)
    flat = np.zeros(loss.shape[1])
    values = {
        "target": flat.astype(int),
        "loss": loss,
        "entropy": zeros,
        "confidence": zeros,
        "answer": zeros.astype(int) if answer is None else np.array(answer),
        "moved": zeros if moved is None else np.array(moved),
        "drawn": flat.astype(int),
        "drawn_log_p": flat,
        "energy": np.array(energy, float),
        "token_energy": flat,
    }
    return TokenScores(**(values | more))


def test_statistics_of_known_answers():
    assert statistics.auroc(np.array([1, 2, 3, 4.0]), np.array([0, 0, 1, 1], bool)) == 1
    assert statistics.auroc(np.array([1.0, 1, 1, 1]), np.array([0, 1, 0, 1], bool)) == 0.5
    assert math.isnan(statistics.auroc(np.array([1.0, 2]), np.array([1, 1], bool)))
    assert statistics.rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 100, 1000])) == pytest.approx(1)
    sure, right = np.array([0.9] * 10), np.array([True] * 7 + [False] * 3)
    assert statistics.calibration_error(sure, right) == pytest.approx(0.2)
    assert statistics.risk_coverage(np.array([3.0, 1, 2]), np.array([False, True, True])).tolist() == [0, 0, 1 / 3]
    assert statistics.area_under_risk_coverage(np.array([1.0, 2, 3]), np.array([False, True, True])) > 0.5


def test_thinking_tells_what_each_step_changed():
    first, second = suite.thinking(scores([[2.0, 4], [1, 1]], answer=[[0, 5], [0, 0]]))
    assert (first["loss"], first["changed"], first["accuracy"]) == (3, None, 0.5)
    assert (second["perplexity"], second["changed"], second["accuracy"]) == (pytest.approx(math.e), 0.5, 1)


def test_where_the_context_predicts_a_position_that_is_sure_takes_no_step():
    each = scores([[1.0, 4], [1, 2]], first=0, confidence=np.array([[0.9, 0.05], [0.9, 0.05]]))
    assert [row["steps"] for row in suite.thinking(each)] == [0, 1]
    numbers = suite.dynamic_compute(each, 1, lambda steps: 1 + 2 * steps)
    assert [row["flops"] for row in numbers["fixed"]] == [1, 3]
    half = next(row for row in numbers["adaptive"] if row["confidence"] == 0.5)
    assert (half["steps"], half["flops"]) == (0.5, 2)
    assert half["perplexity"] == pytest.approx(numbers["fixed"][1]["perplexity"])


def test_of_several_starts_the_energy_chooses_and_is_set_beside_an_oracle():
    good_last = [
        scores([[3.0, 1]], energy=[[5, 5], [4, 1]], answer=[[1, 0]]),
        scores([[1.0, 3]], energy=[[9, 9], [2, 3]], answer=[[0, 1]]),
    ]
    one, two = suite.starts(good_last, 1, {})
    assert one["by"]["lowest energy"]["perplexity"] == pytest.approx(math.e**2)
    assert two["by"]["lowest energy"] == {"perplexity": pytest.approx(math.e), "accuracy": 1}
    assert two["by"]["largest drop"]["perplexity"] == pytest.approx(math.e**2)  # 1, 4 against 7, 6
    assert two["by"]["best loss (an oracle)"]["perplexity"] == pytest.approx(math.e)
    even = -np.log((math.exp(-1) + math.exp(-3)) / 2)
    assert two["by"]["even mixture"]["perplexity"] == pytest.approx(math.exp(even))
    assert one["by"]["mixture by exp(-E / tau)"]["perplexity"] == pytest.approx(math.e**2)
    assert math.e < two["by"]["mixture by exp(-E / tau)"]["perplexity"] < math.exp(even)


def test_a_baseline_keeps_the_likeliest_token_it_drew():
    ours = [scores([[1.0]], energy=[[0], [0]])] * 2
    baseline = [
        scores([[1.0]], drawn=np.array([0]), drawn_log_p=np.array([-3.0])),
        scores([[1.0]], drawn=np.array([4]), drawn_log_p=np.array([-1.0])),
    ]
    one, two = suite.starts(ours, 1, {"T": baseline})
    assert [row["by"]["likeliest of the tokens drawn, T"]["accuracy"] for row in (one, two)] == [1, 0]


def test_adaptive_stopping_spends_steps_where_predictions_move():
    """One position is done after a step, the other needs three."""
    of = scores([[1.0, 5], [1, 3], [1, 1]], moved=[[0.01, 0.9], [0.01, 0.9], [0.01, 0.9]])
    numbers = suite.dynamic_compute(of, 3, lambda steps: 10 * steps)
    half = next(row for row in numbers["adaptive"] if row["tolerance"] == 0.5)
    assert (half["steps"], half["perplexity"], half["flops"]) == (2, pytest.approx(math.e), 20)
    assert numbers["flops to reach the trained steps' perplexity"] == pytest.approx(2 / 3)


def test_an_energy_that_knows_wrong_tokens_is_told_from_one_that_does_not():
    wrong = np.array([True, False, True, False])
    knows = scores([[1.0, 2, 1, 2]], token_energy=np.array([9.0, 1, 8, 2])), wrong
    rows = suite.corruption(lambda kind: knows, {"T": lambda kind: scores([[1.0, 1, 1, 1]])})
    assert [row["kind"] for row in rows] == list(CORRUPTIONS)
    assert [rows[0][key] for key in ("token energy", "-log p", "-log p, T")] == [1, 0, 0.5]


def test_a_shift_is_measured_by_the_baseline():
    inside = {"": scores([[2.0], [1.0]], energy=[[0]] * 3), "T": scores([[1.0]])}
    outside = {"": scores([[4.0], [2.0]], energy=[[1]] * 3), "T": scores([[3.0]])}
    numbers = suite.shift(inside, outside, "T", 2)
    assert numbers["shift"] == pytest.approx(math.e**2)
    assert numbers["gain over the first step"] == pytest.approx(1 - math.exp(-2))
    assert numbers["AUROC of being other text, by energy"] == 1


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_text_says_what_is_wrong_in_it(kind):
    tokens = torch.randint(50, (40, 65), generator=torch.Generator().manual_seed(0))
    out, wrong = corrupted(tokens, kind, 0.2, 50, seed=1)
    assert torch.equal(out != tokens, wrong) and not torch.equal(corrupted(tokens, kind, 0.2, 50, seed=2)[0], out)
    assert 0.12 < wrong.float().mean() < 0.25
    if kind == "swapped":
        assert torch.equal(out.sort(1).values, tokens.sort(1).values)
    if kind == "repeated":
        assert torch.equal(out[wrong], tokens.roll(1, 1)[wrong])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.conditioning=time_embed_sequence",),
        ("model.architecture=baseline",),
        ("thinking.initial=context", "thinking.step_rule=mirror_descent", "thinking.langevin_noise=0.5"),
    ],
)
def test_scores_are_those_of_validation(overrides):
    recipe = builders.small_recipe("thinking.initial_std=1", *overrides)
    objective, sample = builders.objective(builders.build(recipe), recipe), builders.sample(recipe)
    thought, ours = objective.evaluate(sample, 4), score(objective, [sample, sample], 3)
    assert ours.loss.shape == ours.confidence.shape == (3 + objective.starts_at_context if objective.thinks else 1, 40)
    losses = thought.losses if thought.initial is None else torch.cat([thought.initial[None], thought.losses])
    np.testing.assert_allclose(ours.loss[:, :20], losses.flatten(1)[: len(ours.loss)], rtol=1e-5)
    assert np.array_equal(ours.loss[:, :20], ours.loss[:, 20:])
    assert (ours.confidence <= 1).all() and (ours.entropy >= 0).all()
    likely = ours.right[-1]
    np.testing.assert_allclose(ours.confidence[-1][likely], np.exp(-ours.loss[-1][likely]), rtol=1e-4)
    if objective.thinks:
        np.testing.assert_allclose(ours.energy[:, :20], thought.energies.flatten(1), rtol=1e-5)
        other = score(objective, [sample], 3, start=1)
        assert not np.array_equal(other.energy[0], ours.energy[0, :20])
    else:
        assert ours.energy.size == 0


def test_the_suite_of_an_ebt_from_its_context(tmp_path):
    """Whole: its parts, its tables, and its pictures of thinking, which begin at what the context says."""
    runs = shared_models.text_runs(tmp_path, ("ebt-context", "transformer"))
    options = SuiteOptions(steps=2, starts=2, baselines=(runs["transformer"],))
    numbers = suite.evaluate_suite(runs["ebt-context"], ["training.validation_samples=2"], options)
    setup.shutdown()
    assert [row["steps"] for row in numbers["thinking"]][:2] == [0, 1] and suite_tables(numbers)
    assert numbers["token_trace"]["landscapes"][0]["path"] and numbers["token_trace"]["samples"]["texts"]


def test_a_token_taken_as_a_prediction_has_the_energy_of_its_embedding():
    """A distribution that is all on one token is embedded as that token's row."""
    recipe = builders.small_recipe("model.conditioning=none")
    model, sample = builders.build(recipe), builders.sample(recipe)
    objective = builders.objective(model, recipe)
    logits = torch.full((10, 2, model.modality.prediction_embedding.weight.shape[0]), -1e4, dtype=torch.float64)
    logits.scatter_(2, sample.targets.t()[..., None], 0.0)
    thinker = builders.new_thinker(model, recipe, builders.text_batch())
    thinker.descent.prediction.y = logits.flatten(0, 1)
    energy = thinker.think(1).energies[0]
    np.testing.assert_allclose(score(objective, [sample], 2).token_energy, energy.flatten(), rtol=1e-6)


def test_baselines_of_one_recipe_are_told_apart():
    def collected(loss):
        plain = scores([[loss, 1.0]], confidence=np.full((1, 2), 0.5), entropy=np.array([[1.0, 2]]), answer=[[0, 1]])
        about = {"name": "t", "steps": 1, "tokens": 2}
        return suite._Collected(1, {}, about, plain, [plain], {}, {}, float, None)

    names = []
    for folder in (Path("runs/a/t"), Path("runs/b/t")):
        names.append(suite._name(folder, {"t", *names}))
    assert len({"t", *names}) == 3
    numbers = suite._results(collected(1.0), dict(zip(names, map(collected, (2.0, 3.0)), strict=True)))
    assert [(m["name"], m["baseline"], m["loss"]) for m in numbers["models"]] == [
        ("t", False, 1.0),
        (names[0], True, 1.5),
        (names[1], True, 2.0),
    ]
    assert list(numbers["uncertainty"]) == ["t", *names]


def test_options_that_mean_nothing_are_one_line():
    for options, said in ((suite.SuiteOptions(steps=0), "--steps 0"), (suite.SuiteOptions(starts=0), "--starts 0")):
        with pytest.raises(RecipeError, match=f"{said}: at least 1"):
            options.check()


def test_tables_show_every_part():
    loss = [[2.0, 1], [1, 2]]
    ours = scores(
        loss,
        energy=[[3, 2], [2, 1], [1, 0]],
        confidence=np.full((2, 2), 0.5),
        entropy=np.array([[1.0, 2], [1, 2]]),
        answer=[[0, 1], [0, 1]],
    )
    numbers = {
        "trained steps": 2,
        "thinking": suite.thinking(ours),
        "starts": suite.starts([ours, ours], 2, {}),
        "models": [
            {
                "name": "a [b]",
                "parameters": 1e6,
                "tokens": 2e6,
                "training flops": 1e12,
                "loss": 1.0,
                "inference flops a token": 1e6,
                "perplexity": 2.7,
                "accuracy": 0.5,
            }
        ],
        "uncertainty": {"a": suite.uncertainty(ours, 2)},
        "dynamic compute": suite.dynamic_compute(ours, 2, float),
        "corruption": suite.corruption(lambda kind: (ours, np.array([True, False])), {}),
        "shifts": {"far": suite.shift({"": ours, "T": ours}, {"": ours, "T": ours}, "T", 2)},
    }
    tables = suite_tables(numbers)
    assert len(tables) == 7
    for table in tables:
        assert all(len(row) == len(table.head) for row in table.rows) and table.rows
        assert table.head[0] in table.markdown() and table.head[0] in table.html()
