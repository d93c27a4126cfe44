"""The `torch` backend: tiled torch code, with backward passes written by hand.

Memory is linear in the sequence length. Attention goes through blocks of queries and,
causally, only the keys before each block's end. `causal` is 0 where every row sees every key, else the number of
neighbouring rows that see each other.

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

from ebt_megatron.kernels.streams import dot, positions, streams, wide
from ebt_megatron.kernels.vocabulary import Tiles, Vocabulary, exp_minus

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


def _query_block(causal: int) -> int:
    """Queries of a block: whole groups of rows that see each other."""
    return max(causal, _QUERY_BLOCK // causal * causal) if causal else _QUERY_BLOCK


def _blocks(queries: int, keys: int, rows: int, causal: int) -> list[tuple[slice, slice, int]]:
    """(rows of B * N, queries, end of visible keys) of each block."""
    out, size = [], _query_block(causal)
    for begin in range(0, queries, size):
        end = min(begin + size, queries)
        visible = end if causal else keys
        step = max(1, _SCORES // ((end - begin) * visible))
        out += [(slice(r, min(r + step, rows)), slice(begin, end), visible) for r in range(0, rows, step)]
    return out


def _hide(scores: Tensor, block: slice, visible: int, future: Tensor | None, segments: Tensor | None, r: slice) -> None:
    """Set scores of unseen keys to -inf, in place; future from `_future`, segments int32 [B * N, S]."""
    if future is not None:
        size = block.stop - block.start
        scores[:, :, block.start :].add_(future[:size, :size])
    if segments is not None:
        scores.masked_fill_(segments[r, block, None] != segments[r, None, :visible], -math.inf)


def _future(like: Tensor, causal: int) -> Tensor | None:
    """-inf where a key comes after what its query sees, to be added to the scores of a block with itself."""
    if not causal:
        return None
    number = torch.arange(_query_block(causal), device=like.device) // causal
    return like.new_zeros(len(number), len(number)).masked_fill_(number > number[:, None], -math.inf)


def _halves(x: Tensor | None, stacked: bool) -> tuple[Any, ...]:
    """Value and tangent; without a tangent (x, None)."""
    return x.chunk(2) if stacked and x is not None else (x, None)


class _Attention(torch.autograd.Function):
    """Attention over shared keys and, optionally, each row's own key; with or without tangents.

    Arguments are [R, S, H] with R = B * N (see `_to_heads`). With `tangent`, tangents are stacked behind values
    [2R, S, H]: behind those of shared keys too where rows have no key of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_self: Tensor | None,
        v_self: Tensor | None,
        k: Tensor,
        v: Tensor,
        tangent: bool,
        causal: bool,
        segments: Tensor | None,
    ) -> Tensor:
        given, own_key = (q, k_self, v_self, k, v), k_self is not None
        scale = 1 / math.sqrt(q.shape[-1])
        out = torch.empty_like(q)
        (o, ot), (q, qt) = _halves(out, tangent), _halves(q, tangent)
        (k_self, kt_self), (v_self, vt_self) = _halves(k_self, tangent), _halves(v_self, tangent)
        (k, kt), (v, vt) = (_halves(t, tangent and not own_key) for t in (k, v))
        rows, queries, _ = q.shape
        lse, mu = q.new_empty(2, rows, queries, 1)  # log-sum-exp, and the mean tangent score
        future = _future(q, causal)
        for r, b, visible in _blocks(queries, k.shape[1], rows, causal):
            key, value, qb = k[r, :visible], v[r, :visible], q[r, b] * scale
            s = torch.bmm(qb, key.mT)
            _hide(s, b, visible, future, segments, r)
            top = s.amax(-1, keepdim=True)
            if own_key:
                own = dot(qb, k_self[r, b])
                top = torch.maximum(top, own)
            p = exp_minus(s, top, s)
            total = p.sum(-1, keepdim=True)
            if own_key:
                p_own = (own - top).exp()
                total += p_own
            torch.add(top, total.log(), out=lse[r, b])
            p.div_(total)
            ob = torch.bmm(p, value)
            if own_key:
                p_own /= total
                ob.addcmul_(p_own, v_self[r, b])
            o[r, b] = ob
            if not tangent:
                continue
            qtb = qt[r, b] * scale
            st = torch.bmm(qtb, key.mT)
            if kt is not None:
                st.baddbmm_(qb, kt[r, :visible].mT)
            pt = st.mul_(p)  # p s'
            mean = pt.sum(-1, keepdim=True)
            # sum p s' v - mu sum p v: no second pass over the scores
            otb = torch.bmm(pt, value)
            if vt is not None:
                otb.baddbmm_(p, vt[r, :visible])
            if own_key:
                pt_own = (dot(qtb, k_self[r, b]) + dot(qb, kt_self[r, b])).mul_(p_own)
                mean += pt_own
                otb.addcmul_(pt_own, v_self[r, b]).addcmul_(p_own, vt_self[r, b])
            mu[r, b] = mean
            torch.addcmul(otb, mean, ob, value=-1, out=ot[r, b])
        ctx.save_for_backward(*given, segments, out, lse, mu)
        ctx.tangent, ctx.causal = tangent, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_all, k_self_all, v_self_all, k_all, v_all, segments, out, lse, mu = ctx.saved_tensors
        tangent, own_key = ctx.tangent, k_self_all is not None
        moving = tangent and not own_key
        scale = 1 / math.sqrt(q_all.shape[-1])
        # Keys and values need no gradient while proposing: half of the products fall away.
        learned = moving or ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grads = [None if t is None else torch.empty_like(t) for t in (q_all, k_self_all, v_self_all)]
        grads += [torch.zeros_like(t) if learned else None for t in (k_all, v_all)]
        (dq, dqt), (dk_self, dkt_self), (dv_self, dvt_self) = (_halves(t, tangent) for t in grads[:3])
        (dk, dkt), (dv, dvt) = (_halves(t, moving) for t in grads[3:])
        (q, qt), (k_self, kt_self), (v_self, vt_self) = (_halves(t, tangent) for t in (q_all, k_self_all, v_self_all))
        (k, kt), (v, vt) = _halves(k_all, moving), _halves(v_all, moving)
        (a, at), (o, ot) = _halves(grad.contiguous(), tangent), _halves(out, tangent)
        rows, queries, _ = q.shape
        future = _future(q, ctx.causal)
        for r, b, visible in _blocks(queries, k.shape[1], rows, ctx.causal):
            key, value, qb, ab, ob = k[r, :visible], v[r, :visible], q[r, b] * scale, a[r, b], o[r, b]
            p = torch.bmm(qb, key.mT)
            _hide(p, b, visible, future, segments, r)
            exp_minus(p, lse[r, b], p)
            delta = dot(ab, ob)
            ds = torch.bmm(ab, value.mT)  # A
            if tangent:
                qtb, bb = qt[r, b] * scale, at[r, b]
                delta += dot(bb, ot[r, b])
                beta = dot(bb, ob)
                if vt is not None:
                    ds.baddbmm_(bb, vt[r, :visible].mT)
                dst = torch.bmm(bb, value.mT).sub_(beta)  # B - beta
                st = torch.bmm(qtb, key.mT)
                if kt is not None:
                    st.baddbmm_(qb, kt[r, :visible].mT)
                st.sub_(mu[r, b])  # s' - mu
                ds.sub_(delta).addcmul_(st, dst).mul_(p)
                dst.mul_(p)
                by_qt = torch.bmm(dst, key)
                if learned:
                    dk[r, :visible].baddbmm_(dst.mT, qtb)
                    dv[r, :visible].baddbmm_(st.mul_(p).mT, bb)
                if vt is not None:
                    dkt[r, :visible].baddbmm_(dst.mT, qb)
                    dvt[r, :visible].baddbmm_(p.mT, bb)
            else:
                ds.sub_(delta).mul_(p)
            by_q = torch.bmm(ds, key)
            if kt is not None:
                by_q.baddbmm_(dst, kt[r, :visible])
            if learned:
                dk[r, :visible].baddbmm_(ds.mT, qb)
                dv[r, :visible].baddbmm_(p.mT, ab)
            if own_key:
                kb, vb = k_self[r, b], v_self[r, b]
                p_own = (dot(qb, kb) - lse[r, b]).exp_()
                ds_own = dot(ab, vb).sub_(delta)
                torch.mul(p_own, ab, out=dv_self[r, b])
                if tangent:
                    ktb = kt_self[r, b]
                    st_own = dot(qtb, kb).add_(dot(qb, ktb)).sub_(mu[r, b])
                    dst_own = dot(bb, vb).sub_(beta)
                    ds_own.add_(dot(bb, vt_self[r, b])).addcmul_(st_own, dst_own)
                    dst_own.mul_(p_own)
                    dv_self[r, b].addcmul_(st_own.mul_(p_own), bb)
                    torch.mul(p_own, bb, out=dvt_self[r, b])
                    torch.mul(dst_own, qb, out=dkt_self[r, b])
                    by_q.addcmul_(dst_own, ktb)
                    by_qt.addcmul_(dst_own, kb)
                torch.mul(ds_own.mul_(p_own), qb, out=dk_self[r, b])
                by_q.addcmul_(ds_own, kb)
                if tangent:
                    dk_self[r, b].addcmul_(dst_own, qtb)
            torch.mul(by_q, scale, out=dq[r, b])
            if tangent:
                torch.mul(by_qt, scale, out=dqt[r, b])
        return (*grads, None, None, None)


class _Layout(torch.autograd.Function):
    """[S, B, G, H] <-> [B * heads, S, H], as one copy each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int) -> Tensor:
        ctx.batch, ctx.groups = x.shape[1], x.shape[2]
        return _to_heads(x, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _from_heads(grad, ctx.batch, ctx.groups), None


def _repeat_segments(segments: Tensor | None, heads: int) -> Tensor | None:
    return None if segments is None else segments.repeat_interleave(heads, 0)


def context_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, block: int = 1) -> Tensor:
    """See `Kernels.context_attention`."""
    heads, dtype = q.shape[2], q.dtype
    if segments is None and block == 1:
        repeat = heads // k.shape[2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)
    batch = q.shape[1]
    q, k, v = (_Layout.apply(t, heads) for t in wide(q, k, v))
    o = _Attention.apply(q, None, None, k, v, False, block, _repeat_segments(segments, heads))
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
    block: int = 1,
) -> Tensor:
    """See `Kernels.prediction_attention`."""
    heads, dtype, batch = q.shape[2], q.dtype, q.shape[1]
    segments = _repeat_segments(segments, heads)
    q, k_self, v_self, k, v = (_Layout.apply(t, heads) for t in wide(q, k_self, v_self, k, v))
    o = _Attention.apply(q, k_self, v_self, k, v, tangent, block, segments)
    return _from_heads(o, batch, heads).flatten(2).to(dtype)


# --- elementwise ------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """y = r x w, r = 1 / rms(x);  y' = r (x' - r^2 <x x'> x) w, with <.> the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, tangent: bool) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        scales = []
        for s in positions(x):
            value, *directions = wide(*streams(x[s], tangent))
            r = torch.rsqrt(value.square().mean(-1, keepdim=True).add_(epsilon))
            scales.append(r)
            results = [value * r]
            for direction in directions:
                along = dot(value, direction).mul_(r**3).div_(-x.shape[-1])
                results.append((direction * r).addcmul_(value, along))
            for result, part in zip(results, streams(out[s], tangent), strict=True):
                part.copy_(result.mul_(weight))
        ctx.save_for_backward(x, weight, *scales)
        ctx.tangent = tangent
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With a = w dy, b = w dy' and n = r x:
        #   dx' = r (b - <n b> n),   dw = sum r (dy x + dy' (x' - <n x'> n)),
        #   dx  = r a - r^2 (<n x'> b + <n b> x') - r^2 (<x a> + <x' b> - 3 <n x'> <n b>) n
        x, weight, *scales = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        w = wide(weight)[0]
        w_grad = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        width = x.shape[-1]

        def mean(t: Tensor) -> Tensor:
            return (t @ w).div_(width)[..., None]

        for s, r in zip(positions(x), scales, strict=True):
            (value, *directions), (a, *tangents) = (wide(*streams(t[s], ctx.tangent)) for t in (x, grad))
            product, results = value * a, streams(out[s], ctx.tangent)
            dx = a * r
            if directions:
                (direction,), (b,) = directions, tangents
                product.addcmul_(direction, b)
                crossed = value * b
                along, turned = dot(value, direction).mul_(r).div_(width), mean(crossed).mul_(r)
                dx.addcmul_(b, r**2 * along, value=-1).mul_(w).addcmul_(direction, r**2 * turned, value=-1)
                radial = mean(product).addcmul_(along, turned, value=-3)
                if w_grad is not None:
                    w_grad.addmv_(crossed.flatten(0, 1).mT, (r**2 * along).flatten(), alpha=-1)
                results[1].copy_((b * r).mul_(w).addcmul_(value, r**2 * turned, value=-1))
            else:
                dx.mul_(w)
                radial = mean(product)
            results[0].copy_(dx.addcmul_(value, r**3 * radial, value=-1))
            if w_grad is not None:
                w_grad.addmv_(product.flatten(0, 1).mT, r.flatten())
        return out, None if w_grad is None else w_grad.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, tangent: bool) -> Tensor:
    """See `Kernels.rms_norm`."""
    return _RMSNorm.apply(x, weight, epsilon, tangent)


class _SwiGLU(torch.autograd.Function):
    """y = f(gate) up with f = silu;  y' = f'(gate) gate' up + f(gate) up'."""

    @staticmethod
    def _parts(x: Tensor, block: int, tangent: bool) -> list[Tensor]:
        """Gate and up, and their tangents if there are, [s, B, n, block] each, of x [s, B*, 2 n block]."""
        return [part for half in streams(x, tangent) for part in half.unflatten(-1, (-1, 2, block)).unbind(-2)]

    @staticmethod
    def _results(x: Tensor, block: int, tangent: bool) -> list[Tensor]:
        """The value, and its tangent if there is one, [s, B, n, block] each, of x [s, B*, n block]."""
        return [half.unflatten(-1, (-1, block)) for half in streams(x, tangent)]

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, tangent: bool) -> Tensor:
        ctx.block, ctx.tangent = block, tangent
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        for s in positions(x):
            gate, up, *tangents = _SwiGLU._parts(x[s], block, tangent)
            y, *y_tangent = _SwiGLU._results(out[s], block, tangent)
            sigma = gate.sigmoid()
            f = gate * sigma
            torch.mul(f, up, out=y)
            if tangents:
                slope = f.neg().add_(1).mul_(sigma).add_(f)  # f' = sigma + f (1 - sigma)
                torch.addcmul(slope.mul_(tangents[0]).mul_(up), f, tangents[1], out=y_tangent[0])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for s in positions(x):
            gate, up, *tangents = _SwiGLU._parts(x[s], ctx.block, ctx.tangent)
            a, *b = _SwiGLU._results(grad[s], ctx.block, ctx.tangent)
            d_gate, d_up, *d_tangents = _SwiGLU._parts(out[s], ctx.block, ctx.tangent)
            sigma = gate.sigmoid()
            f = gate * sigma
            rest = 1 - sigma
            slope = torch.addcmul(sigma, f, rest)
            if tangents:
                # f'' = sigma (1 - sigma) (2 + gate (1 - 2 sigma))
                curve = torch.add(gate, f, alpha=-2).add_(2).mul_(sigma).mul_(rest)
                steep = b[0] * slope
                torch.mul(b[0], f, out=d_tangents[1])
                torch.mul(steep, up, out=d_tangents[0])
                torch.addcmul(a * f, steep, tangents[0], out=d_up)
                slope.mul_(a).addcmul_(curve.mul_(b[0]), tangents[0]).mul_(up)
                torch.addcmul(slope, steep, tangents[1], out=d_gate)
            else:
                torch.mul(a, f, out=d_up)
                torch.mul(slope.mul_(a), up, out=d_gate)
        return out, None, None


def swiglu(x: Tensor, block: int, *, tangent: bool) -> Tensor:
    """See `Kernels.swiglu`."""
    return _SwiGLU.apply(x, block, tangent)


# --- the vocabulary: see `ebt_megatron.kernels.vocabulary` ---------------------------------------

vocabulary = Vocabulary(Tiles())
