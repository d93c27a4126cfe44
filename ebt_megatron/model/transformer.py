"""Transformer++: the feed-forward baseline, made of the EBT's own layers.

It is exactly the context stream of an EBT (RMSNorm, SwiGLU, rotary positions, no bias)
with a vocabulary output, so that a comparison differs in the objective and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.backbone import Backbone, Scheduled
from ebt_megatron.model.layers import Attend


class TransformerLM(Scheduled, Backbone):
    """One pipeline stage of Transformer++.

    Args:
        config, recipe, kernels, pre_process, post_process, block: as EnergyTransformer.
        embedding: observed samples -> hidden states (first stage); e.g. TokenEmbedding.
        output: hidden states -> loss per position (last stage); e.g. TextOutput.
    """

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        kernels: Kernels,
        embedding: nn.Module | None,
        output: Any,
        pre_process: bool = True,
        post_process: bool = True,
        block: int = 1,
    ):
        super().__init__(config, recipe, kernels, pre_process, post_process, block)
        self.embedding, self.output = embedding, output
        self.add_layers()

    def hidden(self, h: Tensor, length: int, segments: Tensor | None) -> Tensor:
        """Run this stage: [S(/TP), B, D] -> the same, normalised on the last stage."""
        rotations = self.rotary.table(length, 0, h)
        for layer in self.layers:
            h = self.maybe_recomputed(layer.context, h, rotations, segments)[0]
        return self.final_norm(h) if self.post_process else h

    def read(self, h: Tensor, rotations: Tensor, attend: Sequence[Attend], step: int = 0) -> Tensor:
        """Any positions [S, B, D] through this stage, over a cache; as `EnergyTransformer.read`."""
        h = self.stream(h, rotations, attend)
        return self.final_norm(h) if self.post_process else h

    def forward(
        self, observed: Tensor, targets: Tensor, segments: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Observed samples [B, S, ...] -> per-position loss [S, B] (last stage) or hidden states.

        `start` is what the output is a change of, where it is one.
        """
        if self.pre_process:
            assert self.embedding is not None
            h = self.embedding(observed)
        else:
            assert self.input_tensor is not None
            h = self.input_tensor
        h = self.hidden(h, observed.shape[1], segments)
        if not self.post_process:
            return h
        assert self.output is not None
        return self.output(h, targets) if start is None else self.output(h, targets, start)
