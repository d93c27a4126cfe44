"""Transformers over the cells of a puzzle, in which every cell sees every other: a joint energy, and its baselines.

All are made of the layers of text (RMSNorm, SwiGLU, no bias), with attention over all cells and learned places in place
of rotations. What is known of each cell is added to what is predicted of it, so that there is no second stream.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.energy import EnergyTransformer, KeyValues
from ebt_megatron.model.reuse import Tape
from ebt_megatron.model.transformer import TransformerLM


class CellEnergy(EnergyTransformer):
    """A stage of the energy of a whole grid, an `EnergyModel`: the sum over cells of what `EnergyTransformer` says.

    The context is what is known of each cell, embedded [S(/TP), B, D]; the first stage adds it to the predictions, and
    the others read nothing of it.

    Attributes:
        separable: predictions see each other.
    """

    separable = False

    def context(self, h: Tensor, length: int, segments: Tensor | None, step: int = 0) -> tuple[Tensor, KeyValues]:
        """See `EnergyModel`: what is known, as it is; there are no values beside it."""
        return h, [(h, h.new_empty(0))] if self.pre_process else []

    def predict(
        self,
        h: Tensor,
        key_values: KeyValues,
        length: int,
        segments: Tensor | None,
        step: int,
        tangent: bool,
        tape: Tape | None = None,
    ) -> Tensor:
        """See `EnergyModel`: on the last stage each cell's share of the grid's energy."""
        if self.pre_process:
            ((known, _),) = key_values
            mark = self._mark(h, step)
            known = known if mark is None else known + mark
            h = h + (torch.cat([known, torch.zeros_like(known)], 1) if tangent else known)
        for layer in self.layers:
            h = self.maybe_recomputed(layer.joint, h, tangent=tangent, tape=tape, kept=tape is not None)
        return self._energy(h, None, tangent) if self.post_process else h


class CellTransformer(TransformerLM):
    """A stage of the baselines: feed-forward, or recurrent, which feeds what it predicts back, detached, and goes on.

    Recurrent, it is the energy's twin: the same layers read what is known, the prediction p of the pass before
    (uniform at first) and which pass it is, and an output reads the new prediction from the last hidden state. The loss
    is the mean over passes.

    Args:
        config, recipe, kernels, embedding, output, pre_process, post_process: as `TransformerLM`.
        feedback: (probabilities [S, B, V], pass) -> hidden [S(/TP), B, D]; None: feed-forward.
        passes: trained.
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
        feedback: nn.Module | None = None,
        passes: int = 1,
    ):
        super().__init__(config, recipe, kernels, embedding, output, pre_process, post_process)
        self.feedback, self.passes = feedback, passes

    def hidden(self, h: Tensor, length: int, segments: Tensor | None) -> Tensor:
        """Run this stage: [S(/TP), B, D] -> the same, normalised on the last stage."""
        for layer in self.layers:
            h = self.maybe_recomputed(layer.joint, h)
        return self.final_norm(h) if self.post_process else h

    def trajectory(self, observed: Tensor, passes: int, start: Tensor | None = None) -> list[Tensor]:
        """The logits [S, B, V / TP] of each pass, on one stage; a pass sees no gradient of the one after it.

        Args:
            observed: clues [B, S].
            passes: of a recurrent network; a feed-forward one takes one.
            start: logits [S, B, V / TP] that the first pass reads; NaN, or None: uniform.
        """
        assert self.embedding is not None and self.output is not None
        known = self.embedding(observed)
        fed, out = None if start is None else start.nan_to_num(0.0), []
        for number in range(passes if self.feedback is not None else 1):
            h = known
            if self.feedback is not None:
                h = h + self.feedback(None if fed is None else self.output.probabilities(fed), number)
            fed = self.output.logits(self.hidden(h, observed.shape[1], None))
            out.append(fed)
        return out

    def forward(
        self, observed: Tensor, targets: Tensor, segments: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Clues [B, S] -> per-cell loss [S, B] (last stage), the mean over the trained passes, or hidden states."""
        if self.feedback is None:
            return super().forward(observed, targets, segments)
        losses = [self.output.loss(z, targets) for z in self.trajectory(observed, self.passes, start)]
        return torch.stack(losses).mean(0)
