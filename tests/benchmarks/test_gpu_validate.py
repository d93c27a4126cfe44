"""The validation's tiny case passes without a GPU, and says what it has not measured."""

import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_validate", "--output", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    errors = {r["operation"]: r["error"] for r in result["correctness"]}
    assert all(e <= 1e-5 for name, e in errors.items() if "whole model" not in name)
    assert all(
        errors[f"whole model, {way}"] <= 1e-4
        for way in ("S1", "S1, reuse", "S1, regenerated logits", "through every step")
    )
    assert result["benchmarks"] and not any(result["benchmarks"].values())
    assert "not measured" in next(tmp_path.glob("*.md")).read_text()


def test_what_cannot_run_is_a_failed_row_and_the_others_are_checked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the module sets it; this puts it back
    from benchmarks import gpu_validate
    from ebt_megatron.kernels import check

    def errors(backend, case, dtype, device):
        if case.op == "vocab_embed":
            raise RuntimeError("no such instruction\nand much more")
        return {"output 0": math.nan if case.op == "vocab_update" else 1e-6}

    operations = ("vocab_embed", "vocab_update", "vocab_refine")
    cases = [check.vocab_case(op, 2, 5, 5, 2) for op in operations]
    monkeypatch.setattr(gpu_validate, "cases", lambda: cases)
    monkeypatch.setattr(check, "errors", errors)
    rows = gpu_validate.correctness()
    assert [(row["operation"], row["passed"]) for row in rows[:3]] == list(
        zip(operations, (False, False, True), strict=True)
    )
    assert rows[0]["note"] == "RuntimeError: no such instruction" and rows[0]["error"] == math.inf
