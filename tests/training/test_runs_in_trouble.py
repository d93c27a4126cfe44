"""Faults injected into whole runs on two ranks: what is lost, what is said, and that the run goes on."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.builders import text_shards
from tests.cases import slow
from tests.distributed_utils import RankError, Ranks, run_ranks
from tests.training import runs

DISTRIBUTED = "parallel.distributed_optimizer=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), runs.DOCUMENTS, 10, 500, vocab=300)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    return run_ranks(runs.train, 2, data, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("trouble", ["nan_loss", slow("infinite_energy"), "nan_gradient"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(trouble, data, undisturbed, tmp_path):
    bad = runs.BAD_STEP
    ranks = run_ranks(runs.train, 2, data, tmp_path, (), trouble)
    for rank, expected in zip(ranks, undisturbed, strict=True):
        assert rank["after"][:bad] == expected["after"][:bad], "before, nothing is different"
        assert rank["after"][bad] == rank["after"][bad - 1], "the weights are those of the step before"
        assert rank["after"][bad + 1] != rank["after"][bad], "and training goes on"
    assert ranks[0]["after"] == ranks[1]["after"]
    rows = runs.rows(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["bad_steps"] for r in rows] == [0] * bad + [1] * (12 - bad)
    assert any(f"step {bad + 1} skipped: not finite" in line for line in ranks[0]["said"])


def test_too_many_bad_steps_stop_the_run_and_name_the_checkpoint(data, tmp_path):
    ranks = run_ranks(runs.train, 2, data, tmp_path, ("training.max_bad_steps=3",), "nan_for_good")
    for rank in ranks:
        assert "3 steps in a row were not finite (the last is step 7)" in rank["stopped"]
        assert "the last good checkpoint is" in rank["stopped"] and "step-00000003" in rank["stopped"]


@pytest.mark.parametrize(
    ("trouble", "error", "step"),
    [
        ("no_data", "DataError: shard-000001.tar is damaged", 5),
        ("no_validation_data", "OSError: [Errno 5] Input/output error: 'shard-000000.tar'", 8),
    ],
)
def test_what_cannot_be_read_on_one_rank_ends_the_run_after_a_save(trouble, error, step, data, undisturbed, tmp_path):
    options = ("training.save_interval=100", "data.prefetch=2", "training.validation_interval=8")
    first, last = run_ranks(runs.train, 2, data, tmp_path, options, trouble)
    assert (first["stopped"], last["stopped"]) == (f"PeerError: rank 1: {error}", error)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert any(f"saved step {step}, before the error" in line for line in first["said"])
    before = len(first["after"])
    ranks = run_ranks(runs.train, 2, data, tmp_path, options)
    assert [r["after"] for r in ranks] == [r["after"][before:] for r in undisturbed], "and goes on where it was"
    assert [(r["step"], "validation_loss" in r) for r in runs.rows(tmp_path)] == [
        (s, s in (8, 12)) for s in range(1, 13)
    ]


def test_a_loss_spike_goes_back_and_skips_the_data(data, tmp_path):
    options = ("training.spike_factor=3", "training.spike_window=4", "training.async_save=false")
    ranks = run_ranks(runs.train, 2, data, tmp_path, options, "spike")
    assert any("loss spike at step 8" in line and "back to step 6, data skipped" in line for line in ranks[0]["said"])
    first, second = ranks
    assert len(first["after"]) == 12 + 2, "steps 7 and 8 are done again"
    samples = [i for a, b in zip(first["samples"], second["samples"], strict=True) for i in a + b]
    assert sorted(samples) == list(range(4 * 14)), "on samples that were not seen before"
    assert first["after"][7] != first["after"][9]
    assert [r["step"] for r in runs.rows(tmp_path)][-1] == 12


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_alone(data, tmp_path):
    ranks = run_ranks(runs.train, 2, data, tmp_path, (DISTRIBUTED, *runs.S2), "full_disk")
    plain = run_ranks(runs.train, 2, data, tmp_path / "plain", (DISTRIBUTED, *runs.S2))
    assert [r["digest"] for r in ranks] == [r["digest"] for r in plain]
    assert any("checkpoint not saved" in x and "rank 1" in x and "No space left" in x for x in ranks[0]["said"])
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000009", "step-00000012"]


def test_a_run_goes_on_with_the_next_samples_on_another_number_of_ranks(data, tmp_path):
    seen = []
    for world, steps in ((2, 3), (1, 5), (4, 8)):
        ranks = run_ranks(runs.train, world, data, tmp_path, (f"training.steps={steps}",))
        for step in zip(*(r["samples"] for r in ranks), strict=True):
            seen += sorted(i for samples in step for i in samples)
    assert seen == list(range(8 * 4))


def killed(data: Path, output: Path, overrides: tuple[str, ...], kills: int, seed: int) -> tuple[list, dict[str, int]]:
    """Results of a run whose ranks are killed `kills` times, and when they were.

    Half of the kills come while a checkpoint is being written, half some steps after the last start; of
    either, some hit one rank and some all.
    """
    generator, when = random.Random(seed), {"while saving": 0, "between saves": 0}

    def last_step() -> int:
        path = output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving() -> bool:
        return any((output / "checkpoints").glob("*.partial"))

    for kill in range(kills):
        shutil.rmtree(output / "tensorboard", ignore_errors=True)
        ranks, start = Ranks(runs.train, 2, data, output, overrides), last_step()
        target = start + generator.randrange(1, 6)
        while ranks.alive and last_step() < target:
            time.sleep(0.002)
        while kill % 2 and ranks.alive and not saving():
            time.sleep(0.0002)
        time.sleep(generator.uniform(0, 0.02))
        assert ranks.alive, "the run was over before all kills: give it more steps"
        when["while saving" if saving() else "between saves"] += 1
        if generator.random() < 0.5:
            ranks.kill(generator.randrange(2))
            with pytest.raises(RankError):
                ranks.results(60)
        ranks.kill()
    return run_ranks(runs.train, 2, data, output, overrides), when


@pytest.mark.parametrize("kills", [2, slow(20)])
def test_killed_again_and_again_the_weights_are_those_of_an_undisturbed_run(kills, data, tmp_path):
    overrides = (DISTRIBUTED, *runs.S2, f"training.steps={20 + 5 * kills}", "training.micro_batch_size=2")
    results, when = killed(data, tmp_path / "killed", overrides, kills, seed=1)
    expected = run_ranks(runs.train, 2, data, tmp_path / "plain", overrides)
    assert [r["digest"] for r in results] == [r["digest"] for r in expected]
    assert when["while saving"] >= min(3, kills // 4), when

    def losses(output):
        return [(r["step"], r["loss"], r["grad_norm"]) for r in runs.rows(output)]

    assert losses(tmp_path / "killed") == losses(tmp_path / "plain")
