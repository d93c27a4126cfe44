"""The first hour on a GPU: pieces that end, go on where they stopped, and say what is wrong; here, without a GPU."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("triton")


@pytest.fixture
def validate(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the module sets it; this puts it back
    from benchmarks import gpu_validate

    return gpu_validate


def test_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_validate", "--output", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    pieces = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    assert all(piece["done"] for piece in pieces.values())
    kernels, whole = (pieces[name]["rows"] for name in ("kernels float32", "gradients"))
    assert len(kernels) >= 20 and all(row["error"] <= 1e-5 for row in kernels)
    ways = {row["operation"].removeprefix("whole model, "): row["error"] for row in whole}
    assert {"S1", "S1, reuse", "S1, regenerated logits", "through every step", "from its context"} == set(ways)
    assert max(ways.values()) <= 1e-4
    assert not any(piece["rows"] for name, piece in pieces.items() if name not in ("kernels float32", "gradients"))
    text = next(tmp_path.glob("*.md")).read_text()
    assert "## generation" in text and text.count("not measured") == len(pieces) - 2


def test_what_cannot_run_is_a_failed_row_and_the_others_are_checked(validate, monkeypatch):
    import torch

    from benchmarks.gpu import checks
    from ebt_megatron.kernels import check

    def errors(backend, case, dtype, device):
        if case.op == "vocab_embed":
            raise RuntimeError("no such instruction\nand much more")
        return {"output 0": math.nan if case.op == "vocab_update" else 1e-6}

    operations = ("vocab_embed", "vocab_update", "vocab_refine")
    monkeypatch.setattr(checks, "cases", lambda: [check.vocab_case(op, 2, 5, 5, 2) for op in operations])
    monkeypatch.setattr(check, "errors", errors)
    monkeypatch.setattr(checks.kernels, "select", lambda name: None)  # this process's kernels stay compiled ones
    rows = list(checks.kernels_right(torch.float32))
    assert [(row["operation"], row["passed"]) for row in rows] == list(
        zip(operations, (False, False, True), strict=True)
    )
    assert rows[0]["note"] == "RuntimeError: no such instruction" and rows[0]["error"] == math.inf


def test_rows_are_written_as_they_come(validate, monkeypatch, tmp_path):
    path, seen = tmp_path / "piece.json", []

    def rows(piece):
        for i in range(3):
            seen.append(len(validate.read(path)["rows"]))
            yield {"i": i}

    monkeypatch.setattr(validate, "rows_of", rows)
    validate.run("gradients", path)
    assert seen == [0, 1, 2] and validate.read(path)["done"]


def test_a_piece_that_takes_too_long_is_stopped_and_said_to_be(validate, monkeypatch, tmp_path):
    monkeypatch.setattr(validate.sys, "executable", "/bin/sleep")  # its arguments are no times: it fails at once
    assert validate.run_apart("gradients", tmp_path / "piece.json", 5).startswith("ended with code 1")
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(validate.sys, "executable", str(script))
    begin = time.monotonic()
    assert validate.run_apart("gradients", tmp_path / "piece.json", 0.5) == "stopped after 0 s"
    assert time.monotonic() - begin < 30


def test_what_is_done_is_not_repeated_and_what_ended_badly_is(validate, monkeypatch, tmp_path):
    ran = []

    def run_apart(piece, path, limit):
        ran.append(piece)
        done = piece == "losses" or len(ran) > 2
        path.write_text(json.dumps({"done": done, "rows": [{"operation": "a", "passed": True}]}))
        return "" if done else "ended with code 1: no"

    monkeypatch.setattr(validate, "run_apart", run_apart)
    for wrong in (True, False):
        try:
            validate.main(["losses", "gradients"], False, 5, tmp_path, False)
            assert not wrong
        except (SystemExit, validate.typer.Exit):
            assert wrong
    assert ran == ["losses", "gradients", "gradients"]
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "| a | True |" in text
