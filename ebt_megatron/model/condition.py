"""What pictures are conditioned by: the level of noise, the class, the caption; and where in the picture a patch is."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from ebt_megatron.model.captions import CaptionEmbedding, CaptionShape
from ebt_megatron.model.initialization import Draw
from ebt_megatron.parallel.parameters import on_every_stage, replicated

_FREQUENCIES = 128  # of a noise level's embedding, cosine and sine each


def waves(values: Tensor, count: int) -> Tensor:
    """cos and sin of values at `count` frequencies from 1 down to almost 1 / 10,000; [..., 2 * count]."""
    frequency = torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float64, device=values.device) / count)
    angle = values.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def positions_2d(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of patches, row by row, [rows * columns, width]: half of the width for each axis.

    A width that 4 does not divide is filled with zeros.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    both = torch.cat([waves(x.flatten(), width // 4), waves(y.flatten(), width // 4)], -1)
    return F.pad(both, (0, width - both.shape[1]))


class ConditionEmbedding(MegatronModule):
    """(level, class, caption) of pictures -> conditions [B, D]: a learned vector, plus those of what is told.

    Args:
        config: Megatron's.
        vector: whether there is that vector; without it something must be told.
        levels: whether the level is told.
        classes: how many there are; 0: the class is not told. One more stands for "not told".
        captions: what stands for captions; None: they are not told.
        shared: every pipeline stage holds the same weights; Megatron sums their gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vector: bool,
        levels: bool,
        classes: int,
        captions: CaptionShape | None = None,
        shared: bool = False,
    ):
        super().__init__(config)
        width = config.hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            made = replicated(torch.zeros(*shape, dtype=config.params_dtype), config)
            return on_every_stage(made) if shared else made

        self.vector = parameter(width) if vector else None
        self.levels, self.classes = levels, classes
        if levels:
            self.level_in, self.level_in_bias = parameter(width, 2 * _FREQUENCIES), parameter(width)
            self.level_out, self.level_out_bias = parameter(width, width), parameter(width)
        if classes:
            self.table = parameter(classes + 1, width)
        # N(0, 0.02^2), as DiT's (arXiv 2212.09748), and biases 0
        self.draws = {n: Draw(0.0 if n.endswith("bias") else 0.02) for n, _ in self.named_parameters()}
        self.captions = None if captions is None else CaptionEmbedding(config, captions, parameter)

    def forward(self, conditions: Tensor) -> Tensor:
        """Level, class and what stands for the caption, [B, 2 + its size] -> [B, D]."""
        level, label = conditions[:, :2].long().unbind(-1)
        parts = [] if self.vector is None else [self.vector.expand(len(level), -1)]
        if self.levels:
            hidden = F.linear(waves(level, _FREQUENCIES).to(self.level_in.dtype), self.level_in, self.level_in_bias)
            parts.append(F.linear(F.silu(hidden), self.level_out, self.level_out_bias))
        if self.classes:
            parts.append(self.table[label])
        if self.captions is not None:
            parts.append(self.captions(conditions[:, 2:]))
        return functools.reduce(torch.add, parts)
