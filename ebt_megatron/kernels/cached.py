"""Attention over a cache of keys and values, in plain torch: few queries, keys that no gradient goes to."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, k_self: Tensor | None = None, v_self: Tensor | None = None
) -> Tensor:
    """See `Kernels.cached_attention`."""
    if k_self is None or v_self is None:
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen[:, None], enable_gqa=True)
        return o.transpose(1, 2).flatten(2)
    return _OwnKey.apply(q, k_self, v_self, k, v, seen)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, Q, N, H] -> [B * G, Q * N / G, H]: the queries of a group are rows of one product, so keys are read once."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).reshape(len(x) * groups, -1, x.shape[-1])


def _ungrouped(x: Tensor, like: Tensor, groups: int) -> Tensor:
    """The reverse, of the shape of `like`."""
    batch, queries, heads, size = like.shape
    return x.view(batch, groups, queries, heads // groups, size).transpose(1, 2).reshape(like.shape)


class _OwnKey(torch.autograd.Function):
    """Attention to cached keys and to each query's own: the last column of the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        batch, groups, length, _ = k.shape
        share, scale = q.shape[2] // groups, 1 / math.sqrt(q.shape[-1])
        rows, keys, values = _grouped(q, groups) * scale, k.flatten(0, 1), v.flatten(0, 1)
        own_key, own_value = (_grouped(t.repeat_interleave(share, 2), groups) for t in (k_self, v_self))
        scores = rows.new_empty(*rows.shape[:2], length + 1)
        scores[..., :length] = torch.bmm(rows, keys.mT)
        torch.linalg.vecdot(rows, own_key, out=scores[..., length])
        visible = scores.view(batch, groups, -1, share, length + 1)[..., :length]
        visible.masked_fill_(~seen[:, None, :, None], -math.inf)
        p = scores.softmax(-1)
        o = torch.bmm(p[..., :length], values).addcmul_(p[..., length:], own_value)
        ctx.save_for_backward(q, rows, own_key, own_value, keys, values, p, o)
        return _ungrouped(o, q, groups).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, rows, own_key, own_value, keys, values, p, o = ctx.saved_tensors
        groups, length, scale = len(keys) // len(q), keys.shape[1], 1 / math.sqrt(q.shape[-1])
        a = _grouped(grad.view_as(q), groups)
        p_own, delta = p[..., length:], (a * o).sum(-1, keepdim=True)
        own = ((a * own_value).sum(-1, keepdim=True) - delta) * p_own
        by_scores = torch.bmm(a, values.mT).sub_(delta).mul_(p[..., :length])
        by_q = torch.bmm(by_scores, keys).addcmul_(own, own_key).mul_(scale)
        by_self = [_ungrouped(t, q, groups).unflatten(2, (groups, -1)).sum(3) for t in (own * rows, p_own * a)]
        return _ungrouped(by_q, q, groups), *by_self, None, None, None
