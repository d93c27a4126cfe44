"""Compare a backend's operations with the float64 reference, gradients and in-place results included.

One generator of cases serves the tests and the validation on a GPU. It imports nothing
but torch and this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.kernels import select
from ebt_megatron.kernels.interface import Kernels, StepRule

reference = select("reference")


@dataclass
class Case:
    """One call of one operation.

    Attributes:
        op: the name of a field of `Kernels`.
        args, kwargs: what it is called with; floating-point tensors are float64.
        low: positions of the arguments that take the dtype under test; the others stay at
            least float32 (logits and per-token scalars do, in training too).
        learned: positions of the arguments whose gradients are compared.
        stored: positions of arguments that the reference too is given, and fills, in the dtype under test.
    """

    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    low: tuple[int, ...]
    learned: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()


def _randn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention_case(
    op: str,
    length: int,
    batch: int,
    heads: int,
    groups: int,
    size: int,
    tangent: bool,
    documents: bool = False,
    seed: int = 0,
    block: int = 1,
) -> Case:
    """Random heads for `prediction_attention`, `context_attention` or `full_attention`; `block` of the first two."""
    randn, streams = _randn(seed), batch * (2 if tangent else 1)
    segments = None
    if documents:
        generator = torch.Generator().manual_seed(seed)
        segments = (torch.rand(batch, length, generator=generator) < 0.2).cumsum(1).int()
    if op == "context_attention":
        args = [randn(length, batch, n, size) for n in (heads, groups, groups)]
        return Case(op, args, {"segments": segments, "block": block}, (0, 1, 2), (0, 1, 2))
    if op == "full_attention":
        mixed = [randn(length, streams, heads * 3 * size), randn(heads * 3 * size)]
        return Case(op, [*mixed, size], {"tangent": tangent}, (0, 1), (0, 1))
    args = [randn(length, streams, n, size) for n in (heads, groups, groups)]
    args += [randn(length, batch, groups, size) for _ in range(2)]
    every = tuple(range(5))
    return Case(op, args, {"tangent": tangent, "segments": segments, "block": block}, every, every)


def cached_case(
    queries: int, keys: int, batch: int, heads: int, groups: int, size: int, own: bool, seed: int = 0
) -> Case:
    """Random heads for `cached_attention`; every query sees the first key at least."""
    randn, generator = _randn(seed), torch.Generator().manual_seed(seed)
    seen = torch.rand(batch, queries, keys, generator=generator) < 0.6
    seen[:, :, 0] = True
    args: list[Any] = [randn(batch, queries, heads, size), *(randn(batch, groups, keys, size) for _ in range(2)), seen]
    args += [randn(batch, queries, groups, size) if own else None for _ in range(2)]
    return Case("cached_attention", args, {}, (0, 1, 2, 4, 5), (0, 4, 5) if own else ())


def elementwise_case(op: str, length: int, batch: int, width: int, tangent: bool, seed: int = 0) -> Case:
    """Random hidden states for `rms_norm`, `layer_norm`, `swiglu` (block: the width), `gelu` or `add_gated`."""
    randn, streams = _randn(seed), batch * (2 if tangent else 1)
    if op == "swiglu":
        return Case(op, [randn(length, streams, 4 * width), width], {"tangent": tangent}, (0,), (0,))
    x = randn(length, streams, width)
    if op == "rms_norm":
        return Case(op, [x, randn(width), 1e-5], {"tangent": tangent}, (0, 1), (0, 1))
    if op == "layer_norm":
        return Case(op, [x, 1e-5, randn(batch, width), randn(batch, width)], {"tangent": tangent}, (0, 2, 3), (0, 2, 3))
    if op == "add_gated":
        args = [x, randn(length, streams, width), randn(batch, width), randn(width)]
        return Case(op, args, {"tangent": tangent}, (0, 1, 2, 3), (0, 1, 2, 3))
    return Case(op, [x, randn(width)], {"tangent": tangent}, (0, 1), (0, 1))


def heads_case(length: int, batch: int, groups: int, queries: int, size: int, seed: int = 0) -> Case:
    """Random heads and angles for `split_heads`; `queries` of each group."""
    randn = _randn(seed)
    angle = randn(length, size // 2)
    table = torch.stack([angle.cos(), angle.sin()], -1)
    return Case(
        "split_heads", [randn(length, batch, groups * (queries + 2) * size), table, groups, size], {}, (0,), (0,)
    )


def rounding_case(rows: int, columns: int, transposed: bool, seed: int = 0) -> Case:
    """Rows of very different sizes, one of zeros, for `round_rows`; the transpose of a matrix, or a matrix."""
    randn = _randn(seed)
    x = randn(columns, rows).mT if transposed else randn(rows, columns)
    x *= torch.logspace(-30, 30, rows, dtype=torch.float64)[:, None]
    x[rows // 2] = 0
    return Case("round_rows", [x], {}, (0,))


def vocab_case(op: str, tokens: int, columns: int, valid: int, width: int, seed: int = 0) -> Case:
    """A consistent state of thinking, with some targets on another rank, for one of VOCAB_OPERATIONS.

    What stands behind an operation's name are options: a step rule, what is given or kept, and narrow logits.
    """
    randn = _randn(seed)
    op, *options = op.split(", ")
    keep = "keeping" in options or "kept" in options
    rule = next((rule for rule in StepRule if rule in options), StepRule.LOGIT)

    def stored(*positions: int) -> tuple[int, ...]:
        """Return which inputs are y and y', if they are in the table's precision."""
        return positions if "narrow" in options else ()

    y, table = 2 * randn(tokens, columns), randn(columns, width) / math.sqrt(width)
    if "narrow" in options:
        y, table = y.bfloat16().double(), table.bfloat16().double()  # what is made of them below is of what is given
    x, lse = reference.vocab_embed(y, table, valid)
    energy_grad, alpha = randn(tokens, width), 1 + randn(tokens).abs()
    centre = (x * energy_grad).sum(-1)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(-1, valid, (tokens,), generator=generator)
    step: list[Any] = [y, lse, table, valid, energy_grad, centre, alpha]
    x_grad, xt_grad, adjoint = randn(tokens, width), randn(tokens, width), randn(tokens, columns)
    scale, mean = randn(tokens).exp(), randn(tokens)
    table_grad = randn(columns, width)
    if op == "vocab_embed":
        return Case(op, [y, table, valid], {}, (1,), stored=stored(0))
    if op == "vocab_update":
        return Case(op, [*step, rule], {}, (2,), stored=stored(0))
    if op == "vocab_refine":
        return Case(op, [*step, target, rule, torch.zeros_like(y) if keep else None], {}, (2,), stored=stored(0, 9))
    if op == "vocab_backward":
        y_next = torch.zeros_like(y)
        lse_next = reference.vocab_refine(*step, target, rule, y_next).lse_next
        args = [*step, target, rule, lse_next, scale, mean, x_grad, xt_grad, table_grad, y_next if keep else None]
        return Case(op, args, {}, (2,), stored=stored(0, 15))
    if op == "vocab_adjoint":
        return Case(op, [y, lse, target, scale, valid, adjoint], {}, (), stored=stored(0))
    if op == "vocab_dot_step":
        return Case(op, [*step[:6], rule, adjoint], {}, (2,), stored=stored(0))
    if op == "vocab_tangent":
        return Case(op, [y, lse, table, valid, rule, adjoint], {}, (2,), stored=stored(0))
    _, along = reference.vocab_dot_step(*step[:6], rule, adjoint)
    if op == "vocab_to_logits":
        return Case(op, [y, lse, valid, along, adjoint], {}, (), stored=stored(0))
    if op != "vocab_dense_backward":
        raise ValueError(f"no vocabulary operation '{op}'")
    _, embedded = reference.vocab_tangent(y, lse, table, valid, rule, adjoint)
    xt = scale[:, None] * embedded - (scale * along)[:, None] * x if rule.by_logits else scale[:, None] * embedded
    args = [y, lse, table, valid, rule, adjoint, scale, scale * along, x, xt, x_grad, xt_grad, table_grad]
    return Case(op, args, {}, (2,), stored=stored(0))


_RULED = (
    "vocab_update",
    "vocab_refine",
    "vocab_refine, keeping",
    "vocab_backward",
    "vocab_backward, kept",
    "vocab_dot_step",
    "vocab_tangent",
    "vocab_dense_backward",
)
VOCAB_OPERATIONS = (
    "vocab_embed",
    "vocab_adjoint",
    "vocab_to_logits",
    *(f"{op}, {rule}" for op in _RULED for rule in StepRule),
    "vocab_embed, narrow",
    "vocab_adjoint, narrow",
    "vocab_to_logits, narrow",
    *(f"{op}, narrow, {StepRule.PROBABILITY}" for op in _RULED),
)


def _tensors(result: Any) -> list[Tensor]:
    if result is None:
        return []
    if is_dataclass(result):
        return [getattr(result, f.name) for f in fields(result)]
    return list(result) if isinstance(result, tuple) else [result]


def _call(operation: Callable[..., Any], case: Case, args: list[Any]) -> dict[str, Tensor]:
    """Everything a call leaves behind: outputs, arguments (some change in place), gradients."""
    for i in case.learned:
        args[i] = args[i].detach().requires_grad_()
    device = args[0].device
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.kwargs.items()}
    outputs = _tensors(operation(*args, **kwargs))
    left = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if case.learned:
        randn = _randn(len(args))
        weights = [randn(*o.shape).to(o) for o in outputs]
        grads = torch.autograd.grad(outputs, [args[i] for i in case.learned], weights)
        left |= {f"gradient of argument {i}": g for i, g in zip(case.learned, grads, strict=True)}
    left |= {
        f"argument {i}": a
        for i, a in enumerate(args)
        if isinstance(a, Tensor) and a.is_floating_point() and i not in case.learned
    }
    return left


def arguments(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Any]:
    """A case's arguments on a device: those the model holds in low precision in `dtype`, others in at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)

    def given(i: int, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        if not a.is_floating_point():
            return a.to(device)
        return a.to(dtype if i in (*case.low, *case.stored) else wide).to(device)

    return [given(i, a) for i, a in enumerate(case.args)]


def errors(kernels: Kernels, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, float]:
    """Relative errors |result - reference| / |reference| of all that a call leaves behind.

    The reference sees the same rounded arguments, in float64. A NaN or infinity in a result
    gives an infinite error.
    """
    args = arguments(case, dtype, device)
    exact = [
        a.double() if isinstance(a, Tensor) and a.is_floating_point() and i not in case.stored else a
        for i, a in enumerate(args)
    ]
    exact = [a.clone() if isinstance(a, Tensor) else a for a in exact]
    expected = _call(getattr(reference, case.op), case, exact)
    result = _call(getattr(kernels, case.op), case, args)
    out = {}
    for name, want in expected.items():
        got, want = result[name].double(), want.double()
        floor = 1e-6 * math.sqrt(want.numel())  # a gradient may be zero but for rounding: one visible key
        error = ((got - want).norm() / want.norm().clamp_min(floor)).item()
        out[name] = error if math.isfinite(error) else math.inf
    return out
