"""Validate the kernels on one GPU against float64, then time them against plain torch and the roofline.

On a CPU machine it checks a tiny case in Triton's interpreter, and the tables say "not measured".

    python -m benchmarks.gpu_validate            # writes benchmarks/results/kernels-<device>-<date>.{json,md}
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from ebt_megatron import kernels
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.files import write_whole
from ebt_megatron.kernels import check

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() >= (9, 0)  # or later: fp8 products by row
DEVICE = "cuda" if GPU else "cpu"
VOCABULARY_SIZE = (1024, 50304, 768)  # tokens, columns, width of the timed calls
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def cases() -> list[check.Case]:
    """The calls to check: heads of 32 to 256 and odd sizes on a GPU, one tiny shape elsewhere."""
    shapes = [(257, 2, 4, 2, 64), (130, 1, 2, 2, 32), (200, 1, 2, 1, 128), (100, 1, 2, 2, 256), (77, 1, 2, 1, 80)]
    out = []
    for shape in shapes if GPU else [(20, 1, 2, 1, 16)]:
        for tangent in (False, True):
            for documents in (False, True):
                out.append(check.attention_case("prediction_attention", *shape, tangent, documents))
            out.append(check.attention_case("full_attention", *shape, tangent))
        for documents in (False, True):
            out.append(check.attention_case("context_attention", *shape, False, documents))
    for op in ("rms_norm", "swiglu", "layer_norm", "gelu"):
        out += [check.elementwise_case(op, 17, 3, 384 if GPU else 24, tangent) for tangent in (False, True)]
    out += [check.heads_case(17, 3, 2, queries, 80 if GPU else 8) for queries in (1, 3)]
    if GPU:  # the interpreter rounds to 8 bits wrongly
        out += [check.rounding_case(300, 520, transposed) for transposed in (False, True)]
    size = (300, 9000, 8990, 64) if GPU else (5, 40, 37, 8)
    return out + [check.vocab_case(op, *size) for op in check.VOCAB_OPERATIONS]


def checked(measure: Callable[[], float], limit: float) -> dict[str, Any]:
    """An error and whether it is within the limit; infinite, with a note, where compiler or device give up."""
    try:
        error, note = measure(), {}
    except Exception as raised:  # Triton, CUDA and torch have each their own; the other rows are wanted all the same
        error, note = math.inf, {"note": f"{type(raised).__name__}: {raised}".splitlines()[0][:200]}
    return {"error": error, "passed": error <= limit, **note}


def _worst_error(backend: kernels.Kernels, case: check.Case, dtype: torch.dtype) -> float:
    return max(check.errors(backend, case, dtype, DEVICE).values())


def correctness() -> list[dict[str, Any]]:
    """Worst relative error of each operation and dtype, over all results and gradients."""
    backend = kernels.select("triton")
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for dtype in TOLERANCE if GPU else [torch.float32]:  # the interpreter has no bfloat16 products
        for case in cases():
            tangent = " + tangent" if case.kwargs.get("tangent") else ""
            key = (case.op + tangent, str(dtype).removeprefix("torch."))
            row = checked(functools.partial(_worst_error, backend, case, dtype), TOLERANCE[dtype])
            worst[key] = max(worst.get(key, row), row, key=lambda r: r["error"])
    return [{"operation": op, "dtype": dtype, **row} for (op, dtype), row in worst.items()]


def seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the GPU, after three calls to warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def device_rates() -> dict[str, float]:
    """What this GPU reaches: bf16 matrix products [FLOP/s] and copies [bytes/s, read + written]."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 28, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return {
        "matrix_flops": 2 * 8192**3 / seconds(lambda: a @ b),
        "copy_bytes": 2 * source.numel() * 2 / seconds(lambda: target.copy_(source)),
    }


def _attention_calls(length: int, size: int) -> dict[str, Callable[[], Any]]:
    """The four passes of training (value and tangent, forward and backward), ours and double backward."""
    case = check.attention_case("prediction_attention", length, 1, 2048 // size, 2048 // size, size, True)
    stacked = [a.to(DEVICE, torch.bfloat16).requires_grad_() for a in case.args]
    own = [a.chunk(2, 1)[0].detach().requires_grad_() for a in stacked[:3]] + stacked[3:]
    proposing = own[:3] + [a.detach() for a in stacked[3:]]  # keys and values need no gradient then

    def fresh(backend: kernels.Kernels) -> None:
        value = backend.prediction_attention(*proposing, tangent=False)
        torch.autograd.grad(value, proposing[:3], torch.ones_like(value))
        both = backend.prediction_attention(*stacked, tangent=True)
        torch.autograd.grad(both, stacked, torch.ones_like(both))

    def double_backward() -> None:
        value = kernels.select("reference").prediction_attention(*own, tangent=False)
        first = torch.autograd.grad(value, own[:3], torch.ones_like(value), create_graph=True)
        torch.autograd.grad(first, own, [torch.ones_like(g) for g in first])

    return {"triton": lambda: fresh(kernels.select("triton")), "double backward": double_backward}


def attention_speed(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Prediction attention, all four passes: time, and the share of the measured matrix rate.

    FLOPs over causal scores, 2 S^2/2 H per product and head: forward 2 products, backward to
    the queries 3, forward with tangent 4, backward with tangent 4 + 6 (4 to form the slopes,
    2 for queries, 4 for keys and values).
    """
    rows = []
    for length, size in ((1024, 64), (4096, 64), (1024, 128), (4096, 128)):
        flops = (2 + 3 + 4 + 10) * length**2 * 2048
        for name, call in _attention_calls(length, size).items():
            torch.cuda.reset_peak_memory_stats()
            try:
                time_taken = seconds(call)
            except torch.cuda.OutOfMemoryError:
                rows.append({"length": length, "head size": size, "engine": name, "out of memory": True})
                continue
            rows.append(
                {
                    "length": length,
                    "head size": size,
                    "engine": name,
                    "milliseconds": time_taken * 1e3,
                    "share of matrix rate": flops / time_taken / rates["matrix_flops"],
                    "peak GB": torch.cuda.max_memory_allocated() / 1e9,
                }
            )
    return rows


def elementwise_speed(rates: dict[str, float]) -> list[dict[str, Any]]:
    """RMSNorm, SwiGLU and heads of value and tangent against the time to copy what they must read and write."""
    rows, backend = [], kernels.select("triton")
    x = torch.randn(4096, 8, 2048, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(2048, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    norm = functools.partial(backend.rms_norm, x, weight, 1e-5, tangent=True)
    gate = functools.partial(backend.swiglu, x, 128, tangent=True)
    table = torch.ones(4096, 64, 2, device=DEVICE)
    heads = functools.partial(backend.split_heads, x, table, 4, 128)  # 8 queries, 4 keys, 4 values
    # Bytes moved, in sizes of x: forward reads x and writes y; backward reads dy (and x) and writes dx.
    for name, call, there, back in (("rms_norm", norm, 2, 3), ("swiglu", gate, 1.5, 2.5), ("split_heads", heads, 2, 2)):
        out = call()
        ones = [torch.ones_like(o) for o in out] if isinstance(out, tuple) else torch.ones_like(out)
        backward = functools.partial(torch.autograd.grad, out, [x], ones, retain_graph=True)
        for part, timed, moved in (("forward", call, there), ("backward", backward, back)):
            time_taken = seconds(timed)
            rows.append(
                {
                    "operation": f"{name}, {part}",
                    "milliseconds": time_taken * 1e3,
                    "share of copy rate": moved * x.numel() * 2 / time_taken / rates["copy_bytes"],
                }
            )
    return rows


# --- the whole model -----------------------------------------------------------------------------


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(None, list(overrides))


def whole_model_error(precision: str, *overrides: str) -> float:
    """|gradient - reference| / |reference| over all parameters of a small EBT.

    The reference is double backward in float64, plain torch, on the same weights.

    Args:
        precision: "fp32", "bf16" or "fp8", of the model under test.
        overrides: of the recipe.
    """
    from ebt_megatron.core.timing import Timers
    from ebt_megatron.data.loader import MicroBatch
    from ebt_megatron.objectives import build_objective
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.tasks.build import build_model
    from ebt_megatron.tasks.text import Text

    size = (
        [
            "model.num_layers=3",
            "model.num_attention_heads=4",
            "model.num_query_groups=2",
            "optimizer.lr=1e-3",
            "model.hidden_size=128",
            "data.sequence_length=65",
            "training.micro_batch_size=2",
            "training.global_batch_size=2",
            "thinking.step_size=5",
        ]
        if GPU
        else [
            "model.num_layers=1",
            "model.num_attention_heads=2",
            "optimizer.lr=1e-3",
            "model.hidden_size=16",
            "data.sequence_length=9",
            "training.micro_batch_size=1",
            "training.global_batch_size=1",
            "thinking.step_size=5",
        ]
    )
    vocab = 1013 if GPU else 37
    tested = _recipe(*size, *overrides, f"training.precision={precision}", "model.kernels=triton")
    judge = _recipe(
        *size,
        *overrides,
        "thinking.engine=double_backward",
        "model.kernels=reference",
        "thinking.regenerate=0",
        "training.cuda_graphs=false",
    )
    shape = tested.training.micro_batch_size, tested.data.sequence_length + 1
    tokens = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))
    state = initialize(tested.parallel, tested.training.seed)
    models = [build_model(r, Text(r, vocab)).to(state.device) for r in (tested, judge)]
    models[1].double()
    with torch.no_grad():
        for ours, exact in zip(models[0].parameters(), models[1].parameters(), strict=True):
            exact.copy_(ours)
    gradients = []
    for model, recipe in zip(models, (tested, judge), strict=True):
        batch = MicroBatch(torch.arange(shape[0]), tokens)
        objective = build_objective(model, recipe, Text(recipe, vocab), state, Timers())
        for _ in range(3 if recipe.training.cuda_graphs else 1):  # run, record, replay
            model.zero_grad(set_to_none=False)
            objective.train_batch([batch], 0)
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def whole_model() -> list[dict[str, Any]]:
    """Gradients of a whole training step, for each way of learning."""
    # Activations are rounded in every layer and step. In fp8 a CPU is 0.33 to 0.35 off.
    limits = {"fp32": 1e-4, "bf16": 0.1, "fp8": 0.5}
    precisions = [p for p in limits if p == "fp32" or (GPU and (p != "fp8" or HOPPER))]
    rows = []
    ways = {
        "S1": [],
        "S1, reuse": ["thinking.reuse=true"],
        "S1, regenerated logits": ["thinking.regenerate=5"],
        "through every step": ["thinking.gradient=full"],
    }
    if GPU:
        ways["S1, reuse, CUDA graph"] = ["thinking.reuse=true", "training.cuda_graphs=true"]
    for name, overrides in ways.items():
        for precision in precisions:
            measure = functools.partial(whole_model_error, precision, *overrides)
            rows.append(
                {"operation": f"whole model, {name}", "dtype": precision, **checked(measure, limits[precision])}
            )
    return rows


def training_speed(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Whole training steps in bf16 against double backward and Transformer++, as far as minutes and memory go."""
    import gc

    from benchmarks.step import median_seconds, training_step
    from ebt_megatron.model.flops import cost
    from ebt_megatron.objectives.flops import minimum_flops

    vocab, rows, begin = 50304, [], time.monotonic()
    engines = {
        "dual stream": [],
        "dual stream, reuse": ["thinking.reuse=true"],
        **({"dual stream, reuse, fp8": ["thinking.reuse=true", "training.precision=fp8"]} if HOPPER else {}),
        "dual stream, reuse, CUDA graph": ["thinking.reuse=true", "training.cuda_graphs=true"],
        "double backward": ["thinking.engine=double_backward"],
        "Transformer++": ["model.architecture=baseline"],
        "Transformer++, CUDA graph": ["model.architecture=baseline", "training.cuda_graphs=true"],
    }
    for size in ("xxs", "small", "medium"):
        for length in (256, 1024, 4096):
            batch = max(1, 4096 // length)
            for name, overrides in engines.items():
                row: dict[str, Any] = {"size": size, "S": length, "batch": batch, "engine": name}
                rows.append(row)
                if time.monotonic() - begin > 240:
                    row["note"] = "not measured: out of time"
                    continue
                recipe = _recipe(
                    f"model.size={size}",
                    f"data.sequence_length={length}",
                    "training.precision=bf16",
                    f"training.micro_batch_size={batch}",
                    f"training.global_batch_size={batch}",
                    *overrides,
                )
                step: Callable[[int], float] | None = None
                try:
                    step = training_step(recipe, vocab)
                    base = torch.cuda.memory_allocated()
                    step(0)  # kernels are compiled
                    torch.cuda.reset_peak_memory_stats()
                    row["milliseconds"] = median_seconds(step, range(1, 6)) * 1e3
                    row["step GB"] = (torch.cuda.max_memory_allocated() - base) / 1e9
                    if recipe.model.architecture == "ebt":
                        flops = batch * minimum_flops(recipe, cost(recipe, vocab))
                        row["minimum FLOPs, share of matrix rate"] = (
                            flops / row["milliseconds"] * 1e3 / rates["matrix_flops"]
                        )
                except torch.cuda.OutOfMemoryError:
                    row["note"] = "out of memory"
                except RuntimeError as error:
                    row["note"] = f"failed: {str(error).splitlines()[0][:200]}"
                step = None  # its model goes
                gc.collect()
                torch.cuda.empty_cache()
    for row in rows:
        judge = next(
            (
                r
                for r in rows
                if r["engine"] == "double backward"
                and "milliseconds" in r
                and (r["size"], r["S"]) == (row["size"], row["S"])
            ),
            None,
        )
        if judge and "milliseconds" in row:
            row["faster than double backward"] = judge["milliseconds"] / row["milliseconds"]
            row["its memory"] = row["step GB"] / judge["step GB"]
    return rows


def vocabulary_speed(rates: dict[str, float]) -> list[dict[str, Any]]:
    """The vocabulary's passes (bf16 table), against their matrix products at the measured rate."""
    backend, rows = kernels.select("triton"), []
    tokens, columns, width = VOCABULARY_SIZE
    for op, products in (("vocab_embed", 1), ("vocab_refine", 2), ("vocab_backward", 3), ("vocab_backward, kept", 2)):
        case = check.vocab_case(op, tokens, columns, columns, width)
        args = check.arguments(case, torch.bfloat16, DEVICE)
        time_taken = seconds(functools.partial(getattr(backend, case.op), *args), 5)
        flops = products * 2 * tokens * columns * width
        rows.append(
            {
                "operation": op,
                "milliseconds": time_taken * 1e3,
                "share of matrix rate": flops / time_taken / rates["matrix_flops"],
            }
        )
    return rows


# Every benchmark takes the measured rates and returns rows of a table.
BENCHMARKS: dict[str, Callable[[dict[str, float]], list[dict[str, Any]]]] = {
    "Prediction attention: forward, backward, and both with tangent (bf16, 2048 columns)": attention_speed,
    "Elementwise, value and tangent (bf16)": elementwise_speed,
    f"Vocabulary: {VOCABULARY_SIZE[0]} tokens, {VOCABULARY_SIZE[1]} columns (bf16 table)": vocabulary_speed,
    "Training steps (bf16, V = 50,304, 2 thinking steps)": training_speed,
}


def _markdown(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "not measured"
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(r.get(c, "")) for c in columns) + " |" for r in rows])


def main() -> int:
    """Run everything, write the results; 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    options = parser.parse_args()
    begin = time.monotonic()
    device = torch.cuda.get_device_name() if GPU else "CPU interpreter"
    import triton

    result: dict[str, Any] = {
        "device": device,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "correctness": correctness() + whole_model(),
    }
    failed = [r for r in result["correctness"] if not r["passed"]]
    result["rates"] = device_rates() if GPU else {}
    result["benchmarks"] = {name: run(result["rates"]) if GPU else [] for name, run in BENCHMARKS.items()}
    result["seconds"] = time.monotonic() - begin
    facts = ", ".join(f"{k} {result[k]}" for k in ("device", "date", "torch", "triton", "cuda", "python"))
    parts = [
        f"# Kernels on {device}",
        facts,
        "## Largest relative error against float64",
        _markdown(result["correctness"]),
        "## Measured rates",
        _markdown([result["rates"]] if GPU else []),
    ]
    for name, rows in result["benchmarks"].items():
        parts += [f"## {name}", _markdown(rows)]
    text = "\n\n".join(parts) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    slug = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    stem = options.output / f"kernels-{slug}-{result['date']}"
    write_whole(stem.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(stem.with_suffix(".md"), text)
    print(text)
    print(f"{len(failed)} of {len(result['correctness'])} checks failed; written to {stem}.json and .md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
