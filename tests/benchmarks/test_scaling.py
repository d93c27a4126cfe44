"""A study's plan becomes runs, runs are done once whatever ends them, and rows of runs become fits and ratios."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.fits import Law
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import report, runs, slurm
from benchmarks.scaling.plan import Cell, Job, Plan
from benchmarks.scaling.runs import Runner
from benchmarks.study import Stopped
from ebt_megatron.config import RecipeError, load_recipe
from ebt_megatron.core.files import write_whole
from tests.builders import text_shards

ROOT = Path(__file__).parents[2]
STUDY = {
    "name": "s",
    "axis": "data",
    "values": [1e5, 2e5, 4e5, 8e5],
    "seeds": 2,
    "data": "d",
    "models": {"EBT": {"recipe": "text/quickstart_context"}, "T": {"recipe": "text/quickstart_transformer"}},
    "baseline": "T",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Samples of 32 tokens to train on and to validate with."""
    words = random.Random(0)
    documents = [" ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=300)) for _ in range(12)]
    return text_shards(tmp_path_factory.mktemp("data"), documents, 32, 500, vocab=300)


def written(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (STUDY | changes).items() if value is not None}))
    return path


def plan(tmp_path, **changes):
    return Plan.read(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("axis", "values", "wanted"),
    [
        ("data", [1e5, 2e5, 4e5, 8.192e5], {"training.steps": 800}),
        ("width", [32, 64, 96, 192], {"model.hidden_size": 192, "model.num_attention_heads": 4, "optimizer.lr": 0.5}),
        ("depth", [1, 2, 3, 6], {"model.num_layers": 6, "training.steps": 800}),
        (
            "batch",
            [2, 4, 8, 32],
            {
                "training.global_batch_size": 32,
                "training.steps": 200,
                "optimizer.lr": 2.0,
                "optimizer.warmup_steps": 12,
            },
        ),
        ("epochs", [1, 2, 4, 8], {"data.unique_samples": 6400, "training.steps": 6400}),
    ],
)
def test_a_value_of_an_axis_is_a_recipe(axis, values, wanted, tmp_path):
    study = plan(tmp_path, axis=axis, values=values, tokens=None if axis == "data" else 819200)
    recipe = study.recipe(Job(Cell("T", values[-1], 0 if axis == "data" else 819200), 1, 0.5), tmp_path)
    assert recipe.training.seed == 1235
    for key, value in wanted.items():
        section, name = key.split(".")
        found = getattr(getattr(recipe, section), name)
        by_rule = 0.5 * load_recipe("text/quickstart_transformer", []).optimizer.lr if key == "optimizer.lr" else 1
        assert found == pytest.approx(value * by_rule, rel=1e-3), key


def test_runs_of_a_value_of_flops_take_as_many_with_every_model(shards, tmp_path):
    study = plan(tmp_path, axis="flops", values=[1e11, 4e11, 1.6e12, 6.4e12], data=str(shards))
    for cell in study.cells[-2:]:
        recipe = study.recipe(Job(cell, 0, 1.0), tmp_path)
        assert recipe.model.hidden_size == 272, "96 times the fourth root of 64"
        assert study.flops(recipe) == pytest.approx(6.4e12, rel=0.01)
        assert study.flops(recipe, vocabulary=False) < 0.95 * study.flops(recipe)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"axis": "heads"}, "axis=heads: choose one of data, width"),
        ({"values": [1e5, 2e5]}, "need four at least"),
        ({"values": [4, 3, 2, 1]}, "give them rising"),
        ({"baseline": "x"}, "choose one of EBT, T"),
        ({"axis": "depth"}, "needs tokens"),
        ({"tokens": 1e6}, "leave tokens out"),
        ({"learning_rates": [2, 1]}, "give factors above 0, rising"),
        ({"budget": 3}, "is no study"),
    ],
)
def test_what_is_no_study_is_refused(change, line, tmp_path):
    with pytest.raises(RecipeError, match=line):
        plan(tmp_path, **change)


# --- doing the runs -------------------------------------------------------------------------------


class Machine:
    """Stands for training: a law of loss over steps, with a best learning rate for each model and size."""

    def __init__(self, monkeypatch):
        self.trained, self.trouble = [], {}
        self.lr = load_recipe("text/quickstart_transformer", []).optimizer.lr  # the best for it
        monkeypatch.setattr(runs, "train", self.train)

    def train(self, recipe):
        folder = Path(recipe.training.output_dir)
        self.trained.append(folder.name)
        trouble = self.trouble.get(folder.name, [])
        if trouble:
            raise trouble.pop(0)
        best = self.lr * (2 if "context" in recipe.name else 1)
        off = 0.01 * abs(np.log(recipe.optimizer.lr / best))
        loss = 2.0 + 1.7 * (recipe.training.steps / 100) ** -0.35 + off + recipe.training.seed % 2 / 1e3
        rows = [{"step": s, "step_seconds": 0.5} for s in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = {"thinking": [{"steps": 1, "loss": loss}], "trained_steps": 1, "step": recipe.training.steps}
        write_whole(folder / "evaluation.json", json.dumps(found))  # as the command does: others look meanwhile
        return {}, []


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def conduct(path, tmp_path, *options):
    return CliRunner().invoke(command_app(), [str(path), "--runs", str(tmp_path / "runs"), *options])


def command_app():
    import typer

    app = typer.Typer()
    app.command()(command.main)
    return app


RATES = [0.5, 1, 2]


def test_every_cell_tries_the_same_learning_rates_and_keeps_its_best(machine, shards, tmp_path):
    study = plan(tmp_path, data=str(shards), learning_rates=RATES, seeds=3)
    runner = Runner(study, tmp_path / "runs", workers=2)
    assert runner.others() == [], "before the trials"
    runner.do_all()
    assert len(machine.trained) == len(set(machine.trained)) == 8 * (3 + 2) == 8 * study.runs_of_a_cell
    found = {(job.cell.model, job.factor) for job, _ in runner.finished()}
    assert found == {("EBT", 2), ("T", 1)}
    assert len(runner.finished()) == 8 * 3


def test_what_fails_is_tried_again_and_then_left_to_the_next_time(machine, shards, tmp_path):
    path = written(tmp_path, data=str(shards))
    machine.trouble = {"ebt-200000-0": [RuntimeError("once")], "t-400000-1": [RuntimeError("a"), RuntimeError("b")]}
    answer = conduct(path, tmp_path)
    assert answer.exit_code == 1 and "t-400000-1" in answer.stderr and "ebt" not in answer.stderr
    assert sorted(machine.trained).count("ebt-200000-0") == 2 and len(set(machine.trained)) == 16
    machine.trained.clear()
    assert conduct(path, tmp_path).exit_code == 0 and machine.trained == ["t-400000-1"]


def test_a_study_told_to_end_comes_to_the_same_table_and_repeats_nothing(machine, shards, tmp_path):
    path = written(tmp_path, data=str(shards))
    machine.trouble = {"ebt-400000-0": [Stopped("told to")], "t-100000-1": [Stopped("told to")]}
    codes = [conduct(path, tmp_path, "--output", str(tmp_path / "out")).exit_code for _ in range(4)]
    assert codes == [130, 130, 0, 0]
    assert len(machine.trained) == 16 + 2
    lines = (tmp_path / "runs/s/s.jsonl").read_text().splitlines()
    assert len(lines) == 16 and json.loads(lines[0])["model"] == "EBT"
    (text,) = (file.read_text() for file in (tmp_path / "out").glob("s-cpu-*.md"))
    assert "Over T's, 95 % interval; the paper's rate is 1.36" in text and "| tokens | EBT |" in text
    assert next((tmp_path / "out").glob("s-cpu-*.png")).stat().st_size > 1000


def test_a_run_in_use_is_waited_for(machine, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_LOOK_SECONDS", 0.05)
    runner = Runner(plan(tmp_path, data=str(shards)), tmp_path / "runs")
    job = runner.plan.first()[0]
    code = (
        "import sys, time; from pathlib import Path; from ebt_megatron.training.lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire(); print(flush=True); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(runner.folder / job.name)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        runner.do([job])
        assert other.poll() is not None or other.wait(0.5) == 0
    assert runner.evaluation(job)


def test_the_plan_says_what_is_left_and_how_long_it_takes_as_measured(machine, shards, tmp_path):
    path = written(tmp_path, data=str(shards), learning_rates=RATES)
    before = conduct(path, tmp_path, "--dry-run")
    assert before.exit_code == 0 and machine.trained == []
    assert "0 of 32 runs done" in before.stdout and "- h of training" in before.stdout, "nothing is invented"
    runner = Runner(Plan.read(path), tmp_path / "runs/s", workers=2)
    runner.do(runner.plan.first()[:6])  # both models' first value
    steps = {cell: runner.recipe(Job(cell, 0, 1)).training.steps for cell in runner.plan.cells}
    seconds = sum(0.5 * 4 * n for n in steps.values()) - 6 * 0.5 * steps[runner.plan.cells[0]]
    after = conduct(path, tmp_path, "--dry-run", "--workers", "2")
    assert f"6 of 32 runs done; left with 2 at a time: {seconds / 2 / 3600:.2f} h" in after.stdout
    assert "of them with the others" in after.stdout and "36 %: can" in after.stdout.replace("35.98", "36")


TRAINING = """
import json, os, sys, time
from pathlib import Path
from ebt_megatron.core.files import write_whole
from ebt_megatron.training.lock import RunLock

folder, value, steps = Path(sys.argv[1]), float(sys.argv[2]), 30
lock, at = RunLock(folder), folder / "at"
lock.acquire()
for step in range(int(at.read_text()) if at.exists() else 0, steps):
    time.sleep(0.01)
    write_whole(at, str(step + 1))
lock.release()
write_whole(folder / "evaluation.json", json.dumps({"thinking": [{"steps": 1, "loss": value}], "trained_steps": 1}))
"""


def test_killed_ten_times_a_study_comes_to_the_rows_of_an_undisturbed_one(shards, tmp_path, monkeypatch):
    """Trainings are small processes that go on where they were, as real ones do, and outlive who started them."""
    monkeypatch.setattr(runs, "_LOOK_SECONDS", 0.05)

    def train(recipe):
        lr, steps, seed = recipe.optimizer.lr, recipe.training.steps, recipe.training.seed
        loss = 2.0 + 1.7 * (steps / 100) ** -0.35 + 0.01 * abs(np.log(lr / 3e-3)) + seed % 2 / 1e3
        line = [sys.executable, "-W", "ignore", "-c", TRAINING, recipe.training.output_dir, str(loss)]
        subprocess.run(line, check=True, cwd=ROOT)
        return {}, []

    monkeypatch.setattr(runs, "train", train)
    path, chance = written(tmp_path, data=str(shards), learning_rates=[1, 2]), random.Random(0)
    runner, ended = Runner(Plan.read(path), tmp_path / "killed/s", workers=3), []
    for job in (Job(cell, seed, factor) for cell in runner.plan.cells for seed in (0, 1) for factor in (1, 2)):
        runner.recipe(job)  # before the forks, so that these train at once

    def steps():
        return sum(int(path.read_text()) for path in runner.folder.glob("*/at"))

    for kill in range(10):
        until, child = steps() + 1 + chance.randrange(20), os.fork()
        if not child:
            time.sleep(0.05)  # its trainings are to be of its own group
            runner.do_all()
            os._exit(0)
        os.setpgid(child, child)
        while steps() < until and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.005)
        if kill % 2:
            os.kill(child, signal.SIGKILL)  # its trainings go on, also after the last
        else:
            os.killpg(child, signal.SIGKILL)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert ended == [-signal.SIGKILL] * 10, "the study was over too soon"
    tables = []
    for name in ("killed", "plain"):
        runner = Runner(Plan.read(path), tmp_path / name / "s", workers=3)
        runner.do_all()
        assert not runner.failed
        tables.append([report.row(runner.plan, job, runner.recipe(job), found) for job, found in runner.finished()])
    assert tables[0] == tables[1] and len(tables[0]) == 16


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Stands for Slurm: notes what is submitted, and numbers it."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/sbatch"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "$(wc -l < {tmp_path}/asked);cluster"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_slurm_gets_what_is_missing_and_half_a_study_may_be_done_here(machine, sbatch, shards, tmp_path):
    path = written(tmp_path, data=str(shards), learning_rates=RATES)
    runner = Runner(Plan.read(path), tmp_path / "runs/s")
    first = runner.plan.first()
    runner.do([*first[:2], first[7]])
    assert conduct(path, tmp_path, "--slurm").stdout == "submitted: 1, 2\n"
    trials, others = sbatch.read_text().splitlines()
    tail = f"{slurm.SCRIPT} {path} --runs {tmp_path / 'runs'}"
    assert trials == f"--parsable --array=2-6,8-23 {tail}"
    assert others == f"--parsable --array=24-31 --dependency=afterany:1 {tail}"
    too_early = conduct(path, tmp_path, "--index", "24")
    assert too_early.exit_code == 2 and machine.trained[3:] == []
    assert conduct(path, tmp_path, "--index", "2").exit_code == 0
    for index in [*range(3, 7), *range(8, 31)]:  # what the arrays' other tasks do
        runner.do([slurm.job_of(runner, index)])
    assert conduct(path, tmp_path, "--index", "31").exit_code == 0
    assert len(machine.trained) == len(set(machine.trained)) == 32
    assert conduct(path, tmp_path, "--slurm").stdout == "nothing is missing\n"
    assert conduct(path, tmp_path).exit_code == 0 and len(machine.trained) == 32
    assert conduct(path, tmp_path, "--index", "32").exit_code == 2


def test_slurms_script_does_the_run_of_its_index(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    answer = subprocess.run(
        ["bash", slurm.SCRIPT, "study.yaml", "--runs", "r"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python), "SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "-m benchmarks.scaling study.yaml --runs r --index 7\n"


def test_without_slurm_it_says_so(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conduct(written(tmp_path, data=str(shards)), tmp_path, "--slurm").exit_code == 2


# --- what the runs come to ------------------------------------------------------------------------

LAWS = {"T": Law(2.0, (1.7,), (0.35,)), "EBT": Law(2.0, (1.8,), (0.5,))}


def rows(noise=0.0):
    draw, out = np.random.default_rng(0), []
    for model, law in LAWS.items():
        for x in np.geomspace(1e5, 6.4e6, 7).repeat(3):
            loss = float(law(np.array([x / 1e5]))[0] * np.exp(draw.normal(0, noise)))
            out.append({"model": model, "value": x, "tokens": x, "loss": loss})
    return out


def test_fits_ratios_and_the_largest_run_predicted():
    found = report.fitted(rows(0.002), "T", "tokens")
    assert found["fits"]["T"]["exponents"][0] == pytest.approx(0.35, rel=0.1)
    assert found["fits"]["EBT"]["predicted"] == pytest.approx(found["fits"]["EBT"]["held out"], abs=0.02)
    shared = found["ratios"]["EBT"]["shared"]["exponents"][0]
    assert shared["low"] < 0.5 / 0.35 < shared["high"] and shared["low"] > 1


def test_a_study_with_several_budgets_is_fitted_over_both_axes_by_layers_and_by_all_weights(tmp_path):
    study = plan(tmp_path, axis="width", values=[32, 64, 96, 192], tokens=[1e5, 4e5, 1.6e6, 6.4e6], seeds=1)
    laws = {"T": Law(1.5, (1.0, 1.2), (0.3, 0.45)), "EBT": Law(1.5, (1.0, 1.2), (0.3, 0.6))}
    found = []
    for cell in study.cells:
        x = np.array([[cell.value**2 / 32**2, cell.tokens / 1e5]])
        weights = {"layers": cell.value**2, "parameters": cell.value**2 + 2048 * cell.value}
        row = {"model": cell.model, "value": cell.value, "tokens": cell.tokens, "loss": laws[cell.model](x).item()}
        found.append(row | weights)
    results = report.results(study, found)
    assert list(results["x"]) == ["layers", "parameters"]
    assert results["x"]["layers"]["fits"]["EBT"]["exponents"] == pytest.approx([0.3, 0.6], rel=1e-2)
    ratio = results["x"]["layers"]["ratios"]["EBT"]["shared"]["exponents"]
    assert [of["value"] for of in ratio] == pytest.approx([1, 0.6 / 0.45], rel=1e-2)
    text = "".join(table.markdown() for table in report.tables(study, results))
    assert "0.300 and 0.600" in text and "all weights" in text
    assert report.plot(study, results)[:4] == b"\x89PNG"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_here_are_studies(path):
    study = Plan.read(path)
    assert study.name == f"scaling-{path.stem}" and len(study.models) == 3
    if path.stem in ("data", "width"):
        assert study.seeds >= 3
