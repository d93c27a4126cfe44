"""A run from the command line: the same twice, resumed exactly, and clear about what it cannot do.

Runs that are killed: test_runs_in_trouble.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebt_megatron.parallel import setup
from ebt_megatron.train import app
from tests.builders import text_shards

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(40)) for i in range(200)]


@pytest.fixture(autouse=True)
def ends(no_survivors):
    """torchrun's ranks end with the test."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS, 16, 500)


def command(data, output, *overrides, ranks=1):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        sys.executable,
        *launcher,
        "-m",
        "ebt_megatron.train",
        str(ROOT / "recipes/text/quickstart_s1.yaml"),
        "parallel.tensor=1",
        "data.sequence_length=16",
        f"data.train=[{data}/train]",
        f"data.validation=[{data}/validation]",
        "training.steps=10",
        "training.log_interval=1",
        "training.save_interval=4",
        "training.validation_interval=5",
        "training.validation_samples=16",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        f"training.output_dir={output}",
        *overrides,
    ]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), env=environment(), capture_output=True, text=True, timeout=200)


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return [(r["step"], r["loss"], r["final_step_loss"], r.get("validation_loss")) for r in rows(output)]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    done = train(data, output)
    assert done.returncode == 0, done.stderr
    return output


def test_the_metrics_a_run_must_have(undisturbed):
    needed = {
        "step",
        "loss",
        "final_step_loss",
        "initial_loss",
        "energy_first",
        "energy_last",
        "alpha",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "peak_memory_bytes",
        "model_flops_per_second",
        "data_wait_seconds",
        "phase_seconds",
        "straggler_ratio",
    }
    recorded = rows(undisturbed)
    assert [r["step"] for r in recorded] == list(range(1, 11))
    assert all(needed <= set(r) for r in recorded)
    assert [r["step"] for r in recorded if "validation_loss" in r] == [5, 10]
    assert list((undisturbed / "tensorboard").glob("events*"))


def test_the_same_recipe_and_seed_give_the_same_losses(data, undisturbed, tmp_path):
    done = train(data, tmp_path, "--profile=2")  # which changes nothing but writes a trace
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(undisturbed)
    assert list((tmp_path / "trace").glob("*.json*"))


def wait_for_step(output, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").exists() and any(r["step"] >= step for r in rows(output)):
            return
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "number"), [pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow), (2, signal.SIGINT)], ids=str
)
def test_told_to_stop_it_saves_first(ranks, number, data, undisturbed, tmp_path):
    slow = ("training.save_interval=0",)
    process = subprocess.Popen(
        command(data, tmp_path, *slow, ranks=ranks),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path, 3, process)
    os.killpg(process.pid, number)  # as a terminal does on Ctrl-C: to torchrun and to the ranks
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 or ranks > 1, said  # torchrun itself ends with the signal
    saved = [int(folder.name[5:]) for folder in (tmp_path / "checkpoints").glob("step-????????")]
    assert saved == [rows(tmp_path)[-1]["step"]], said
    if ranks == 1 and "told to stop" in said:  # it may also have been quick enough to finish
        assert "resumed from" in train(data, tmp_path, *slow).stderr
    ours, theirs = losses(tmp_path), losses(undisturbed)
    assert ours == theirs or ranks > 1
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs[: len(ours)]], rel=1e-4)


def refusal(*args):
    """What is said of a mistake, in this process."""
    setup.shutdown()
    result = CliRunner().invoke(app, command(*args)[3:])
    setup.shutdown()
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return line


def test_resuming_with_another_model_is_refused(data, undisturbed):
    said = refusal(data, undisturbed, "model.num_layers=1", "training.steps=12")
    assert "model.num_layers=2, this run has model.num_layers=1" in said


def test_a_misspelt_key_is_one_line(data, tmp_path):
    assert "did you mean 'training.steps'?" in refusal(data, tmp_path, "training.stepz=3")


def test_missing_shards_are_one_line_and_nothing_is_made(tmp_path):
    """That of several ranks one says it: tests/core/test_cli.py."""
    assert "manifest.json is missing" in refusal(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluation_reads_the_run(data, undisturbed):
    done = subprocess.run(
        [sys.executable, "-m", "ebt_megatron.evaluate", str(undisturbed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((undisturbed / "evaluation.json").read_text())
    assert [row["steps"] for row in result["thinking"]] == [1, 2, 3, 4]
    final = rows(undisturbed)[-1]
    assert result["thinking"][1]["loss"] == pytest.approx(final["validation_loss"], rel=1e-5)
    assert result["thinking"][0]["loss"] == pytest.approx(final["validation_loss_one_step"], rel=1e-5)
    assert len(result["example"]["states"]) == 3
