"""The energy's feed-forward twin for text: a second pass that puts out a change of the first prediction, no energy.

    ebt-train text/quickstart_transformer data.modality=benchmarks.refinement:Refinement

A control of `thinking.initial=context`, on one process. The context stream's output gives logits z. The same layers
then read p = softmax(z), embedded, over the context's keys and values, as a prediction stream does, and an output of
their own puts out z' - z. The loss is the mean of both predictions' in training, and the second's in validation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.flops import Cost
from ebt_megatron.model.initialization import Draw
from ebt_megatron.model.layers import RMSNorm
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.tasks.text import Text
from ebt_megatron.tasks.text_model import TextOutput, TokenEmbedding, embedding_table


class Refiner(TransformerLM):
    """Transformer++ with a second pass.

    Args:
        config, recipe, kernels, embedding, output: as `TransformerLM`.
        table: what the second pass reads of a distribution, an embedding of the vocabulary.
        change: hidden states -> the change of the logits.
    """

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        kernels: Kernels,
        embedding: nn.Module,
        output: TextOutput,
        table: nn.Module,
        change: TextOutput,
    ):
        super().__init__(config, recipe, kernels, embedding, output)
        self.table, self.change, self.second_norm = table, change, RMSNorm(config, kernels)
        self.draws["table.weight"] = Draw(1.0)

    def predictions(self, observed: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, S] -> the logits [S, B, V] of both predictions; the second learns nothing through the first's."""
        assert self.embedding is not None and self.output is not None
        h, length, key_values = self.embedding(observed), observed.shape[1], []
        rotations = self.rotary.table(length, 0, h)
        for layer in self.layers:
            h, k, v = layer.context(h, rotations, segments)
            key_values.append((k, v))
        first = self.output.logits(self.final_norm(h))
        x = first.detach().softmax(-1) @ self.table.weight
        rotations = self.rotary.table(length, self.block, x)
        for layer, key_value in zip(self.layers, key_values, strict=True):
            x = layer.predict(x, key_value, rotations, tangent=False, segments=segments)
        return first, first.detach() + self.change.projection(self.second_norm(x))[0]

    def forward(
        self, observed: Tensor, targets: Tensor, segments: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """See `TransformerLM`."""
        wanted = targets.t().contiguous()
        losses = [vocab_parallel_cross_entropy(z, wanted) for z in self.predictions(observed, segments)]
        return torch.stack(losses).mean(0) if torch.is_grad_enabled() else losses[-1]


class Refinement(Text):
    """Text whose baseline refines its prediction once, a `Task`."""

    kind = "text"

    def feed_forward_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> Refiner:
        """See `Task`; on one stage."""
        assert first and last
        embedding = TokenEmbedding(config, *self._vocab, self.recipe.model.initialization)
        output, change = (TextOutput(config, *self._vocab) for _ in range(2))
        table: Any = embedding_table(config, self._vocab[1], scatter=False)
        return Refiner(config, self.recipe, kernels, embedding, output, table, change)

    def cost(self) -> Cost:
        """See `Task`: twice the layers; two outputs, and p W, of whose gradients the weight's alone is taken."""
        whole = super().cost()
        return replace(whole, layers=2 * whole.layers, vocabulary=(2 + 2 / 3) * whole.vocabulary)
