"""The `torch` backend for models of whole pictures: normalisation, GELU and residuals of layers under a condition.

Torch's own fused kernels do most of it. What they give as the backward pass of a vector v is J v, the product with the
transposed Jacobian: symmetric for these operations, so that it is the tangent along v as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.kernels.streams import dot, positions, streams, wide
from ebt_megatron.kernels.vocabulary import exp_minus


def _whole(x: Tensor, tangent: bool) -> list[Tensor]:
    """Value, and tangent if there is one, in at least fp32 and contiguous, as torch's fused kernels want them."""
    return [t.contiguous() for t in wide(*streams(x, tangent))]


def _by_norm(v: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """J v of the normalisation of x with this mean and 1 / deviation r."""
    return torch.ops.aten.native_layer_norm_backward(v, x, x.shape[-1:], mean, r, None, None, [True, False, False])[0]


class _LayerNorm(torch.autograd.Function):
    """y = n m + shift,  y' = (J x') m,  n = r (x - <x>),  m = 1 + scale, with <.> the mean and r = 1 / deviation.

    J = r (1 - 1 1^T / D - n n^T / D). With a = m dy and b = m dy':

        dx' = J b,    dx = J a - r (<n x'> J b + <n b> J x' + <b J x'> n)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float, shift: Tensor, scale: Tensor, tangent: bool) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        offset, factor = wide(shift, 1 + scale)
        moments = []
        for s in positions(x):
            value, *directions = _whole(x[s], tangent)
            n, mean, r = torch.native_layer_norm(value, x.shape[-1:], None, None, epsilon)
            moments += [mean, r]
            y, *y_tangents = streams(out[s], tangent)
            torch.addcmul(offset, n, factor, out=y)
            for direction, y_tangent in zip(directions, y_tangents, strict=True):
                torch.mul(_by_norm(direction, value, mean, r), factor, out=y_tangent)
        ctx.save_for_backward(x, shift, scale, *moments)
        ctx.tangent = tangent
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, *moments = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        (factor,) = wide(1 + scale)
        learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        shift_grad, scale_grad = torch.zeros_like(factor), torch.zeros_like(factor)
        for s, mean, r in zip(positions(x), moments[::2], moments[1::2], strict=True):
            value, *directions = _whole(x[s], ctx.tangent)
            a, *tangents = _whole(grad[s], ctx.tangent)
            dx, *dx_tangents = streams(out[s], ctx.tangent)
            result = _by_norm(a * factor, value, mean, r)
            n = (value - mean).mul_(r) if learned or directions else value
            product = a * n if learned else a
            for direction, b, dx_tangent in zip(directions, tangents, dx_tangents, strict=True):
                turned, weighted, by_mean = _by_norm(direction, value, mean, r), b * factor, r / x.shape[-1]
                if learned:
                    product.addcmul_(b, turned)
                back = _by_norm(weighted, value, mean, r)
                result.addcmul_(dot(n, direction).mul_(by_mean), back, value=-1)
                result.addcmul_(dot(n, weighted).mul_(by_mean), turned, value=-1)
                result.addcmul_(dot(weighted, turned).mul_(by_mean), n, value=-1)
                dx_tangent.copy_(back)
            if learned:
                shift_grad += a.sum(0)
                scale_grad += product.sum(0)
            dx.copy_(result)
        return out, None, shift_grad.to(shift.dtype), scale_grad.to(scale.dtype), None


def layer_norm(x: Tensor, epsilon: float, shift: Tensor, scale: Tensor, *, tangent: bool) -> Tensor:
    """See `Kernels.layer_norm`."""
    return _LayerNorm.apply(x, epsilon, shift, scale, tangent)


class _GELU(torch.autograd.Function):
    """y = f(u),  y' = f'(u) x',  u = x + bias; f(u) = u s(z(u)) with the sigmoid s and z = 2 k (u + c u^3).

    f'' = s (1 - s) (2 z' + u z'' + u (1 - 2 s) z'^2), where 2 z' + u z'' = 4 k (1 + 6 c u^2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, tangent: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tangent = tangent
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        (offset,) = wide(bias)
        for s in positions(x):
            value, *directions = wide(*streams(x[s], tangent))
            y, *y_tangents = streams(out[s], tangent)
            u = value + offset
            y.copy_(F.gelu(u, approximate="tanh"))
            for direction, y_tangent in zip(directions, y_tangents, strict=True):
                y_tangent.copy_(_by_gelu(direction, u))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, bias = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        (offset,) = wide(bias)
        bias_grad = torch.zeros_like(offset)
        for s in positions(x):
            value, *directions = wide(*streams(x[s], ctx.tangent))
            a, *tangents = wide(*streams(grad[s], ctx.tangent))
            dx, *dx_tangents = streams(out[s], ctx.tangent)
            u = value + offset
            result = _by_gelu(a, u)
            for direction, b, dx_tangent in zip(directions, tangents, dx_tangents, strict=True):
                dx_tangent.copy_(_by_gelu(b, u))
                result.addcmul_(_gelu_curve(u), direction * b)
            if ctx.needs_input_grad[1]:
                bias_grad += result.sum((0, 1))
            dx.copy_(result)
        return out, bias_grad.to(bias.dtype), None


_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # z = _SLOPE (u + _CUBIC u^3)


def _by_gelu(v: Tensor, u: Tensor) -> Tensor:
    """f'(u) v of the tanh form of GELU."""
    return torch.ops.aten.gelu_backward(v, u, approximate="tanh")


def _gelu_curve(u: Tensor) -> Tensor:
    """f''(u) of the tanh form of GELU; overwrites u."""
    square = u * u
    slope = (square * (3 * _CUBIC * _SLOPE)).add_(_SLOPE)  # z'
    sigma = (square * (_CUBIC * _SLOPE)).add_(_SLOPE).mul_(u).sigmoid_()
    rest = 1 - sigma
    out = slope.square_().mul_(u).mul_(torch.add(rest, sigma, alpha=-1))
    return out.add_(square.mul_(12 * _CUBIC * _SLOPE).add_(2 * _SLOPE)).mul_(sigma.mul_(rest))


def gelu(x: Tensor, bias: Tensor, *, tangent: bool) -> Tensor:
    """See `Kernels.gelu`."""
    return _GELU.apply(x, bias, tangent)


class _AddGated(torch.autograd.Function):
    """y = h + gate (x + bias),  y' = h' + gate x'."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, gate: Tensor, bias: Tensor, tangent: bool) -> Tensor:
        ctx.save_for_backward(x, gate, bias)
        ctx.tangent = tangent
        out = torch.empty_like(h, memory_format=torch.contiguous_format)
        factor, offset = wide(gate, gate * bias)
        for s in positions(h):
            value, *directions = wide(*streams(h[s], tangent))
            parts, results = wide(*streams(x[s], tangent)), streams(out[s], tangent)
            for base, part, result in zip([value + offset, *directions], parts, results, strict=True):
                torch.addcmul(base, part, factor, out=result)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, bias = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        factor, offset = wide(gate, bias)
        total, gate_grad = torch.zeros_like(factor), torch.zeros_like(factor)
        learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        for s in positions(grad):
            parts, results = wide(*streams(grad[s], ctx.tangent)), streams(out[s], ctx.tangent)
            for part, result in zip(parts, results, strict=True):
                torch.mul(part, factor, out=result)
            if learned:
                total += parts[0].sum(0)
                for part, given in zip(parts, wide(*streams(x[s], ctx.tangent)), strict=True):
                    gate_grad += (part * given).sum(0)
        gate_grad += total * offset
        return grad, out, gate_grad.to(gate.dtype), (total * factor).sum(0).to(bias.dtype), None


def add_gated(h: Tensor, x: Tensor, gate: Tensor, bias: Tensor, *, tangent: bool) -> Tensor:
    """See `Kernels.add_gated`."""
    return _AddGated.apply(h, x, gate, bias, tangent)


# --- attention --------------------------------------------------------------------------------

_SCORES = 1 << 17  # of some heads and queries, held at once
_QUERIES = 256  # of a head, at most


def _parts(length: int, rows: int) -> tuple[list[slice], list[slice]]:
    """Some of so many heads of a batch, and some of the queries of each, that stay in cache together."""
    queries = min(length, _QUERIES)
    step = max(1, _SCORES // (queries * length))
    return (
        [slice(r, min(r + step, rows)) for r in range(0, rows, step)],
        [slice(b, min(b + queries, length)) for b in range(0, length, queries)],
    )


def _beside(x: Tensor, r: slice, tangent: bool, first: int) -> Tensor:
    """Heads r of x [S, R*, H] as a matrix each, [r, S, H]; with a tangent [r, S, 2H], which comes first or not."""
    parts = [t[:, r].transpose(0, 1) for t in streams(x, tangent)]
    return wide(torch.cat(parts[::-1] if first else parts, -1))[0]


def _packed(heads: Tensor, bias: Tensor, r: slice, tangent: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pack heads [S, R*, 3, H] + biases [R, 3, H]: [q' q] / sqrt(H), [k k'] and [v' v]; without a tangent q, k, v."""
    size = heads.shape[-1]
    q, k, v = (_beside(heads[:, :, i], r, tangent, i != 1) for i in range(3))
    for i, value in enumerate((q[..., -size:], k[..., :size], v[..., -size:])):
        value.add_(bias[r, i, None])
    return q.mul_(1 / math.sqrt(size)), k, v


class _FullAttention(torch.autograd.Function):
    """Attention of every position to every other; `ebt_megatron.kernels.tiled` has the formulas.

    Tangents stand beside values in one matrix, so that one product serves both: s' = q' k + q k' is [q' q] [k k']^T.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, bias: Tensor, size: int, tangent: bool) -> Tensor:
        length, batch, width = mixed.shape
        heads = mixed.reshape(length, -1, 3, size)
        out = mixed.new_empty(length, heads.shape[1], size)
        rows = streams(out, tangent)[0].shape[1]
        ctx.biases = wide(bias)[0].view(-1, 3, size).repeat(rows * 3 * size // width, 1, 1)
        lse, mu = ctx.biases.new_empty(2, rows, length, 1)  # log-sum-exp, and the mean tangent score
        parts, blocks = _parts(length, rows)
        for r in parts:
            q, k, v = _packed(heads, ctx.biases, r, tangent)
            for b in blocks:
                o, *o_tangents = (t[b, r].transpose(0, 1) for t in streams(out, tangent))
                e = torch.bmm(q[:, b, -size:], k[..., :size].mT)
                top = e.amax(-1, keepdim=True)
                exp_minus(e, top, e)
                total = e.sum(-1, keepdim=True)
                torch.add(top, total.log(), out=lse[r, b])
                read = torch.bmm(e, v).div_(total)
                o.copy_(read[..., -size:])
                for o_tangent in o_tangents:
                    weighted = torch.bmm(q[:, b], k.mT).mul_(e)
                    mean = weighted.sum(-1, keepdim=True).div_(total)
                    mu[r, b] = mean
                    moved = torch.bmm(weighted, v[..., size:]).div_(total).add_(read[..., :size])
                    torch.addcmul(moved, mean, read[..., size:], value=-1, out=o_tangent)
        ctx.save_for_backward(mixed, bias, out, lse, mu)
        ctx.size, ctx.tangent = size, tangent
        return out.view(length, batch, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mixed, bias, out, lse, mu = ctx.saved_tensors
        size, tangent, length, scale = ctx.size, ctx.tangent, len(mixed), 1 / math.sqrt(ctx.size)
        mixed_grad = torch.empty_like(mixed, memory_format=torch.contiguous_format)
        heads, results = (t.reshape(length, -1, 3, size) for t in (mixed, mixed_grad))
        grad = grad.reshape(out.shape)
        parts, blocks = _parts(length, len(lse))
        for r in parts:
            q, k, v = _packed(heads, ctx.biases, r, tangent)
            g, o = _beside(grad, r, tangent, True), _beside(out, r, tangent, True)  # [b a], [o' o]
            into, *into_tangents = (t[:, r].permute(2, 1, 0, 3) for t in streams(results, tangent))  # [3, r, S, H]
            delta, beta = dot(g, o), dot(g[..., :size], o[..., -size:])
            dk, dv = torch.zeros_like(k[..., :size]), torch.zeros_like(v)
            dk_both, dv_more = torch.zeros_like(k), torch.zeros_like(dk)
            for b in blocks:
                p = torch.bmm(q[:, b, -size:], k[..., :size].mT)
                exp_minus(p, lse[r, b], p)
                ds = torch.bmm(g[:, b], v.mT).sub_(delta[:, b])  # A - delta
                if tangent:
                    st = torch.bmm(q[:, b], k.mT).sub_(mu[r, b])  # s' - mu
                    dst = torch.bmm(g[:, b, :size], v[..., size:].mT).sub_(beta[:, b])  # B - beta
                    ds.addcmul_(st, dst)
                    dq_both = torch.bmm(dst.mul_(p), k).mul_(scale)
                    dk_both.baddbmm_(dst.mT, q[:, b])
                    dv_more.baddbmm_(st.mul_(p).mT, g[:, b, :size])
                dq = torch.bmm(ds.mul_(p), k[..., :size])
                dk.baddbmm_(ds.mT, q[:, b, -size:])
                dv.baddbmm_(p.mT, g[:, b])
                if tangent:
                    torch.add(dq_both[..., size:], dq, alpha=scale, out=into[0, :, b])
                    into_tangents[0][0, :, b] = dq_both[..., :size]
                else:
                    torch.mul(dq, scale, out=into[0, :, b])
            if not tangent:
                into[1], into[2] = dk, dv
                continue
            torch.add(dk, dk_both[..., :size], out=into[1])
            torch.add(dv[..., size:], dv_more, out=into[2])
            into_tangents[0][1], into_tangents[0][2] = dk_both[..., size:], dv[..., :size]
        bias_grad = None
        if ctx.needs_input_grad[1]:
            bias_grad = wide(streams(mixed_grad, tangent)[0])[0].sum((0, 1)).to(bias.dtype)
        return mixed_grad, bias_grad, None, None


def full_attention(mixed: Tensor, bias: Tensor, size: int, *, tangent: bool) -> Tensor:
    """See `Kernels.full_attention`."""
    return _FullAttention.apply(mixed, bias, size, tangent)
