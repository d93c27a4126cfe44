"""Video preparation killed three times gives the bytes of an undisturbed run, whatever the number of processes."""

import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.cases import slow
from tests.data_prep.media import contents, write_videos
from tests.data_prep.test_restart import MPIRUN, complete, launch

pytest.importorskip("av")


def launch_video(workers, source, output, launcher=()):
    options = "--height 48 --width 64 --frames 4 --clips-per-shard 16 --validation-fraction 0.3"
    return launch("video", options, workers, source, output, launcher)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("raw"), count=16, frames=120)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    begin = time.perf_counter()
    process = launch_video(1, source, output)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return contents(output), time.perf_counter() - begin


@pytest.mark.parametrize("workers", [slow(1), 2])
def test_killed_three_times(workers, source, undisturbed, tmp_path):
    expected, seconds = undisturbed
    output = tmp_path / "out"
    complete(lambda: launch_video(workers, source, output), output, 3, random.Random(workers), seconds)
    assert contents(output) == expected


def test_two_mpi_ranks_give_the_same_bytes(source, undisturbed, tmp_path):
    if not (shutil.which("mpirun") or (Path(sys.executable).parent / "mpirun").exists()):
        pytest.skip("no mpirun")
    process = launch_video(1, source, tmp_path / "out", MPIRUN)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert contents(tmp_path / "out") == undisturbed[0]
