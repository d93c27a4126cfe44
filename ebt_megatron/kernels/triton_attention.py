"""Attention of the `triton` backend: one online-softmax family with a TANGENT switch.

The formulas are those of `ebt_megatron.kernels.tiled`. A program takes a block of queries
(forward, `_queries_backward`) or of keys (`_keys_backward`), so that nothing is added up
with atomics. Value and tangent queries of a block share the loads of keys and values.
Products accumulate in fp32; fp32 inputs multiply in full fp32. Blocks of scores that are seen
whole are not masked; exponentials are of base 2, as the hardware's. CAUSAL is 0 where every row
sees every key, else the number of neighbouring rows that see each other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(base, rows, stride, rows_end, H, BH: tl.constexpr):
    """A tile [rows, BH] of one head, zero outside."""
    d = tl.arange(0, BH)
    inside = (rows < rows_end)[:, None] & (d < H)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, stride, rows_end, H, value, BH: tl.constexpr):
    d = tl.arange(0, BH)
    inside = (rows < rows_end)[:, None] & (d < H)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * stride + d[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_both(K, V, rows, ks, vs, S, H, BH: tl.constexpr):
    """Rows of keys and of values."""
    return _load(K, rows, ks, S, H, BH), _load(V, rows, vs, S, H, BH)


@triton.jit
def _of_rows(vector, KEYS_FIRST: tl.constexpr):
    """One number for each query, to go with a tile of scores."""
    return vector[None, :] if KEYS_FIRST else vector[:, None]


@triton.jit
def _of_columns(vector, KEYS_FIRST: tl.constexpr):
    return vector[:, None] if KEYS_FIRST else vector[None, :]


@triton.jit
def _hide(
    scores, hidden, rows, columns, SEG, S, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """`hidden` in place of scores that queries [rows] do not see; SEG points at the sample's document numbers."""
    seen = _of_columns(columns < S, KEYS_FIRST)
    if CAUSAL:
        seen = seen & (_of_columns(columns // CAUSAL, KEYS_FIRST) <= _of_rows(rows // CAUSAL, KEYS_FIRST))
    if SEGMENTS:
        of_rows = tl.load(SEG + rows, mask=rows < S, other=-1)
        of_columns = tl.load(SEG + columns, mask=columns < S, other=-2)
        seen = seen & (_of_rows(of_rows, KEYS_FIRST) == _of_columns(of_columns, KEYS_FIRST))
    return tl.where(seen, scores, hidden)


@triton.jit
def _range(block, S, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Bound the keys of a block of queries: all of them see keys before the first number, none from the second on."""
    end = S
    whole = S // BN * BN
    if CAUSAL:
        end = tl.minimum(S, tl.cdiv((block + 1) * BM, CAUSAL) * CAUSAL)
        whole = tl.minimum(S, (block * BM // CAUSAL + 1) * CAUSAL) // BN * BN
    if SEGMENTS:
        whole = 0
    return whole, end


@triton.jit
def _attend(
    q, qt, acc, acc_t, top, total, mean, K, V, ks, vs, KT_AT, VT_AT, SEG, rows, start, S, H, scale,
    MASK: tl.constexpr, TANGENT: tl.constexpr, KT: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr,
):
    """Take BN keys in; `top` is the largest score so far, the sums are relative to it."""
    columns = start + tl.arange(0, BN)
    k, v = _load_both(K, V, columns, ks, vs, S, H, BH)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK:
        s = _hide(s, float("-inf"), rows, columns, SEG, S, CAUSAL, SEGMENTS, False)
    new_top = tl.maximum(top, tl.max(s, 1))
    factor = tl.exp2((top - new_top) * (scale * _LOG2E))
    p = tl.exp2(s * (scale * _LOG2E) - (new_top * (scale * _LOG2E))[:, None])
    total = total * factor + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    if TANGENT:
        st = tl.dot(qt, tl.trans(k), input_precision="ieee")
        if KT:
            kt = _load(KT_AT, columns, ks, S, H, BH)
            st = tl.dot(q, tl.trans(kt), st, input_precision="ieee")
        pt = p * (st * scale)
        mean = mean * factor + tl.sum(pt, 1)
        acc_t = tl.dot(pt.to(v.dtype), v, acc_t * factor[:, None], input_precision="ieee")
        if KT:
            vt = _load(VT_AT, columns, vs, S, H, BH)
            acc_t = tl.dot(p.to(v.dtype), vt, acc_t, input_precision="ieee")
    return acc, acc_t, new_top, total, mean


@triton.jit
def _forward(
    Q, KS, VS, K, V, OUT, LSE, MU, SEG,
    qs, qb, qn, kss, ksb, ksn, vss, vsb, vsn, ks, kb, kn, vs, vb, vn,
    B, N, G, S, H, scale,
    TANGENT: tl.constexpr, OWN: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):
    """Output, log-sum-exp and mean tangent score of BM queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see most go first
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    streams = 2 if TANGENT else 1
    KT: tl.constexpr = TANGENT and not OWN  # the keys carry a tangent
    g = n // (N // G)
    rows = block * BM + tl.arange(0, BM)
    q = _load(Q + b * qb + n * qn, rows, qs, S, H, BH)
    qt = q
    K += b * kb + g * kn
    V += b * vb + g * vn
    SEG += b * S
    if TANGENT:
        qt = _load(Q + (b + B) * qb + n * qn, rows, qs, S, H, BH)
    mean = tl.zeros([BM], tl.float32)
    if OWN:  # start from the prediction's own key, which every row sees
        k_own = _load(KS + b * ksb + g * ksn, rows, kss, S, H, BH).to(tl.float32)
        acc = _load(VS + b * vsb + g * vsn, rows, vss, S, H, BH).to(tl.float32)
        top = tl.sum(q.to(tl.float32) * k_own, 1)
        total = tl.full([BM], 1.0, tl.float32)
        acc_t = acc
        if TANGENT:
            kt_own = _load(KS + (b + B) * ksb + g * ksn, rows, kss, S, H, BH).to(tl.float32)
            vt_own = _load(VS + (b + B) * vsb + g * vsn, rows, vss, S, H, BH).to(tl.float32)
            mean = tl.sum(qt.to(tl.float32) * k_own + q.to(tl.float32) * kt_own, 1) * scale
            acc_t = mean[:, None] * acc + vt_own
    else:
        top = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BH], tl.float32)
        acc_t = acc
    whole, end = _range(block, S, CAUSAL, SEGMENTS, BM, BN)
    for start in range(0, whole, BN):
        acc, acc_t, top, total, mean = _attend(
            q, qt, acc, acc_t, top, total, mean, K, V, ks, vs, K + B * kb, V + B * vb, SEG, rows, start, S, H, scale,
            False, TANGENT, KT, CAUSAL, SEGMENTS, BN, BH,
        )
    for start in range(whole, end, BN):
        acc, acc_t, top, total, mean = _attend(
            q, qt, acc, acc_t, top, total, mean, K, V, ks, vs, K + B * kb, V + B * vb, SEG, rows, start, S, H, scale,
            True, TANGENT, KT, CAUSAL, SEGMENTS, BN, BH,
        )
    out = acc / total[:, None]
    os, ob = streams * B * N * H, N * H
    _store(OUT + b * ob + n * H, rows, os, S, H, out, BH)
    at = (b * N + n) * S + rows
    tl.store(LSE + at, top * scale + tl.log(total), mask=rows < S)
    if TANGENT:
        mean = mean / total
        _store(OUT + (b + B) * ob + n * H, rows, os, S, H, acc_t / total[:, None] - mean[:, None] * out, BH)
        tl.store(MU + at, mean, mask=rows < S)


@triton.jit
def _product(of_rows, of_columns, KEYS_FIRST: tl.constexpr):
    """Scores of queries with keys, [queries, keys] or [keys, queries]."""
    if KEYS_FIRST:
        out = tl.dot(of_columns, tl.trans(of_rows), input_precision="ieee")
    else:
        out = tl.dot(of_rows, tl.trans(of_columns), input_precision="ieee")
    return out


@triton.jit
def _slopes(
    q, qt, a, bt, k, v, kt, vt, lse, mu, delta, beta, rows, columns, SEG, S, scale, MASK: tl.constexpr,
    TANGENT: tl.constexpr, KT: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    """p, dL/ds, dL/ds' and p (s' - mu) on a tile of scores (the last two only with TANGENT)."""
    s = _product(q, k, KEYS_FIRST)
    p = tl.exp2(s * (scale * _LOG2E) - _of_rows(lse * _LOG2E, KEYS_FIRST))
    if MASK:
        p = _hide(p, 0.0, rows, columns, SEG, S, CAUSAL, SEGMENTS, KEYS_FIRST)
    ds = _product(a, v, KEYS_FIRST)
    dst = ds
    pt = ds
    if TANGENT:
        if KT:
            ds += _product(bt, vt, KEYS_FIRST)
        along = _product(bt, v, KEYS_FIRST) - _of_rows(beta, KEYS_FIRST)
        st = _product(qt, k, KEYS_FIRST)
        if KT:
            st += _product(q, kt, KEYS_FIRST)
        st = st * scale - _of_rows(mu, KEYS_FIRST)
        ds = p * (ds - _of_rows(delta, KEYS_FIRST) + st * along)
        dst = p * along
        pt = p * st
    else:
        ds = p * (ds - _of_rows(delta, KEYS_FIRST))
    return p, ds, dst, pt


@triton.jit
def _to_queries(
    dq, dqt, q, qt, a, bt, lse, mu, delta, beta, K, V, KT_AT, VT_AT, ks, vs, SEG, rows, start, S, H, scale,
    MASK: tl.constexpr, TANGENT: tl.constexpr, KT: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr,
):
    """Add what comes to the queries from BN keys."""
    columns = start + tl.arange(0, BN)
    k, v = _load_both(K, V, columns, ks, vs, S, H, BH)
    kt, vt = k, v
    if KT:
        kt, vt = _load_both(KT_AT, VT_AT, columns, ks, vs, S, H, BH)
    _, ds, dst, _ = _slopes(q, qt, a, bt, k, v, kt, vt, lse, mu, delta, beta, rows, columns, SEG, S, scale,
                            MASK, TANGENT, KT, CAUSAL, SEGMENTS, False)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if TANGENT:
        dqt = tl.dot(dst.to(k.dtype), k, dqt, input_precision="ieee")
        if KT:
            dq = tl.dot(dst.to(k.dtype), kt, dq, input_precision="ieee")
    return dq, dqt


@triton.jit
def _queries_backward(
    Q, KS, VS, K, V, OUT, A, LSE, MU, DELTA, BETA, DQ, DKS, DVS, SEG,
    qs, qb, qn, kss, ksb, ksn, vss, vsb, vsn, ks, kb, kn, vs, vb, vn,
    B, N, G, S, H, scale,
    TANGENT: tl.constexpr, OWN: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):
    """Gradients of BM queries and of their own keys and values; DELTA and BETA for `_keys_backward`.

    OUT, A (gradients of the output), DQ, DKS and DVS are contiguous [S, B*, N, H].
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see most go first
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    streams = 2 if TANGENT else 1
    KT: tl.constexpr = TANGENT and not OWN
    g = n // (N // G)
    rows = block * BM + tl.arange(0, BM)
    stride, first, second = streams * B * N * H, (b * N + n) * H, ((b + B) * N + n) * H
    at = (b * N + n) * S + rows
    q = _load(Q + b * qb + n * qn, rows, qs, S, H, BH)
    a = _load(A + first, rows, stride, S, H, BH)
    o = _load(OUT + first, rows, stride, S, H, BH).to(tl.float32)
    lse = tl.load(LSE + at, mask=rows < S, other=0.0)
    delta = tl.sum(a.to(tl.float32) * o, 1)
    qt, bt, mu, beta = q, a, lse, delta
    if TANGENT:
        qt = _load(Q + (b + B) * qb + n * qn, rows, qs, S, H, BH)
        bt = _load(A + second, rows, stride, S, H, BH)
        ot = _load(OUT + second, rows, stride, S, H, BH).to(tl.float32)
        mu = tl.load(MU + at, mask=rows < S, other=0.0)
        beta = tl.sum(bt.to(tl.float32) * o, 1)
        delta += tl.sum(bt.to(tl.float32) * ot, 1)
        tl.store(BETA + at, beta, mask=rows < S)
    tl.store(DELTA + at, delta, mask=rows < S)
    dq = tl.zeros([BM, BH], tl.float32)
    dqt = tl.zeros([BM, BH], tl.float32)
    if OWN:
        wide_q, wide_a = q.to(tl.float32), a.to(tl.float32)
        k = _load(KS + b * ksb + g * ksn, rows, kss, S, H, BH).to(tl.float32)
        v = _load(VS + b * vsb + g * vsn, rows, vss, S, H, BH).to(tl.float32)
        p = tl.exp2(tl.sum(wide_q * k, 1) * (scale * _LOG2E) - lse * _LOG2E)
        along = tl.sum(wide_a * v, 1) - delta
        if TANGENT:
            wide_qt, wide_bt = qt.to(tl.float32), bt.to(tl.float32)
            kt = _load(KS + (b + B) * ksb + g * ksn, rows, kss, S, H, BH).to(tl.float32)
            vt = _load(VS + (b + B) * vsb + g * vsn, rows, vss, S, H, BH).to(tl.float32)
            st = tl.sum(wide_qt * k + wide_q * kt, 1) * scale - mu
            turn = tl.sum(wide_bt * v, 1) - beta
            ds = p * (along + tl.sum(wide_bt * vt, 1) + st * turn)
            dst = p * turn
            dq = ds[:, None] * k + dst[:, None] * kt
            dqt = dst[:, None] * k
            dk = ds[:, None] * wide_q + dst[:, None] * wide_qt
            dv = p[:, None] * (wide_a + st[:, None] * wide_bt)
            _store(DKS + second, rows, stride, S, H, dst[:, None] * wide_q * scale, BH)
            _store(DVS + second, rows, stride, S, H, p[:, None] * wide_bt, BH)
        else:
            ds = p * along
            dq = ds[:, None] * k
            dk = ds[:, None] * wide_q
            dv = p[:, None] * wide_a
        _store(DKS + first, rows, stride, S, H, dk * scale, BH)
        _store(DVS + first, rows, stride, S, H, dv, BH)
    K += b * kb + g * kn
    V += b * vb + g * vn
    SEG += b * S
    whole, end = _range(block, S, CAUSAL, SEGMENTS, BM, BN)
    for start in range(0, whole, BN):
        dq, dqt = _to_queries(
            dq, dqt, q, qt, a, bt, lse, mu, delta, beta, K, V, K + B * kb, V + B * vb, ks, vs, SEG, rows, start, S, H,
            scale, False, TANGENT, KT, CAUSAL, SEGMENTS, BN, BH,
        )
    for start in range(whole, end, BN):
        dq, dqt = _to_queries(
            dq, dqt, q, qt, a, bt, lse, mu, delta, beta, K, V, K + B * kb, V + B * vb, ks, vs, SEG, rows, start, S, H,
            scale, True, TANGENT, KT, CAUSAL, SEGMENTS, BN, BH,
        )
    _store(DQ + first, rows, stride, S, H, dq * scale, BH)
    if TANGENT:
        _store(DQ + second, rows, stride, S, H, dqt * scale, BH)


@triton.jit
def _to_keys(
    dk, dv, dkt, dvt, k, v, kt, vt, Q, QT, A, BT, LSE, MU, DELTA, BETA, qs, stride, SEG, columns, start, S, H, scale,
    MASK: tl.constexpr, TANGENT: tl.constexpr, KT: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr,
):
    """Add what comes to keys and values from BM queries."""
    rows = start + tl.arange(0, BM)
    q = _load(Q, rows, qs, S, H, BH)
    a = _load(A, rows, stride, S, H, BH)  # rows beyond the end are zero, and so is what they add
    lse = tl.load(LSE + rows, mask=rows < S, other=0.0)
    delta = tl.load(DELTA + rows, mask=rows < S, other=0.0)
    qt, bt, mu, beta = q, a, lse, delta
    if TANGENT:
        qt = _load(QT, rows, qs, S, H, BH)
        bt = _load(BT, rows, stride, S, H, BH)
        mu = tl.load(MU + rows, mask=rows < S, other=0.0)
        beta = tl.load(BETA + rows, mask=rows < S, other=0.0)
    p, ds, dst, pt = _slopes(q, qt, a, bt, k, v, kt, vt, lse, mu, delta, beta, rows, columns, SEG, S, scale,
                             MASK, TANGENT, KT, CAUSAL, SEGMENTS, True)
    dv = tl.dot(p.to(q.dtype), a, dv, input_precision="ieee")
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if TANGENT:
        dv = tl.dot(pt.to(q.dtype), bt, dv, input_precision="ieee")
        dk = tl.dot(dst.to(q.dtype), qt, dk, input_precision="ieee")
    if KT:
        dvt = tl.dot(p.to(q.dtype), bt, dvt, input_precision="ieee")
        dkt = tl.dot(dst.to(q.dtype), q, dkt, input_precision="ieee")
    return dk, dv, dkt, dvt


@triton.jit
def _keys_backward(
    Q, K, V, A, LSE, MU, DELTA, BETA, DK, DV, SEG,
    qs, qb, qn, ks, kb, kn, vs, vb, vn,
    B, N, G, S, H, scale,
    TANGENT: tl.constexpr, KT: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):
    """Gradients of BN keys and values of one group; DK and DV are contiguous, [S, B or 2B, G, H]."""
    block, b, g = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    streams = 2 if TANGENT else 1
    key_streams = 2 if KT else 1
    columns = block * BN + tl.arange(0, BN)
    k = _load(K + b * kb + g * kn, columns, ks, S, H, BH)
    v = _load(V + b * vb + g * vn, columns, vs, S, H, BH)
    kt, vt = k, v
    dk = tl.zeros([BN, BH], tl.float32)
    dv = tl.zeros([BN, BH], tl.float32)
    dkt = tl.zeros([BN, BH], tl.float32)
    dvt = tl.zeros([BN, BH], tl.float32)
    if KT:
        kt = _load(K + (b + B) * kb + g * kn, columns, ks, S, H, BH)
        vt = _load(V + (b + B) * vb + g * vn, columns, vs, S, H, BH)
    begin, whole = 0, 0  # queries from `whole` on see all of these keys
    if CAUSAL:
        begin = block * BN // CAUSAL * CAUSAL // BM * BM
        whole = tl.minimum(tl.cdiv(((block + 1) * BN - 1) // CAUSAL * CAUSAL, BM) * BM, S)
    if SEGMENTS:
        whole = S
    SEG += b * S
    stride = streams * B * N * H
    for head in range(N // G):
        n = g * (N // G) + head
        at = (b * N + n) * S
        Q_AT, QT_AT = Q + b * qb + n * qn, Q + (b + B) * qb + n * qn
        A_AT, BT_AT = A + (b * N + n) * H, A + ((b + B) * N + n) * H
        for start in range(begin, whole, BM):
            dk, dv, dkt, dvt = _to_keys(
                dk, dv, dkt, dvt, k, v, kt, vt, Q_AT, QT_AT, A_AT, BT_AT, LSE + at, MU + at, DELTA + at, BETA + at,
                qs, stride, SEG, columns, start, S, H, scale, True, TANGENT, KT, CAUSAL, SEGMENTS, BM, BH,
            )
        for start in range(whole, S, BM):
            dk, dv, dkt, dvt = _to_keys(
                dk, dv, dkt, dvt, k, v, kt, vt, Q_AT, QT_AT, A_AT, BT_AT, LSE + at, MU + at, DELTA + at, BETA + at,
                qs, stride, SEG, columns, start, S, H, scale, False, TANGENT, KT, CAUSAL, SEGMENTS, BM, BH,
            )
    stride = key_streams * B * G * H
    first = (b * G + g) * H
    _store(DK + first, columns, stride, S, H, dk * scale, BH)
    _store(DV + first, columns, stride, S, H, dv, BH)
    if KT:
        second = ((b + B) * G + g) * H
        _store(DK + second, columns, stride, S, H, dkt * scale, BH)
        _store(DV + second, columns, stride, S, H, dvt, BH)


# Queries and keys of a block, warps and stages, for heads of up to 64, 128 and 256 in 16 bits. From what Triton 3.9
# compiles for sm_90: few instructions for each one of the matrix unit, and hardly a register spilled in the inner loop.
_BLOCKS = {
    ("forward", "value"): ((64, 128, 4, 2), (128, 64, 8, 3), (64, 64, 4, 2)),
    ("forward", "tangent"): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
    ("forward", "tangents of keys"): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
    ("queries", "value"): ((64, 128, 4, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
    ("queries", "tangent"): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
    ("queries", "tangents of keys"): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
    ("keys", "value"): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 8, 1)),
    ("keys", "tangent"): ((32, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)),
    ("keys", "tangents of keys"): ((32, 128, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
}


# Products as large as the scores that each kernel does: for values alone, with a tangent, and with tangents of the
# shared keys too.
PRODUCTS = {"_forward": (2, 4, 6), "_queries_backward": (3, 6, 9), "_keys_backward": (4, 8, 12)}
_ROOM = 232448  # bytes of shared memory that a block may have on an H100: what these were chosen for


@functools.cache
def _room() -> int:
    """Bytes of shared memory that a block may have on the current device; an H100's where there is none."""
    if not torch.cuda.is_available():
        return _ROOM
    return triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


def launch_options(kernel: str, kind: str, size: int, itemsize: int, room: int | None = None) -> dict[str, int]:
    """Block sizes, warps and stages; smaller ones where a block may have less than an H100's.

    Args:
        kernel: "forward", "queries" or "keys".
        kind: "value", "tangent" or "tangents of keys".
        size: of a head.
        itemsize: bytes of a number.
        room: bytes of shared memory that a block may have; None: on the current device.
    """
    padded = max(16, triton.next_power_of_2(size))
    if itemsize == 2 and (_room() if room is None else room) >= _ROOM:
        queries, keys, warps, stages = _BLOCKS[kernel, kind][0 if padded <= 64 else 1 if padded == 128 else 2]
    else:
        queries = keys = 64 if padded <= 64 else 32 if padded == 128 else 16
        warps, stages = (4 if padded <= 64 else 8), 1
    return {"BM": queries, "BN": keys, "BH": padded, "num_warps": warps, "num_stages": stages}


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sum_groups(per_head: Tensor, groups: int) -> Tensor:
    if per_head.shape[2] == groups:
        return per_head
    return per_head.unflatten(2, (groups, -1)).sum(3)


class _Attention(torch.autograd.Function):
    """See `ebt_megatron.kernels.tiled`; without k_self and v_self, keys carry tangents too."""

    @staticmethod
    def forward(ctx: Any, q, k_self, v_self, k, v, segments, tangent: bool, causal: int):
        q, k, v = _unit(q), _unit(k), _unit(v)
        own = k_self is not None
        k_self, v_self = (_unit(k_self), _unit(v_self)) if own else (k, v)
        length, streams, heads, size = q.shape
        batch = streams // 2 if tangent else streams
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch * heads, length, dtype=torch.float32, device=q.device)
        mu = torch.empty_like(lse) if tangent else lse
        seg = lse if segments is None else segments.int().contiguous()
        tensors = (q, k_self, v_self, k, v)
        ctx.strides = [stride for t in tensors for stride in t.stride()[:3]]
        ctx.sizes = (batch, heads, k.shape[2], length, size, 1 / math.sqrt(size))
        ctx.flags = {"TANGENT": tangent, "CAUSAL": causal, "SEGMENTS": segments is not None}
        ctx.own, ctx.kind = own, "value" if not tangent else "tangent" if own else "tangents of keys"
        options = launch_options("forward", ctx.kind, size, q.element_size())
        grid = (triton.cdiv(length, options["BM"]), batch * heads)
        _forward[grid](*tensors, o, lse, mu, seg, *ctx.strides, *ctx.sizes, OWN=own, **ctx.flags, **options)
        ctx.save_for_backward(*tensors, o, lse, mu, seg)
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, k_self, v_self, k, v, o, lse, mu, seg = ctx.saved_tensors
        batch, heads, groups, length, size, _ = ctx.sizes
        grad = grad.contiguous()
        delta, dq = torch.empty_like(lse), torch.empty_like(o)
        beta = torch.empty_like(lse) if ctx.flags["TANGENT"] else delta
        dk_self = torch.empty_like(o) if ctx.own else dq
        dv_self = torch.empty_like(o) if ctx.own else dq
        options = launch_options("queries", ctx.kind, size, q.element_size())
        grid = (triton.cdiv(length, options["BM"]), batch * heads)
        _queries_backward[grid](
            q, k_self, v_self, k, v, o, grad, lse, mu, delta, beta, dq, dk_self, dv_self, seg,
            *ctx.strides, *ctx.sizes, OWN=ctx.own, **ctx.flags, **options,
        )
        dk = dv = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:  # not while proposing
            dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
            dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
            options = launch_options("keys", ctx.kind, size, q.element_size())
            grid = (triton.cdiv(length, options["BN"]), batch * groups)
            _keys_backward[grid](
                q, k, v, grad, lse, mu, delta, beta, dk, dv, seg, *ctx.strides[:3], *ctx.strides[9:], *ctx.sizes,
                KT=ctx.kind == "tangents of keys", **ctx.flags, **options,
            )
        own = (_sum_groups(dk_self, groups), _sum_groups(dv_self, groups)) if ctx.own else (None, None)
        return dq, *own, dk, dv, None, None, None


def prediction_attention(
    q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, *, tangent: bool,
    segments: Tensor | None = None, block: int = 1,
) -> Tensor:
    """See `Kernels.prediction_attention`."""
    return _Attention.apply(q, k_self, v_self, k, v, segments, tangent, block).flatten(2)


def full_attention(mixed: Tensor, bias: Tensor, size: int, *, tangent: bool) -> Tensor:
    """See `Kernels.full_attention`."""
    value, *directions = mixed.chunk(2, 1) if tangent else (mixed,)
    whole = torch.cat([value + bias, *directions], 1) if tangent else value + bias
    q, k, v = whole.unflatten(-1, (-1, 3, size)).unbind(-2)
    return _Attention.apply(q, None, None, k, v, None, tangent, 0).flatten(2)


def context_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, block: int = 1) -> Tensor:
    """See `Kernels.context_attention`: flash-attn or SDPA if plainly causal, else our kernel."""
    if segments is not None or block > 1:
        return _Attention.apply(q, None, None, k, v, segments, False, block).flatten(2)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        flash_attn_func = None
    if flash_attn_func is not None and q.dtype in (torch.bfloat16, torch.float16) and q.is_cuda:
        return flash_attn_func(*(t.transpose(0, 1) for t in (q, k, v)), causal=True).transpose(0, 1).flatten(2)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.permute(2, 0, 1, 3).flatten(2)
