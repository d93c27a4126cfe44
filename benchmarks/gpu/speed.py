"""How fast is it on this GPU? Kernels and whole steps beside flash attention, double backward and the roofline."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.checks import CONTEXT, DEVICE, HOPPER
from ebt_megatron import kernels
from ebt_megatron.config import load_recipe
from ebt_megatron.kernels import check

VOCABULARY_SIZE = (1024, 50304, 768)  # tokens, columns, width of the timed calls
Rates = dict[str, float]
Rows = Iterator[dict[str, Any]]


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


def _timed(call: Callable[[], Any], of: str, least: float) -> dict[str, Any]:
    """Milliseconds and peak memory of a call, and how near it is to the least time, or why there are no numbers.

    Args:
        call: what is timed.
        of: what the least time is of: "matrix rate" or "copy rate".
        least: seconds that the call would take at that rate.
    """
    torch.cuda.reset_peak_memory_stats()
    try:
        taken = seconds(call)
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    except RuntimeError as error:
        return {"note": f"failed: {str(error).splitlines()[0][:200]}"}
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"milliseconds": taken * 1e3, "peak GB": peak, f"share of {of}": least / taken}


def tangent_attention(rates: Rates) -> Rows:
    """Prediction attention, all four passes: time, and the share of the measured matrix rate.

    FLOPs over causal scores, 2 S^2/2 H per product and head: forward 2 products, backward to
    the queries 3, forward with tangent 4, backward with tangent 4 + 6 (4 to form the slopes,
    2 for queries, 4 for keys and values).
    """
    for length, size in ((1024, 64), (4096, 64), (1024, 128), (4096, 128)):
        flops = (2 + 3 + 4 + 10) * length**2 * 2048
        for name, call in _attention_calls(length, size).items():
            found = _timed(call, "matrix rate", flops / rates["matrix_flops"])
            yield {"length": length, "head size": size, "engine": name, **found}


def causal_attention(rates: Rates) -> Rows:
    """The context's attention, which is plain causal attention, forward and backward, beside torch's and flash-attn's.

    FLOPs over causal scores: forward 2 products, backward 5.
    """
    backend, batch = kernels.select("triton"), 4

    def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    engines: dict[str, Callable[..., torch.Tensor]] = {"triton": backend.context_attention, "torch": torchs}
    try:
        from flash_attn import flash_attn_func

        engines["flash-attn"] = lambda q, k, v: flash_attn_func(
            *(x.transpose(0, 1) for x in (q, k, v)), causal=True
        ).transpose(0, 1)
    except ImportError:
        pass
    for length, size in ((1024, 64), (4096, 64), (1024, 128), (4096, 128)):
        shape = length, batch, 2048 // size, size
        tensors = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        for name, engine in engines.items():
            out = engine(*tensors)
            backward = functools.partial(torch.autograd.grad, out, tensors, torch.ones_like(out), retain_graph=True)
            for part, call, products in (
                ("forward", functools.partial(engine, *tensors), 2),
                ("backward", backward, 5),
            ):
                flops = products * length**2 * batch * 2048
                found = _timed(call, "matrix rate", flops / rates["matrix_flops"])
                yield {"length": length, "head size": size, "engine": name, "part": part, **found}


def elementwise(rates: Rates) -> Rows:
    """RMSNorm, SwiGLU and heads of value and tangent against the time to copy what they must read and write."""
    backend = kernels.select("triton")
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
            found = _timed(timed, "copy rate", moved * x.numel() * 2 / rates["copy_bytes"])
            yield {"operation": f"{name}, {part}", **found}


def vocabulary(rates: Rates) -> Rows:
    """The vocabulary's passes (bf16 table), against their matrix products at the measured rate."""
    backend = kernels.select("triton")
    tokens, columns, width = VOCABULARY_SIZE
    for op, products in (("vocab_embed", 1), ("vocab_refine", 2), ("vocab_backward", 3), ("vocab_backward, kept", 2)):
        case = check.vocab_case(op, tokens, columns, columns, width)
        args = check.arguments(case, torch.bfloat16, DEVICE)
        flops = products * 2 * tokens * columns * width
        found = _timed(
            functools.partial(getattr(backend, case.op), *args), "matrix rate", flops / rates["matrix_flops"]
        )
        yield {"operation": op, **found}


_REUSE, _GRAPHS = "thinking.reuse=true", "training.cuda_graphs=true"
ENGINES = {
    "double backward": ["thinking.engine=double_backward"],
    "dual stream": [],
    "dual stream, reuse": [_REUSE],
    "dual stream, reuse, one of two losses drawn": [_REUSE, "thinking.learned_steps=1"],
    "dual stream, reuse, CUDA graph": [_REUSE, _GRAPHS],
    "dual stream, reuse, one step from the context": [
        *(_REUSE, "thinking.min_steps=1", "thinking.max_steps=1"),
        *CONTEXT,
    ],
    "Transformer++": ["model.architecture=baseline"],
    "Transformer++, CUDA graph": ["model.architecture=baseline", _GRAPHS],
}


def training(rates: Rates, size: str) -> Rows:
    """Whole training steps of a size in bf16 (and fp8), V = 50,304, two thinking steps unless it says so.

    Time, memory beyond the weights, the share of the matrix rate that the fewest FLOPs of a first-order method come to,
    and both beside double backward at the same length.
    """
    engines = ENGINES | ({"dual stream, reuse, fp8": [_REUSE, "training.precision=fp8"]} if HOPPER else {})
    for length in (256, 1024, 4096):
        batch, judge = max(1, 4096 // length), dict[str, Any]()
        for name, overrides in engines.items():
            row = {"S": length, "batch": batch, "engine": name, **_step(rates, size, length, batch, overrides)}
            if name == "double backward":
                judge = row
            elif "milliseconds" in row and "milliseconds" in judge:
                row["faster than double backward"] = judge["milliseconds"] / row["milliseconds"]
                row["its memory"] = row["step GB"] / judge["step GB"]
            yield row
            gc.collect()
            torch.cuda.empty_cache()


def _step(rates: Rates, size: str, length: int, batch: int, overrides: list[str]) -> dict[str, Any]:
    """Measure one training step, or say why there is no number."""
    from benchmarks.step import median_seconds, training_step
    from ebt_megatron.model.flops import cost
    from ebt_megatron.objectives.flops import minimum_flops

    columns = VOCABULARY_SIZE[1]
    batches = f"training.micro_batch_size={batch}", f"training.global_batch_size={batch}"
    sizes = f"model.size={size}", f"data.sequence_length={length}", "training.precision=bf16", *batches
    recipe = load_recipe(None, [*sizes, *overrides])
    try:
        step = training_step(recipe, columns)
        base = torch.cuda.memory_allocated()
        step(0)  # kernels are compiled
        torch.cuda.reset_peak_memory_stats()
        row = {"milliseconds": median_seconds(step, range(1, 6)) * 1e3}
        row["step GB"] = (torch.cuda.max_memory_allocated() - base) / 1e9
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    except RuntimeError as error:
        return {"note": f"failed: {str(error).splitlines()[0][:200]}"}
    if recipe.model.architecture == "ebt":
        flops = batch * minimum_flops(recipe, cost(recipe, columns))
        row["minimum FLOPs, share of matrix rate"] = flops / row["milliseconds"] * 1e3 / rates["matrix_flops"]
    return row


def generation(rates: Rates) -> Rows:
    """A new token of random weights (bf16, V = 50,304): its median time, by prefix and candidates."""
    from benchmarks.inference import measure

    for size in ("xxs", "wide"):
        for name, row in measure(size, steps=3, rounds=20)["tokens"].items():
            yield {"size": size, "what": name, "milliseconds": 1e3 * row["seconds"], "GFLOP": row["flops"] / 1e9}
