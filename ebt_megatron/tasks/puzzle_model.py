"""What puzzles add to a model: embeddings of clues and of predicted symbols, and the output of the baselines."""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe, ThinkingConfig
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.initialization import Draw
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import replicated
from ebt_megatron.prediction.cells import CellPrediction, cell_weights
from ebt_megatron.tasks.text_model import TextOutput, embedding_table

_KNOWN = Draw(0.5)  # of clues, places and what a recurrent baseline reads of its prediction


class CellEmbedding(MegatronModule):
    """Clues [B, S] (0: none) -> hidden [S(/TP), B, D]: what is given in each cell, and which cell it is.

    Args:
        config: Megatron's.
        cells: S.
        symbols: V.
    """

    def __init__(self, config: TransformerConfig, cells: int, symbols: int):
        super().__init__(config)
        options = {"dtype": config.params_dtype}
        self.clues = replicated(torch.empty(symbols + 1, config.hidden_size, **options), config)
        self.places = replicated(torch.empty(cells, config.hidden_size, **options), config)
        self.draws = {"clues": _KNOWN, "places": _KNOWN}
        self.group = TensorGroup(bool(config.sequence_parallel))

    def forward(self, clues: Tensor) -> Tensor:
        """Clues [B, S] -> [S(/TP), B, D]."""
        own = self.group.own_positions(clues.t()).contiguous()
        return self.clues[own] + self.group.own_positions(self.places)[:, None]


class PuzzleEmbeddings(MegatronModule):
    """The EBT's view of puzzles, `Embeddings`: what is known of each cell, and what is predicted.

    Args:
        config: Megatron's.
        recipe: the run.
        cells: S.
        vocab: V, and V padded.
        kernels: how the hot operations run.
    """

    def __init__(self, config: TransformerConfig, recipe: Recipe, cells: int, vocab: tuple[int, int], kernels: Kernels):
        super().__init__(config)
        self.kernels, self.symbols = kernels, vocab[0]
        self.context = CellEmbedding(config, cells, self.symbols)
        self.prediction_embedding = embedding_table(config, vocab[1], scatter=False)
        self.draws = {
            "prediction_embedding.weight": Draw(2.4 / (recipe.thinking.step_size * math.sqrt(config.hidden_size)))
        }

    def prediction(
        self, targets: Tensor, sample_ids: Tensor, thinking: ThinkingConfig, seed: int, start: Tensor | None = None
    ) -> CellPrediction:
        """See `Embeddings`; targets int64 [B, S], `GIVEN` where nothing is asked, and start [S, B, V / TP] logits."""
        table, group = self.prediction_embedding.weight, TensorGroup(bool(self.config.sequence_parallel))
        return CellPrediction(self.kernels, table, self.symbols, group, targets, sample_ids, thinking, seed, start)


class Feedback(MegatronModule):
    """What a recurrent baseline reads of its last prediction: (p [S, B, V], pass) -> hidden [S(/TP), B, D].

    Args:
        config: Megatron's.
        symbols: V.
        passes: trained; later ones are told they are the last of these.
    """

    def __init__(self, config: TransformerConfig, symbols: int, passes: int):
        super().__init__(config)
        options = {"dtype": config.params_dtype}
        self.symbols = replicated(torch.empty(symbols, config.hidden_size, **options), config)
        self.marks = replicated(torch.empty(passes, config.hidden_size, **options), config)
        self.draws = {"symbols": _KNOWN, "marks": Draw(0.2)}
        self.group = TensorGroup(bool(config.sequence_parallel))

    def forward(self, p: Tensor | None, number: int) -> Tensor:
        """No p: the uniform one."""
        mark = self.marks[min(number, len(self.marks) - 1)]
        if p is None:
            return mark + self.symbols.mean(0)
        return mark + self.group.own_positions(p).to(self.symbols.dtype) @ self.symbols


class PuzzleOutput(TextOutput):
    """The output of the baselines: hidden states -> the cross-entropy of each cell, as `CellPrediction` weights it.

    Attributes:
        y: the logits [S, B, V / TP] that were read last where nothing was learned.
    """

    y: Tensor | None = None

    def logits(self, h: Tensor) -> Tensor:
        """See `TextOutput`."""
        logits = super().logits(h)
        if not torch.is_grad_enabled():
            self.y = logits
        return logits

    @torch.no_grad()
    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of all symbols, [S, B, V], from logits [S, B, V / TP]; nothing is learned through them."""
        return TensorGroup().columns(logits.float())[..., : self.vocab_size].softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy [S, B] of logits [S, B, V / TP] and targets [B, S], times each cell's weight."""
        asked = targets.clamp_min(0).t().contiguous()
        return vocab_parallel_cross_entropy(logits.float(), asked) * cell_weights(targets)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """See `TextOutput`."""
        return self.loss(self.logits(h), targets)
