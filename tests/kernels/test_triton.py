"""The Triton kernels give the reference's results in Triton's interpreter, and compile for a GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.cases import slow

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    """In a process of its own: triton decides at import whether it interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    "family",
    ["elementwise", *map(slow, ("attention 64", "attention 128", "attention 256", "vocabulary"))],
)
def test_kernels_compile_for_a_gpu(family, tmp_path):
    """Without one: the compiler sees types that change in a loop, and shapes that are no constants."""
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--family", family, "--output", str(tmp_path)]
    run = subprocess.run(
        [*command, "--capability", "90"],
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (written,) = tmp_path.glob("*.json")
    rows = json.loads(written.read_text())["rows"]
    assert rows and all(0 < row["registers"] <= 255 and row["warps a multiprocessor"] for row in rows)
