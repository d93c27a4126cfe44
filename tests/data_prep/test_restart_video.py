"""Video preparation killed three times gives the bytes of an undisturbed run, whatever the number of processes."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_prep.media import contents, write_videos
from tests.data_prep.test_restart import MPIRUN, ROOT, environment, kill

pytest.importorskip("av")
KILLS = 3


def launch(workers, source, output, launcher=()):
    command = [
        *launcher,
        sys.executable,
        "-m",
        "ebt_megatron.data_prep.video",
        "--input",
        source,
        "--output",
        output,
        "--height",
        48,
        "--width",
        64,
        "--frames",
        4,
        "--clips-per-shard",
        16,
        "--validation-fraction",
        0.3,
        "--workers",
        workers,
        "--resume",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(c) for c in command], env=environment(output.parent), cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("raw"), count=16, frames=120)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    begin = time.perf_counter()
    process = launch(1, source, output)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return contents(output), time.perf_counter() - begin


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_three_times(workers, source, undisturbed, tmp_path):
    expected, seconds = undisturbed
    generator, kills, finished = random.Random(workers), 0, 0
    while kills < KILLS:
        process = launch(workers, source, tmp_path / "out")
        try:
            process.wait(generator.uniform(0.4, 0.4 + 0.8 * seconds))
            finished += 1
            assert process.returncode == 0, process.communicate()[0]
            shutil.rmtree(tmp_path / "out")  # it was too quick for us: from the start, until killed often enough
            assert finished < 3 * KILLS
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
    process = launch(workers, source, tmp_path / "out")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert contents(tmp_path / "out") == expected


def test_two_mpi_ranks_give_the_same_bytes(source, undisturbed, tmp_path):
    if not (shutil.which("mpirun") or (Path(sys.executable).parent / "mpirun").exists()):
        pytest.skip("no mpirun")
    process = launch(1, source, tmp_path / "out", MPIRUN)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert contents(tmp_path / "out") == undisturbed[0]
