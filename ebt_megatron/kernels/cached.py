"""Attention over a cache of keys and values, in plain torch: few queries, keys that no gradient goes to."""

from __future__ import annotations

import math

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
    batch, queries, heads, size = q.shape
    groups = k.shape[1]
    # The queries of a group are rows of one product, so keys are read once and never repeated.
    grouped = (q / math.sqrt(size)).view(batch, queries, groups, heads // groups, size).transpose(1, 2)
    scores = (grouped.flatten(2, 3) @ k.mT).view(*grouped.shape[:-1], -1)
    own_key, own_value = (t.transpose(1, 2)[:, :, :, None] for t in (k_self, v_self))  # [B, G, Q, 1, H]
    scores = scores.masked_fill(~seen[:, None, :, None], -math.inf)
    p = torch.cat([scores, (grouped * own_key).sum(-1, keepdim=True)], -1).softmax(-1)
    o = (p[..., :-1].flatten(2, 3) @ v).view_as(grouped) + p[..., -1:] * own_value
    return o.transpose(1, 2).reshape(batch, queries, -1)
