"""The `reference` backend: plain torch formulas, as short as they can be.

Tangents come from forward-mode differentiation of the value's own formula
(`torch.func.jvp`), so no dual rule is written down here: this backend judges those that
are. It builds full score matrices and full vocabulary rows, works in float64, and serves
tests and small models.

Shapes: hidden states and heads are sequence-first, [S, B, ...]; with `tangent`, value and
tangent are stacked along dim 1, [S, 2B, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.kernels.interface import RefineStats, StepRule, compute_dtype


def _dual(function: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    """Apply a function of the values to stacked inputs; returns value and tangent, stacked."""
    pairs = [x.chunk(2, 1) for x in stacked]
    values, tangents = tuple(v for v, _ in pairs), tuple(t for _, t in pairs)
    return torch.cat(torch.func.jvp(function, values, tangents), 1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, tangent: bool) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def value(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight

    return _dual(value, x) if tangent else value(x)


def layer_norm(x: Tensor, epsilon: float, shift: Tensor, scale: Tensor, *, tangent: bool) -> Tensor:
    """(x - mean) / standard deviation over the last dimension, times 1 + scale, plus shift."""

    def value(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon) * (1 + scale) + shift

    return _dual(value, x) if tangent else value(x)


def swiglu(x: Tensor, block: int, *, tangent: bool) -> Tensor:
    """silu(gate) * up; gate and up alternate in blocks of `block` columns: [..., 2F] -> [..., F]."""

    def value(x: Tensor) -> Tensor:
        gate, up = x.unflatten(-1, (-1, 2, block)).unbind(-2)
        return (F.silu(gate) * up).flatten(-2)

    return _dual(value, x) if tangent else value(x)


def gelu(x: Tensor, bias: Tensor, *, tangent: bool) -> Tensor:
    """GELU in its tanh form (arXiv 1606.08415) of x + bias."""

    def value(x: Tensor) -> Tensor:
        x = x + bias
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    return _dual(value, x) if tangent else value(x)


def add_gated(h: Tensor, x: Tensor, gate: Tensor, bias: Tensor, *, tangent: bool) -> Tensor:
    """H + gate (x + bias)."""

    def value(h: Tensor, x: Tensor) -> Tensor:
        return h + gate * (x + bias)

    return _dual(value, h, x) if tangent else value(h, x)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[S, B, G, H] -> [B, heads, S, H], repeating each group for its queries."""
    return x.repeat_interleave(heads // x.shape[2], 2).permute(1, 2, 0, 3)


def _hidden(o: Tensor) -> Tensor:
    return o.permute(2, 0, 1, 3).flatten(2)


def _mask(length: int, segments: Tensor | None, block: int, like: Tensor) -> Tensor:
    """0 where context key s may be seen from row t, else -inf; [S, S] or [B, 1, S, S]."""
    number = torch.arange(length, device=like.device) // block
    mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    mask.masked_fill_(number > number[:, None], -math.inf)
    if segments is None:
        return mask
    other = segments[:, :, None] != segments[:, None, :]
    return torch.where(other[:, None], -math.inf, mask)


def context_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, block: int = 1) -> Tensor:
    """Causal attention, by blocks; q [S, B, N, H], k and v [S, B, G, H] -> [S, B, N*H]."""
    heads = q.shape[2]
    k, v = _heads_first(k, heads), _heads_first(v, heads)
    scores = _heads_first(q, heads) @ k.mT / math.sqrt(q.shape[-1]) + _mask(len(q), segments, block, q)
    return _hidden(scores.softmax(-1) @ v)


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
    """Row t attends to the context keys of its block and of those before it (of its document), and to its own key."""
    heads = q.shape[2]
    keys, values = _heads_first(k, heads), _heads_first(v, heads)
    mask = _mask(len(q), segments, block, q)

    def value(q: Tensor, k_self: Tensor, v_self: Tensor) -> Tensor:
        q, k_self, v_self = (_heads_first(t, heads) for t in (q, k_self, v_self))
        scale = 1 / math.sqrt(q.shape[-1])
        own = (q * k_self).sum(-1, keepdim=True) * scale
        p = torch.cat([q @ keys.mT * scale + mask, own], -1).softmax(-1)
        return _hidden(p[..., :-1] @ values + p[..., -1:] * v_self)

    return _dual(value, q, k_self, v_self) if tangent else value(q, k_self, v_self)


def full_attention(mixed: Tensor, bias: Tensor, size: int, *, tangent: bool) -> Tensor:
    """Every position attends to every other; its query, key and value are in `mixed` + bias, head by head."""

    def value(mixed: Tensor) -> Tensor:
        q, k, v = (mixed + bias).unflatten(-1, (-1, 3, size)).permute(3, 1, 2, 0, 4)
        return _hidden((q @ k.mT / math.sqrt(size)).softmax(-1) @ v)

    return _dual(value, mixed) if tangent else value(mixed)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, k_self: Tensor | None = None, v_self: Tensor | None = None
) -> Tensor:
    """See `Kernels.cached_attention`."""
    q = q.transpose(1, 2)
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ keys.mT
    if k_self is not None and v_self is not None:
        own_key, own_value = (
            t.repeat_interleave(q.shape[1] // t.shape[2], 2).transpose(1, 2) for t in (k_self, v_self)
        )
        scores = torch.cat([scores, (q * own_key).sum(-1, keepdim=True)], -1)
        seen = F.pad(seen, (0, 1), value=True)
    p = (scores / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None], -math.inf).softmax(-1)
    o = p[..., : k.shape[2]] @ values
    if k_self is not None:
        o = o + p[..., -1:] * own_value
    return o.transpose(1, 2).flatten(2)


# --- the vocabulary (see ebt_megatron.kernels.interface for the notation) --------------------


def _probabilities(y: Tensor, lse: Tensor, valid: int) -> Tensor:
    p = (y - lse[:, None]).exp()
    p[:, valid:] = 0
    return p


def _log_sum_exp(y: Tensor, valid: int) -> Tensor:
    return y[:, :valid].logsumexp(-1)


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(1, target.clamp_min(0)[:, None], (target >= 0)[:, None].to(like.dtype))


def _step(
    y: Tensor,
    lse: Tensor,
    table: Tensor,
    valid: int,
    energy_grad: Tensor,
    centre: Tensor,
    alpha: Tensor,
    rule: StepRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """p, g and y'."""
    p = _probabilities(y, lse, valid)
    g = energy_grad @ table.to(p.dtype).mT
    if rule is StepRule.LOGIT:
        g = p * (g - centre[:, None])
    start = p if rule is StepRule.PROBABILITY else y
    moved = (start - alpha[:, None] * g).to(y.dtype)
    return p, g, torch.cat([moved[:, :valid], y[:, valid:]], 1)


def _factor(p: Tensor, rule: StepRule) -> Tensor:
    """r of the interface's notation."""
    return p if rule is StepRule.LOGIT else torch.ones_like(p)


def vocab_embed(y: Tensor, table: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """See `Kernels.vocab_embed`."""
    y = y.to(compute_dtype(y, table))
    lse = _log_sum_exp(y, valid)
    return _probabilities(y, lse, valid) @ table.to(lse.dtype), lse


def vocab_refine(
    y: Tensor,
    lse: Tensor,
    table: Tensor,
    valid: int,
    energy_grad: Tensor,
    centre: Tensor,
    alpha: Tensor,
    target: Tensor,
    rule: StepRule,
    y_next: Tensor | None = None,
) -> RefineStats:
    """See `Kernels.vocab_refine`."""
    p, _, moved = _step(y, lse, table, valid, energy_grad, centre, alpha, rule)
    lse_next = _log_sum_exp(moved.to(lse.dtype), valid)
    weighted = _factor(p, rule) * _probabilities(moved, lse_next, valid)
    if y_next is not None:
        y_next[:, :valid] = moved[:, :valid]
    hot = _one_hot(target, p)
    return RefineStats(
        lse_next=lse_next,
        target_logit=(hot * moved).sum(-1),
        p_target=(hot * p).sum(-1),
        mean=weighted.sum(-1),
        embedded=weighted @ table.to(p.dtype),
    )


def vocab_backward(
    y: Tensor,
    lse: Tensor,
    table: Tensor,
    valid: int,
    energy_grad: Tensor,
    centre: Tensor,
    alpha: Tensor,
    target: Tensor,
    rule: StepRule,
    lse_next: Tensor,
    scale: Tensor,
    mean: Tensor,
    x_grad: Tensor | None,
    xt_grad: Tensor,
    table_grad: Tensor,
    y_next: Tensor | None = None,
) -> None:
    """See `Kernels.vocab_backward`."""
    p, _, moved = _step(y, lse, table, valid, energy_grad, centre, alpha, rule)
    direction = scale[:, None] * (_probabilities(moved, lse_next, valid) - _one_hot(target, p))
    if rule is StepRule.LOGIT:
        direction = p * (direction - mean[:, None])
    table_grad[:valid] += (direction.mT @ xt_grad)[:valid]
    if x_grad is not None:
        table_grad[:valid] += (p.mT @ x_grad)[:valid]
    if y_next is None:
        y.copy_(moved)


def vocab_update(
    y: Tensor,
    lse: Tensor,
    table: Tensor,
    valid: int,
    energy_grad: Tensor,
    centre: Tensor,
    alpha: Tensor,
    rule: StepRule,
) -> None:
    """See `Kernels.vocab_update`."""
    y.copy_(_step(y, lse, table, valid, energy_grad, centre, alpha, rule)[2])


def vocab_adjoint(
    y_next: Tensor, lse_next: Tensor, target: Tensor, weight: Tensor, valid: int, adjoint: Tensor
) -> None:
    """See `Kernels.vocab_adjoint`."""
    adjoint += weight[:, None] * (_probabilities(y_next, lse_next, valid) - _one_hot(target, adjoint))


def vocab_dot_step(
    y: Tensor,
    lse: Tensor,
    table: Tensor,
    valid: int,
    energy_grad: Tensor,
    centre: Tensor,
    rule: StepRule,
    adjoint: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `Kernels.vocab_dot_step`."""
    p, g, _ = _step(y, lse, table, valid, energy_grad, centre, centre, rule)
    return (adjoint * g)[:, :valid].sum(-1), (p * adjoint).sum(-1)


def vocab_tangent(
    y: Tensor, lse: Tensor, table: Tensor, valid: int, rule: StepRule, adjoint: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Kernels.vocab_tangent`."""
    weighted = _factor(_probabilities(y, lse, valid), rule) * adjoint
    return adjoint[:, :valid].square().sum(-1), weighted[:, :valid] @ table[:valid].to(lse.dtype)


def vocab_to_logits(y: Tensor, lse: Tensor, valid: int, mean: Tensor, adjoint: Tensor) -> None:
    """See `Kernels.vocab_to_logits`."""
    adjoint[:, :valid] = (_probabilities(y, lse, valid) * (adjoint - mean[:, None]))[:, :valid]


def vocab_dense_backward(
    y: Tensor,
    lse: Tensor,
    table: Tensor,
    valid: int,
    rule: StepRule,
    adjoint: Tensor,
    scale: Tensor,
    mean: Tensor,
    x: Tensor,
    xt: Tensor,
    x_grad: Tensor,
    xt_grad: Tensor,
    table_grad: Tensor,
) -> None:
    """See `Kernels.vocab_dense_backward`.

    With u = x_grad W^T, w = xt_grad W^T and d = scale lambda - mean, the derivative of
    <u, p> + <w, p d> by y_k is p_k (u_k - <p,u> + (w_k - <p,w>) d_k - <w, p d>), where
    <p,u> = <x, x_grad>, <p,w> = <x, xt_grad> and <w, p d> = <xt, xt_grad>. Where the step is
    along dE/dp, xt does not depend on y, and the derivative of <u, p> alone is left.
    """
    p = _probabilities(y, lse, valid)
    u, w = x_grad @ table.to(lse.dtype).mT, xt_grad @ table.to(lse.dtype).mT
    through = u - (x * x_grad).sum(-1, keepdim=True)
    direction = scale[:, None] * adjoint
    if rule is StepRule.LOGIT:
        direction -= mean[:, None]
        through += (w - (x * xt_grad).sum(-1, keepdim=True)) * direction - (xt * xt_grad).sum(-1, keepdim=True)
        direction *= p
    table_grad[:valid] += (p.mT @ x_grad + direction.mT @ xt_grad)[:valid]
    start = p * (adjoint - (mean / scale)[:, None]) if rule is StepRule.PROBABILITY else adjoint
    adjoint[:, :valid] = (start + p * through)[:, :valid]
