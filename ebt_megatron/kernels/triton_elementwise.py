"""RMSNorm, SwiGLU and rotary heads of the `triton` backend: value and tangent in one pass each way.

The formulas are those of `ebt_megatron.kernels.tiled`; all arithmetic is in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 512  # of RMSNorm's backward: each keeps one partial sum of the weight's gradient


@triton.jit
def _rms_forward(X, W, Y, B, D, epsilon, TANGENT: tl.constexpr, BD: tl.constexpr):
    """One position: X and Y are contiguous [S, B*, D]."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    first = (i // B * (2 * B) + i % B) * D if TANGENT else i * D
    x = tl.load(X + first + d, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + d, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, 0) / D + epsilon)
    n = x * r
    tl.store(Y + first + d, (n * w).to(Y.dtype.element_ty), mask=inside)
    if TANGENT:
        xt = tl.load(X + first + B * D + d, mask=inside, other=0.0).to(tl.float32)
        yt = r * (xt - n * (tl.sum(n * xt, 0) / D)) * w
        tl.store(Y + first + B * D + d, yt.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_backward(X, W, GY, GX, GW, rows, B, D, epsilon, TANGENT: tl.constexpr, WEIGHT: tl.constexpr, BD: tl.constexpr):
    """Positions i, i + programs, ...; GW [programs, D] takes partial sums."""
    program = tl.program_id(0)
    d = tl.arange(0, BD)
    inside = d < D
    w = tl.load(W + d, mask=inside, other=0.0).to(tl.float32)
    gw = tl.zeros([BD], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        i = tl.cast(row, tl.int64)
        first = (i // B * (2 * B) + i % B) * D if TANGENT else i * D
        x = tl.load(X + first + d, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(GY + first + d, mask=inside, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(x * x, 0) / D + epsilon)
        n = x * r
        gw += a * n
        a *= w
        gx = (a - n * (tl.sum(a * n, 0) / D)) * r
        if TANGENT:
            xt = tl.load(X + first + B * D + d, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(GY + first + B * D + d, mask=inside, other=0.0).to(tl.float32)
            mean = tl.sum(n * xt, 0) / D
            turned = xt - n * mean
            gw += b * turned * r
            b *= w
            b_mean = tl.sum(b * n, 0) / D
            b_flat = b - n * b_mean
            along = tl.sum(b * turned, 0) / D
            gx -= (b_flat * mean + turned * b_mean + n * along) * r * r
            tl.store(GX + first + B * D + d, (b_flat * r).to(GX.dtype.element_ty), mask=inside)
        tl.store(GX + first + d, gx.to(GX.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(GW + program * D + d, gw, mask=inside)


def _sizes(x: Tensor, tangent: bool) -> tuple[int, int, int]:
    """Positions, batch and width of a stacked or plain hidden state."""
    batch = x.shape[1] // 2 if tangent else x.shape[1]
    return x.shape[0] * batch, batch, x.shape[-1]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, tangent: bool) -> Tensor:
        x = x.contiguous()
        rows, batch, width = _sizes(x, tangent)
        y = torch.empty_like(x)
        options = {"TANGENT": tangent, "BD": triton.next_power_of_2(width)}
        _rms_forward[(rows,)](x, weight, y, batch, width, epsilon, **options)
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.epsilon = options, epsilon
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, batch, width = _sizes(x, ctx.options["TANGENT"])
        programs = min(rows, _PROGRAMS)
        x_grad = torch.empty_like(x)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _rms_backward[(programs,)](
            x, weight, grad.contiguous(), x_grad, partial, rows, batch, width, ctx.epsilon,
            WEIGHT=ctx.needs_input_grad[1], **ctx.options,
        )
        return x_grad, partial.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, tangent: bool) -> Tensor:
    """See `Kernels.rms_norm`."""
    return _RMSNorm.apply(x, weight, epsilon, tangent)


@triton.jit
def _swiglu_forward(X, Y, B, F, block, TANGENT: tl.constexpr, BF: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < F
    first = i // B * (2 * B) + i % B if TANGENT else i
    at = f // block * (2 * block) + f % block  # of the gate; its partner is `block` further
    gate = tl.load(X + first * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + first * 2 * F + at + block, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    tl.store(Y + first * F + f, (gate * sigma * up).to(Y.dtype.element_ty), mask=inside)
    if TANGENT:
        second = first + B
        gate_t = tl.load(X + second * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
        up_t = tl.load(X + second * 2 * F + at + block, mask=inside, other=0.0).to(tl.float32)
        yt = sigma * (1 + gate * (1 - sigma)) * gate_t * up + gate * sigma * up_t
        tl.store(Y + second * F + f, yt.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(X, GY, GX, B, F, block, TANGENT: tl.constexpr, BF: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < F
    first = i // B * (2 * B) + i % B if TANGENT else i
    at = f // block * (2 * block) + f % block
    gate = tl.load(X + first * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + first * 2 * F + at + block, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(GY + first * F + f, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    slope = sigma * (1 + gate * (1 - sigma))
    d_gate, d_up = a * slope * up, a * gate * sigma
    if TANGENT:
        second = first + B
        gate_t = tl.load(X + second * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
        up_t = tl.load(X + second * 2 * F + at + block, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(GY + second * F + f, mask=inside, other=0.0).to(tl.float32)
        curve = sigma * (1 - sigma) * (2 + gate * (1 - 2 * sigma))  # silu''
        d_gate += b * (curve * gate_t * up + slope * up_t)
        d_up += b * slope * gate_t
        tl.store(GX + second * 2 * F + at, (b * slope * up).to(GX.dtype.element_ty), mask=inside)
        tl.store(GX + second * 2 * F + at + block, (b * gate * sigma).to(GX.dtype.element_ty), mask=inside)
    tl.store(GX + first * 2 * F + at, d_gate.to(GX.dtype.element_ty), mask=inside)
    tl.store(GX + first * 2 * F + at + block, d_up.to(GX.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, tangent: bool) -> Tensor:
        x = x.contiguous()
        rows, batch, width = _sizes(x, tangent)
        width //= 2
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        options = {"TANGENT": tangent, "BF": min(1024, triton.next_power_of_2(width))}
        ctx.grid = (rows, triton.cdiv(width, options["BF"]))
        _swiglu_forward[ctx.grid](x, y, batch, width, block, **options)
        ctx.save_for_backward(x)
        ctx.sizes, ctx.options = (batch, width, block), options
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        _swiglu_backward[ctx.grid](x, grad.contiguous(), x_grad, *ctx.sizes, **ctx.options)
        return x_grad, None, None


def swiglu(x: Tensor, block: int, *, tangent: bool) -> Tensor:
    """See `Kernels.swiglu`."""
    return _SwiGLU.apply(x, block, tangent)


@triton.jit
def _heads(MIXED, TABLE, Q, K, V, B, R, G, H, BACKWARD: tl.constexpr, BP: tl.constexpr):
    """BP pairs of one row of MIXED [S, B, G, R + 2, H] to Q, K and V, or back; all are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BP + tl.arange(0, BP)
    half = H // 2
    head, j = pair // half, pair % half
    group, which = head // (R + 2), head % (R + 2)  # which: of R queries, the key, the value
    inside = head < G * (R + 2)
    is_q, is_k, is_v = inside & (which < R), inside & (which == R), inside & (which > R)
    angle = TABLE + (row // B * half + j) * 2
    cos = tl.where(is_v, 1.0, tl.load(angle, mask=inside, other=1.0).to(tl.float32))
    sin = tl.where(is_v, 0.0, tl.load(angle + 1, mask=inside, other=0.0).to(tl.float32))
    at_mixed = MIXED + row * G * (R + 2) * H + pair * 2
    at_q = Q + (row * G * R + group * R + which) * H + 2 * j
    at_k = K + (row * G + group) * H + 2 * j
    at_v = V + (row * G + group) * H + 2 * j
    if BACKWARD:
        x = tl.load(at_q, mask=is_q, other=0.0).to(tl.float32)
        y = tl.load(at_q + 1, mask=is_q, other=0.0).to(tl.float32)
        x += tl.load(at_k, mask=is_k, other=0.0).to(tl.float32) + tl.load(at_v, mask=is_v, other=0.0).to(tl.float32)
        y += tl.load(at_k + 1, mask=is_k, other=0.0).to(tl.float32)
        y += tl.load(at_v + 1, mask=is_v, other=0.0).to(tl.float32)
        tl.store(at_mixed, (x * cos + y * sin).to(MIXED.dtype.element_ty), mask=inside)
        tl.store(at_mixed + 1, (y * cos - x * sin).to(MIXED.dtype.element_ty), mask=inside)
    else:
        x = tl.load(at_mixed, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(at_mixed + 1, mask=inside, other=0.0).to(tl.float32)
        first = (x * cos - y * sin).to(Q.dtype.element_ty)
        second = (x * sin + y * cos).to(Q.dtype.element_ty)
        tl.store(at_q, first, mask=is_q)
        tl.store(at_q + 1, second, mask=is_q)
        tl.store(at_k, first, mask=is_k)
        tl.store(at_k + 1, second, mask=is_k)
        tl.store(at_v, first, mask=is_v)
        tl.store(at_v + 1, second, mask=is_v)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor, groups: int, size: int):
        mixed = mixed.contiguous()
        length, streams, width = mixed.shape
        queries = width // (groups * size) - 2  # of each group
        q = mixed.new_empty(length, streams, groups * queries, size)
        k, v = (mixed.new_empty(length, streams, groups, size) for _ in range(2))
        ctx.sizes, ctx.shape = (streams, queries, groups, size), mixed.shape
        ctx.grid = (length * streams, triton.cdiv(width, 1024))
        ctx.save_for_backward(table)
        _heads[ctx.grid](mixed, table, q, k, v, *ctx.sizes, BACKWARD=False, BP=512)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        mixed_grad = grads[0].new_empty(ctx.shape)
        _heads[ctx.grid](mixed_grad, table, *(g.contiguous() for g in grads), *ctx.sizes, BACKWARD=True, BP=512)
        return mixed_grad, None, None, None


def split_heads(mixed: Tensor, table: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.split_heads`."""
    return _SplitHeads.apply(mixed, table, groups, size)
