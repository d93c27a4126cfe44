"""Captions as conditions of pictures: a small Transformer over their tokens, or a linear map of a frozen vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from ebt_megatron.model.initialization import Draw

_SMALL = Draw(0.02)


@dataclass(frozen=True)
class CaptionShape:
    """What stands for a caption.

    Attributes:
        size: tokens of the longest caption, or channels of its vector.
        entries: of the vocabulary; 0: a caption is a vector.
    """

    size: int
    entries: int


class CaptionEmbedding(MegatronModule):
    """Captions [B, size] -> [B, D]; a caption of no token, or a vector of zeros, is one that is not told.

    Tokens go through a layer of a Transformer (LayerNorm, attention of all to all, LayerNorm, GELU MLP) and are
    averaged; a vector goes through a linear map. It is whole on every tensor-parallel rank.

    Args:
        config: Megatron's.
        shape: of captions.
        parameter: makes one of zeros, of a shape.
    """

    def __init__(self, config: TransformerConfig, shape: CaptionShape, parameter: Callable[..., nn.Parameter]):
        super().__init__(config)
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.epsilon, self.entries = config.layernorm_epsilon, shape.entries
        self.not_told = parameter(width)
        self.draws = {"not_told": _SMALL}
        sizes = {"out": (width, width if shape.entries else shape.size)}
        if shape.entries:
            self.table, self.positions = parameter(shape.entries, width), parameter(shape.size, width)
            self.draws |= {"table": _SMALL, "positions": _SMALL}
            sizes |= {
                "qkv": (3 * width, width),
                "proj": (width, width),
                "fc1": (2 * width, width),
                "fc2": (width, 2 * width),
            }
        for name, (rows, columns) in sizes.items():
            setattr(self, name, parameter(rows, columns))
            setattr(self, f"{name}_bias", parameter(rows))
            self.draws |= {name: Draw.xavier(columns, rows), f"{name}_bias": Draw(0.0)}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, name), getattr(self, f"{name}_bias"))

    def _read(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L], negative after the last one -> [B, D]."""
        valid = tokens >= 0
        valid = valid | F.pad(~valid.any(1, keepdim=True), (0, valid.shape[1] - 1))  # one, where there is none to read
        h = self.table[tokens.clamp_min(0)] + self.positions
        norm = (h.shape[-1],)
        mixed = self._linear("qkv", F.layer_norm(h, norm, eps=self.epsilon)).unflatten(-1, (3, self.heads, -1))
        q, k, v = mixed.unbind(2)
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
        h = h + self._linear("proj", torch.einsum("bnqk,bknh->bqnh", weights, v).flatten(2))
        h = h + self._linear("fc2", F.gelu(self._linear("fc1", F.layer_norm(h, norm, eps=self.epsilon))))
        share = valid.to(h.dtype) / valid.sum(1, keepdim=True)
        return torch.einsum("bl,bld->bd", share, F.layer_norm(h, norm, eps=self.epsilon))

    def forward(self, captions: Tensor) -> Tensor:
        """Captions [B, size], token ids or vectors -> [B, D]."""
        told = (captions >= 0).any(1) if self.entries else captions.any(1)
        read = self._read(captions.long()) if self.entries else captions.to(self.out.dtype)
        return torch.where(told[:, None], self._linear("out", read), self.not_told)
