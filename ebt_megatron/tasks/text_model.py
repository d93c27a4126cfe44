"""What text adds to a model: embeddings of tokens and of predicted distributions, and the output of Transformer++."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe, ThinkingConfig
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.initialization import Draw, draw_of_embedding, draw_of_predictions
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.prediction.logits import TextPrediction
from ebt_megatron.prediction.logits_state import LogitsState


def embedding_table(config: TransformerConfig, padded_vocab_size: int, scatter: bool) -> VocabParallelEmbedding:
    """Rows of D for the entries of a padded vocabulary, cut over tensor-parallel ranks."""
    return VocabParallelEmbedding(
        padded_vocab_size,
        config.hidden_size,
        init_method=config.init_method,
        reduce_scatter_embeddings=scatter,
        config=config,
    )


class TokenEmbedding(MegatronModule):
    """Observed tokens [B, S] -> hidden [S(/TP), B, D]."""

    def __init__(self, config: TransformerConfig, vocab_size: int, padded_vocab_size: int, initialization: str):
        super().__init__(config)
        self.table = embedding_table(config, padded_vocab_size, bool(config.sequence_parallel))
        self.draws = {"table.weight": draw_of_embedding(vocab_size, config.hidden_size, initialization)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> [S(/TP), B, D]."""
        embedded = self.table(tokens)
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()


class TextOutput(MegatronModule):
    """Transformer++'s output: hidden states -> next-token cross-entropy, vocabulary-parallel."""

    def __init__(self, config: TransformerConfig, vocab_size: int, padded_vocab_size: int):
        super().__init__(config)
        self.vocab_size = vocab_size
        self.projection = ColumnParallelLinear(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
        )
        self.draws = {"projection.weight": Draw.xavier(config.hidden_size, vocab_size)}

    def logits(self, h: Tensor) -> Tensor:
        """Hidden [S(/TP), B, D] -> logits [S, B, V / TP]; padded entries never win."""
        logits, _ = self.projection(h)
        local = logits.shape[-1]
        valid = self.vocab_size - local * TensorGroup().rank
        if valid < local:
            padded = torch.arange(local, device=logits.device) >= valid
            logits = logits.masked_fill(padded, torch.finfo(logits.dtype).min / 2)
        return logits

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [S, B] of targets [B, S]."""
        return vocab_parallel_cross_entropy(self.logits(h), targets.t().contiguous())


class TextEmbeddings(MegatronModule):
    """The EBT's view of text: embeddings of observed tokens and of predicted distributions; `Embeddings`."""

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        vocab_size: int,
        padded_vocab_size: int,
        kernels: Kernels,
    ):
        super().__init__(config)
        self.kernels = kernels
        self.vocab_size = vocab_size
        rule, thinking = recipe.model.initialization, recipe.thinking
        self.context = TokenEmbedding(config, vocab_size, padded_vocab_size, rule)
        # Never looked up by token: the vocabulary kernels multiply distributions with its weight.
        self.prediction_embedding = embedding_table(config, padded_vocab_size, scatter=False)
        draw = draw_of_predictions(vocab_size, config.hidden_size, thinking.step_size, thinking.first_step_std, rule)
        self.draws = {"prediction_embedding.weight": draw}
        self.output = TextOutput(config, vocab_size, padded_vocab_size) if thinking.starts_at_context else None

    def prediction(
        self,
        targets: Tensor,
        sample_ids: Tensor,
        thinking: ThinkingConfig,
        seed: int,
        start: Tensor | None = None,
    ) -> TextPrediction:
        """The initial state of a micro-batch of predictions.

        Args:
            targets: [B, S] the next tokens.
            sample_ids: [B] global sample indices, which fix the noise.
            thinking: how it starts and steps.
            seed: the run's seed.
            start: [S, B, V / TP] initial logits instead of noise where not NaN (replayed samples).
        """
        table, group = self.prediction_embedding.weight, TensorGroup(bool(self.config.sequence_parallel))
        output = None if self.output is None else self.output.projection.weight
        return TextPrediction(
            self.kernels, table, self.vocab_size, group, targets, sample_ids, thinking, seed, start, output
        )

    def start(
        self,
        sample_ids: Tensor,
        positions: Tensor,
        thinking: ThinkingConfig,
        seed: int,
        hidden: Tensor | None = None,
    ) -> LogitsState:
        """Return the start of predictions at inference, at any positions of any samples, int64 [R]; see `LogitsState`.

        `hidden` [R, 1, D] is what the output on the context stream reads, where that says where.
        """
        table, group = self.prediction_embedding.weight, TensorGroup()
        state = LogitsState(self.kernels, table, self.vocab_size, group, sample_ids, positions, thinking, seed)
        if self.output is not None:
            assert hidden is not None
            state.begin(hidden[:, 0], self.output.projection.weight)
        return state
