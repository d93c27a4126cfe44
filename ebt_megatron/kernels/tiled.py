"""The `torch` backend: tiled torch code, with backward passes written by hand.

Memory is linear in the sequence length. Attention goes through blocks of queries and,
causally, only the keys before each block's end.

Attention with tangents. With scores s, their tangents s', p = softmax(s), mu = <p, s'>:

    o  = sum_j p_j v_j           o' = sum_j p_j (s'_j - mu) v_j + p_j v'_j

and for gradients a at o, b at o', writing A_j = <a, v_j> + <b, v'_j>, B_j = <b, v_j>,
delta = <a, o> + <b, o'>, beta = <b, o> (taken over values alone):

    dL/ds'_j = p_j (B_j - beta)      dL/ds_j = p_j (A_j - delta + (s'_j - mu) (B_j - beta))

so the backward pass needs, beside inputs and outputs, only the log-sum-exp and mu per row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.kernels.vocabulary import Tiles, Vocabulary

_QUERY_BLOCK = 128
_SCORES = 1 << 18  # scores of one block of queries and heads held at once, so that they stay in cache


# --- attention --------------------------------------------------------------------------------


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """[S, B, G, H] -> [B * heads, S, H], repeating each group for its queries."""
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], 2)
    return x.permute(1, 2, 0, 3).reshape(-1, x.shape[0], x.shape[3])


def _from_heads(x: Tensor, batch: int, groups: int) -> Tensor:
    """[B * heads, S, H] -> [S, B, G, H], summing over the queries of each group."""
    heads = len(x) // batch
    x = (
        x.view(batch, groups, heads // groups, *x.shape[1:]).sum(2)
        if heads != groups
        else x.view(batch, groups, *x.shape[1:])
    )
    return x.permute(2, 0, 1, 3)


def _blocks(queries: int, keys: int, rows: int, causal: bool) -> list[tuple[slice, slice, int]]:
    """(rows of B * N, queries, end of visible keys) of each block."""
    out = []
    for begin in range(0, queries, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, queries)
        visible = end if causal else keys
        step = max(1, _SCORES // ((end - begin) * visible))
        out += [(slice(r, min(r + step, rows)), slice(begin, end), visible) for r in range(0, rows, step)]
    return out


def _hide(scores: Tensor, block: slice, visible: int, causal: bool, segments: Tensor | None, rows: slice) -> None:
    """Set scores of unseen keys to -inf, in place; segments int32 [B * N, S]."""
    if causal:
        size = block.stop - block.start
        future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores[:, :, block.start :].masked_fill_(future, -math.inf)
    if segments is not None:
        scores.masked_fill_(segments[rows, block, None] != segments[rows, None, :visible], -math.inf)


class _Attention(torch.autograd.Function):
    """Attention over shared keys and, optionally, each row's own key; with or without tangents.

    Arguments are [R, S, H] with R = B * N (see `_to_heads`); tangents are None or of that shape.
    """

    @staticmethod
    def forward(ctx: Any, q, qt, k_self, kt_self, v_self, vt_self, k, kt, v, vt, causal, segments):
        scale = 1 / math.sqrt(q.shape[-1])
        rows, queries, _ = q.shape
        tangent = qt is not None
        o, ot = torch.empty_like(q), torch.empty_like(q) if tangent else None
        lse = q.new_empty(rows, queries)
        mu = q.new_empty(rows, queries) if tangent else None
        for r, b, visible in _blocks(queries, k.shape[1], rows, causal):
            key, value = k[r, :visible], v[r, :visible]
            s = torch.bmm(q[r, b], key.mT).mul_(scale)
            _hide(s, b, visible, causal, segments, r)
            top = s.amax(-1, keepdim=True)
            if k_self is not None:
                own = (q[r, b] * k_self[r, b]).sum(-1, keepdim=True).mul_(scale)
                top = torch.maximum(top, own)
            p = s.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            if k_self is not None:
                p_own = (own - top).exp()
                total = total + p_own
            lse[r, b] = (top + total.log()).squeeze(-1)
            p.div_(total)
            out = torch.bmm(p, value)
            if k_self is not None:
                p_own = p_own / total
                out.addcmul_(p_own, v_self[r, b])
            o[r, b] = out
            if ot is None or mu is None:
                continue
            st = torch.bmm(qt[r, b], key.mT)
            if kt is not None:
                st.baddbmm_(q[r, b], kt[r, :visible].mT)
            pt = st.mul_(scale).mul_(p)  # p s'
            mean = pt.sum(-1, keepdim=True)
            if k_self is not None:
                own_t = (qt[r, b] * k_self[r, b] + q[r, b] * kt_self[r, b]).sum(-1, keepdim=True).mul_(scale)
                mean = mean + p_own * own_t
            mu[r, b] = mean.squeeze(-1)
            # sum p s' v - mu sum p v: no second pass over the scores
            out_t = torch.bmm(pt, value)
            if vt is not None:
                out_t.baddbmm_(p, vt[r, :visible])
            if k_self is not None:
                out_t += p_own * (own_t * v_self[r, b] + vt_self[r, b])
            ot[r, b] = out_t.addcmul_(mean, out, value=-1)
        ctx.save_for_backward(q, qt, k_self, kt_self, v_self, vt_self, k, kt, v, vt, segments, o, lse, mu, ot)
        ctx.causal, ctx.scale = causal, scale
        return (o, ot) if tangent else o

    @staticmethod
    def backward(ctx: Any, a, b_grad=None):
        q, qt, k_self, kt_self, v_self, vt_self, k, kt, v, vt, segments, o, lse, mu, ot = ctx.saved_tensors
        scale, tangent, own_key = ctx.scale, qt is not None, k_self is not None
        rows, queries, _ = q.shape
        # Keys and values need no gradient while proposing: half of the products fall away.
        k_needs = ctx.needs_input_grad[6] or ctx.needs_input_grad[8]
        a = a.contiguous()
        delta = (a * o).sum(-1)
        if tangent:
            b_grad = b_grad.contiguous()
            delta = delta + (b_grad * ot).sum(-1)
            beta = (b_grad * o).sum(-1)
        grads: dict[str, Tensor] = {"q": torch.zeros_like(q)}
        if tangent:
            grads["qt"] = torch.zeros_like(q)
        for name, wanted in (("k", k_needs), ("v", k_needs), ("kt", kt is not None), ("vt", vt is not None)):
            if wanted:
                grads[name] = torch.zeros_like(k)
        for r, blk, visible in _blocks(queries, k.shape[1], rows, ctx.causal):
            key, value = k[r, :visible], v[r, :visible]
            qb, ab = q[r, blk], a[r, blk]
            p = torch.bmm(qb, key.mT).mul_(scale)
            _hide(p, blk, visible, ctx.causal, segments, r)
            p.sub_(lse[r, blk, None]).exp_()
            ds = torch.bmm(ab, value.mT)  # A
            if tangent:
                qtb, bb = qt[r, blk], b_grad[r, blk]
                if vt is not None:
                    ds.baddbmm_(bb, vt[r, :visible].mT)
                dst = torch.bmm(bb, value.mT).sub_(beta[r, blk, None])  # B - beta
                st = torch.bmm(qtb, key.mT)
                if kt is not None:
                    st.baddbmm_(qb, kt[r, :visible].mT)
                st.mul_(scale).sub_(mu[r, blk, None])  # s' - mu
                ds.sub_(delta[r, blk, None]).addcmul_(st, dst).mul_(p)
                dst.mul_(p)
                grads["qt"][r, blk] = torch.bmm(dst, key)
                if kt is not None:
                    grads["q"][r, blk] += torch.bmm(dst, kt[r, :visible])
                    grads["kt"][r, :visible].baddbmm_(dst.mT, qb)
                if k_needs:
                    grads["k"][r, :visible].baddbmm_(dst.mT, qtb)
                    grads["v"][r, :visible].baddbmm_(st.mul_(p).mT, bb)
                if vt is not None:
                    grads["vt"][r, :visible].baddbmm_(p.mT, bb)
            else:
                ds.sub_(delta[r, blk, None]).mul_(p)
            grads["q"][r, blk] += torch.bmm(ds, key)
            if k_needs:
                grads["k"][r, :visible].baddbmm_(ds.mT, qb)
                grads["v"][r, :visible].baddbmm_(p.mT, ab)
        if own_key:
            own = (q * k_self).sum(-1).mul_(scale)
            p_own = (own - lse).exp()[..., None]
            along = (a * v_self).sum(-1, keepdim=True)
            if tangent:
                along = along + (b_grad * vt_self).sum(-1, keepdim=True)
                own_t = (qt * k_self + q * kt_self).sum(-1, keepdim=True).mul_(scale) - mu[..., None]
                dst_own = p_own * ((b_grad * v_self).sum(-1, keepdim=True) - beta[..., None])
                ds_own = p_own * (along - delta[..., None]) + own_t * dst_own
                grads["q"] += ds_own * k_self + dst_own * kt_self
                grads["qt"] += dst_own * k_self
                grads["k_self"] = (ds_own * q + dst_own * qt) * scale
                grads["kt_self"] = dst_own * q * scale
                grads["v_self"] = p_own * (a + own_t * b_grad)
                grads["vt_self"] = p_own * b_grad
            else:
                ds_own = p_own * (along - delta[..., None])
                grads["q"] += ds_own * k_self
                grads["k_self"] = ds_own * q * scale
                grads["v_self"] = p_own * a
        for name in ("q", "qt", "k", "kt"):
            if name in grads:
                grads[name].mul_(scale)
        order = ("q", "qt", "k_self", "kt_self", "v_self", "vt_self", "k", "kt", "v", "vt")
        return (*(grads.get(name) for name in order), None, None)


class _Layout(torch.autograd.Function):
    """[S, B, G, H] <-> [B * heads, S, H], as one copy each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int) -> Tensor:
        ctx.batch, ctx.groups = x.shape[1], x.shape[2]
        return _to_heads(x, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _from_heads(grad, ctx.batch, ctx.groups), None


def _wide(*tensors: Tensor) -> list[Tensor]:
    """At least float32, for accumulation."""
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _repeat_segments(segments: Tensor | None, heads: int) -> Tensor | None:
    return None if segments is None else segments.repeat_interleave(heads, 0)


def context_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """See `Kernels.context_attention`."""
    heads, dtype = q.shape[2], q.dtype
    if segments is None:
        repeat = heads // k.shape[2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)
    batch = q.shape[1]
    q, k, v = (_Layout.apply(t, heads) for t in _wide(q, k, v))
    o = _Attention.apply(q, None, None, None, None, None, k, None, v, None, True, _repeat_segments(segments, heads))
    return _from_heads(o, batch, heads).flatten(2).to(dtype)


def prediction_attention(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tangent: bool,
    segments: Tensor | None = None,
) -> Tensor:
    """See `Kernels.prediction_attention`."""
    heads, dtype, batch = q.shape[2], q.dtype, q.shape[1]
    segments = _repeat_segments(segments, heads)
    own = [_Layout.apply(t, heads) for t in _wide(q, k_self, v_self)]
    keys, values = (_Layout.apply(t, heads) for t in _wide(k, v))
    if not tangent:
        q, k_self, v_self = own
        o = _Attention.apply(q, None, k_self, None, v_self, None, keys, None, values, None, True, segments)
    else:
        pairs = [t for x in own for t in x.chunk(2)]  # q, qt, k_self, kt_self, v_self, vt_self
        o = torch.cat(_Attention.apply(*pairs, keys, None, values, None, True, segments))
    return _from_heads(o, batch, heads).flatten(2).to(dtype)


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, tangent: bool) -> Tensor:
    """See `Kernels.full_attention`."""
    heads, dtype, batch = q.shape[2], q.dtype, q.shape[1]
    q, k, v = (_Layout.apply(t, heads) for t in _wide(q, k, v))
    none = (None,) * 4
    if not tangent:
        o = _Attention.apply(q, None, *none, k, None, v, None, False, None)
    else:
        (q, qt), (k, kt), (v, vt) = q.chunk(2), k.chunk(2), v.chunk(2)
        o = torch.cat(_Attention.apply(q, qt, *none, k, kt, v, vt, False, None))
    return _from_heads(o, batch, heads).flatten(2).to(dtype)


# --- elementwise ------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """y = n w, n = x r, r = 1 / rms(x);  y' = r (x' - n <n x'>) w, with <.> the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, tangent: bool) -> Tensor:
        value = x.chunk(2, 1)[0] if tangent else x
        wide = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))
        ctx.tangent = tangent
        ctx.save_for_backward(x, weight, r)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        n = wide * r
        if not tangent:
            torch.mul(n, weight, out=n) if n.dtype == weight.dtype else n.mul_(weight)
            return out.copy_(n)
        direction = x.chunk(2, 1)[1]
        first, second = out.chunk(2, 1)
        mean = (n * direction).mean(-1, keepdim=True)
        second.copy_(((direction - n * mean) * r).mul_(weight))
        first.copy_(n.mul_(weight))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)

        def project(t: Tensor, n: Tensor) -> Tensor:  # (I - n n^T) t, per row
            return t - n * (n * t).mean(-1, keepdim=True)

        if not ctx.tangent:
            n = x * r
            g = grad * weight
            out.copy_(project(g, n).mul_(r))
            w_grad = (grad * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
            return out, w_grad, None, None
        (value, direction), (ga, gb) = x.chunk(2, 1), grad.chunk(2, 1)
        n = value * r
        mean = (n * direction).mean(-1, keepdim=True)
        turned = direction - n * mean
        w_grad = None
        if ctx.needs_input_grad[1]:
            w_grad = ((ga * n) + (gb * turned) * r).flatten(0, -2).sum(0)
        a, b = ga * weight, gb * weight
        b_flat = project(b, n)
        first, second = out.chunk(2, 1)
        second.copy_(b_flat * r)
        # d/dx of <b, r (x' - n <n x'>)>: through r, and through n in both places
        along = (b * turned).mean(-1, keepdim=True)
        b_mean = (b * n).mean(-1, keepdim=True)
        through = b_flat.mul_(mean).add_(project(direction, n).mul_(b_mean)).add_(n * along)
        first.copy_(project(a, n).mul_(r).sub_(through.mul_(r * r)))
        return out, w_grad, None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, tangent: bool) -> Tensor:
    """See `Kernels.rms_norm`."""
    return _RMSNorm.apply(x, weight, epsilon, tangent)


class _SwiGLU(torch.autograd.Function):
    """y = f(gate) up with f = silu;  y' = f'(gate) gate' up + f(gate) up'."""

    @staticmethod
    def _parts(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        gate, up = x.unflatten(-1, (-1, 2, block)).unbind(-2)
        return gate, up

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, tangent: bool) -> Tensor:
        ctx.block, ctx.tangent = block, tangent
        ctx.save_for_backward(x)
        value = x.chunk(2, 1)[0] if tangent else x
        gate, up = _SwiGLU._parts(value, block)
        sigma = gate.sigmoid()
        f = gate * sigma
        if not tangent:
            return f.mul_(up).flatten(-2)
        gate_t, up_t = _SwiGLU._parts(x.chunk(2, 1)[1], block)
        slope = (1 - sigma).mul_(gate).add_(1).mul_(sigma)
        out_t = slope.mul_(gate_t).mul_(up).addcmul_(f, up_t)
        return torch.cat([f.mul_(up).flatten(-2), out_t.flatten(-2)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        block = ctx.block
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        value = x.chunk(2, 1)[0] if ctx.tangent else x
        gate, up = _SwiGLU._parts(value, block)
        sigma = gate.sigmoid()
        f = gate * sigma
        slope = sigma * (1 + gate * (1 - sigma))
        if not ctx.tangent:
            g = grad.unflatten(-1, (-1, block))
            d_gate, d_up = _SwiGLU._parts(out, block)
            d_gate.copy_(g * slope * up)
            d_up.copy_(g * f)
            return out, None, None
        gate_t, up_t = _SwiGLU._parts(x.chunk(2, 1)[1], block)
        a, b = (t.unflatten(-1, (-1, block)) for t in grad.chunk(2, 1))
        # f'' = sigma (1 - sigma) (2 + gate (1 - 2 sigma))
        curve = sigma * (1 - sigma) * (2 + gate * (1 - 2 * sigma))
        first, second = out.chunk(2, 1)
        d_gate, d_up = _SwiGLU._parts(first, block)
        d_gate_t, d_up_t = _SwiGLU._parts(second, block)
        d_gate.copy_((a * slope).add_(b * curve * gate_t).mul_(up).add_(b * slope * up_t))
        d_up.copy_((a * f).add_(b * slope * gate_t))
        d_gate_t.copy_(b * slope * up)
        d_up_t.copy_(b * f)
        return out, None, None


def swiglu(x: Tensor, block: int, *, tangent: bool) -> Tensor:
    """See `Kernels.swiglu`."""
    return _SwiGLU.apply(x, block, tangent)


# --- the vocabulary: see `ebt_megatron.kernels.vocabulary` ---------------------------------------

_vocabulary = Vocabulary(Tiles())
vocab_embed, vocab_refine = _vocabulary.embed, _vocabulary.refine
vocab_backward, vocab_update = _vocabulary.backward, _vocabulary.update
vocab_adjoint, vocab_dot_step = _vocabulary.adjoint, _vocabulary.dot_step
vocab_tangent, vocab_dense_backward = _vocabulary.tangent, _vocabulary.dense_backward
