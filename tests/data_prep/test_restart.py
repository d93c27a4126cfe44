"""Preparation killed again and again gives the bytes of an undisturbed run, whatever the number of processes."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.cases import slow

ROOT = Path(__file__).parents[2]
MPIRUN = ["mpirun", "--oversubscribe", "--allow-run-as-root", "-n", "2"]
LAYOUTS = {"1 worker": ([], 1), "2 workers": ([], 2), "4 workers": ([], 4), "mpirun -n 2": (MPIRUN, 1)}


@pytest.fixture(autouse=True)
def ends(no_survivors):
    """mpirun's ranks end with the test."""


def environment(folder):
    """Of a process to launch; its temporary files go into a new folder of their own under `folder`.

    mpirun names its session's files by its process number, and stumbles over those that a killed one left.
    """
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return os.environ | paths | {"TMPDIR": tempfile.mkdtemp(dir=folder)}


def launch(module, options, workers, source, output, launcher=()):
    """Start a preparation, resumed where it has begun, as a process."""
    where = "--input", source, "--output", output, "--workers", workers, "--resume"
    command = [*launcher, sys.executable, "-m", f"ebt_megatron.data_prep.{module}", *options.split(), *where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(c) for c in command], env=environment(output.parent), cwd=ROOT, **pipes)


def launch_text(launcher, workers, source, output):
    options = "--train-bpe 400 --sequence-length 32 --samples-per-shard 128 --unit-megabytes 0.02"
    return launch("text", f"{options} --validation-fraction 0.1", workers, source, output, launcher)


def complete(start, output, kills, generator, seconds):
    """Kill what `start()` launches so often at random, then let it end.

    It runs at least for the start of the interpreter, so that some runs get further than the one before; one that
    is too quick for us is begun anew.
    """
    killed, finished = 0, 0
    while killed < kills:
        process = start()
        try:
            process.wait(generator.uniform(0.4, 0.4 + 0.75 * seconds))
            finished += 1
            assert process.returncode == 0, process.communicate()[0]
            shutil.rmtree(output)
            assert finished < 3 * kills
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
    process = start()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said


def kill(process):
    """SIGKILL to the process and everything it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family)


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    words = random.Random(1)
    for f in range(8):
        lines = [" ".join(f"word{words.randrange(3000)}" for _ in range(words.randrange(200))) for _ in range(100)]
        (folder / f"{f}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    begin = time.perf_counter()
    process = launch_text([], 1, source, output)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return digests(output), time.perf_counter() - begin


@pytest.mark.parametrize("limit", [3, slow(10)], ids="{} times".format)
@pytest.mark.parametrize("layout", [slow("1 worker"), "2 workers", slow("4 workers"), "mpirun -n 2"])
def test_killed_again_and_again(layout, limit, source, undisturbed, tmp_path):
    launcher, workers = LAYOUTS[layout]
    if launcher and not (shutil.which("mpirun") or (Path(sys.executable).parent / "mpirun").exists()):
        pytest.skip("no mpirun")
    expected, seconds = undisturbed
    output = tmp_path / "out"
    complete(lambda: launch_text(launcher, workers, source, output), output, limit, random.Random(layout), seconds)
    assert digests(output) == expected


def test_an_interrupted_preparation_is_not_mixed_with_another(source, tmp_path):
    process = launch_text([], 1, source, tmp_path / "out")
    while not list((tmp_path / "out/.work").glob("documents-*.npy")):
        time.sleep(0.01)
    kill(process)
    process = launch_text([], 1, source / "0.jsonl", tmp_path / "out")
    said = " ".join(process.communicate()[0].split())
    assert process.returncode == 2 and "of other input or made with other options" in said


def test_the_workers_of_a_killed_preparation_end(source, tmp_path):
    process = launch_text([], 2, source, tmp_path / "out")
    while not list((tmp_path / "out/.work").glob("documents-*.npy")):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=10)[1]
