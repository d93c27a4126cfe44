"""Is it right on this device? Every kernel and dtype, whole gradients and losses, against float64 and the CPU.

On a CPU machine a tiny case runs in Triton's interpreter.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from ebt_megatron import kernels
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.kernels import check

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() >= (9, 0)  # or later: fp8 products by row
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_STEPS = 5  # optimizer steps whose losses are compared
_LOSSES = 1e-3  # of float32 on two devices, relative: sums have other orders
CONTEXT = ("thinking.initial=context", "thinking.step_rule=mirror_descent")


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


def kernels_right(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Worst relative error of each operation in a dtype, over all results and gradients of its cases."""
    if not GPU and dtype != torch.float32:  # the interpreter has no bfloat16 products
        return
    backend, by_operation = kernels.select("triton"), dict[str, list[check.Case]]()
    for case in cases():
        by_operation.setdefault(case.op + (" + tangent" if case.kwargs.get("tangent") else ""), []).append(case)
    for operation, of in by_operation.items():
        rows = [checked(functools.partial(_worst_error, backend, case, dtype), TOLERANCE[dtype]) for case in of]
        worst = max(rows, key=lambda row: row["error"] if row["error"] == row["error"] else math.inf)
        yield {"operation": operation, "dtype": str(dtype).removeprefix("torch."), **worst}


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


def whole_model() -> Iterator[dict[str, Any]]:
    """Gradients of a whole training step, for each way of learning."""
    # Activations are rounded in every layer and step. In fp8 a CPU is 0.33 to 0.35 off.
    limits = {"fp32": 1e-4, "bf16": 0.1, "fp8": 0.5}
    precisions = [p for p in limits if p == "fp32" or (GPU and (p != "fp8" or HOPPER))]
    ways = {
        "S1": [],
        "S1, reuse": ["thinking.reuse=true"],
        "S1, regenerated logits": ["thinking.regenerate=5"],
        "through every step": ["thinking.gradient=full"],
        "from its context": list(CONTEXT),
    }
    if GPU:
        ways["S1, reuse, CUDA graph"] = ["thinking.reuse=true", "training.cuda_graphs=true"]
    for name, overrides in ways.items():
        for precision in precisions:
            measure = functools.partial(whole_model_error, precision, *overrides)
            row = checked(measure, limits[precision])
            yield {"operation": f"whole model, {name}", "dtype": precision, **row}


# --- losses --------------------------------------------------------------------------------------

_TINY = (
    "model.size=tiny",
    "data.sequence_length=64",
    "training.global_batch_size=2",
    "training.micro_batch_size=2",
    "optimizer.warmup_steps=1",
)
_TRAINED = {
    "S1": (),
    "S1, reuse": ("thinking.reuse=true",),
    "EBT from its context": CONTEXT,
    "through every step": ("thinking.gradient=full",),
    "noise": ("thinking.initial_std=1", "thinking.langevin_noise=0.3"),
    "Transformer++": ("model.architecture=baseline",),
}


def losses() -> dict[str, list[float]]:
    """The losses of some optimizer steps of tiny models in fp32 on this process's device."""
    from ebt_megatron.data.loader import MicroBatch
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.training.trainer import Trainer

    vocabulary, out = 1000, dict[str, list[float]]()
    for name, overrides in _TRAINED.items():
        recipe = load_recipe(None, [*_TINY, *overrides])
        trainer = Trainer(recipe, Text(recipe, vocabulary), initialize(recipe.parallel, recipe.training.seed))
        out[name] = []
        for step in range(_STEPS):
            tokens = torch.randint(vocabulary, (2, 65), generator=torch.Generator().manual_seed(step))
            out[name].append(trainer.train_step([MicroBatch(torch.arange(2) + 2 * step, tokens)], step).loss)
    return out


def golden() -> Iterator[dict[str, Any]]:
    """Losses of training on this device beside the CPU's, in a process of its own, as the tests' golden numbers are."""
    if not GPU:
        return
    command = [sys.executable, "-W", "ignore", "-c", "import json; from benchmarks.gpu.checks import losses; "]
    command[-1] += "print(json.dumps(losses()))"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    expected = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    for name, found in losses().items():
        row: dict[str, Any] = {"operation": f"losses of {_STEPS} steps, {name}", "dtype": "fp32"}
        if name in expected:
            error = max(abs(a - b) / abs(b) for a, b in zip(found, expected[name], strict=True))
            yield row | {"error": error, "passed": error <= _LOSSES}
        else:
            yield row | {"error": math.inf, "passed": False, "note": done.stderr[-200:]}


def nccl() -> Iterator[dict[str, Any]]:
    """Every collective that training uses, by NCCL with one process: what comes out is what went in."""
    if not GPU:
        return
    import torch.distributed as dist

    from ebt_megatron.parallel.setup import initialize

    state = initialize(load_recipe(None, list(_TINY)).parallel, 1)
    x = torch.arange(12.0, device=DEVICE).view(3, 4)

    def same(collective: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
        out = x.clone()
        collective(out, x)
        return float((out - x).abs().max())

    collectives = {
        "all_reduce": lambda out, x: dist.all_reduce(out, group=state.data_group),
        "all_gather": lambda out, x: dist.all_gather_into_tensor(out, x, group=state.tensor_group),
        "reduce_scatter": lambda out, x: dist.reduce_scatter_tensor(out, x, group=state.tensor_group),
        "broadcast": lambda out, x: dist.broadcast(out, 0, group=state.pipeline_group),
        "all_to_all": lambda out, x: dist.all_to_all_single(out, x, group=state.tensor_group),
        "barrier": lambda out, x: dist.barrier(group=state.data_group),
    }
    for name, collective in collectives.items():
        row = checked(functools.partial(same, collective), 0.0)
        yield {"operation": f"{dist.get_backend(state.data_group)}, {name}", "dtype": "float32", **row}
