"""Text: next-token prediction, and what its evaluation counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.flops import Cost, cost, padded
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.prediction.logits import TextPrediction, most_likely
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.text_model import TextEmbeddings, TextOutput, TokenEmbedding
from ebt_megatron.thinking.dual_stream import Thinker


def perplexity(loss: float) -> float:
    """Exp of a mean loss per token (of the mean, not a mean of exponentials)."""
    return math.exp(min(loss, 700.0))


class Text:
    """Next-token prediction, a `Task`.

    Args:
        recipe: the run.
        vocab_size: tokens.
        tokenizer: its file and SHA-256, where they are known.
        end_of_text: the token that ends documents; None: there is none.

    Raises:
        RecipeError: for `data.learn_from=text` where nothing ends a document.
    """

    kind = "text"
    evaluation = "ebt_megatron.evaluation.text_evaluation:TextEvaluation"

    def __init__(
        self,
        recipe: Recipe,
        vocab_size: int,
        tokenizer: tuple[Path | None, str] = (None, ""),
        end_of_text: int | None = None,
    ):
        self.recipe, self.vocab_size, self.end_of_text = recipe, vocab_size, end_of_text
        if recipe.data.learn_from == "text" and end_of_text is None:
            raise RecipeError("data.learn_from=text, and the data does not say what ends a text: set it to all")
        self.tokenizer_file, checksum = tokenizer
        self.length = recipe.data.sequence_length
        self.identity = {"tokenizer": checksum}
        self._vocab = vocab_size, padded(vocab_size, recipe.model.vocab_multiple)

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Text:
        """See `Task`."""
        if recipe.thinking.langevin_on == "embedding":
            raise RecipeError(
                "thinking.langevin_on=embedding is for video and images, data.modality is text: set prediction"
            )
        if recipe.thinking.starts_near_answer:
            raise RecipeError("thinking.starts_near_answer is for puzzles and images, data.modality is text: set 0")
        if recipe.thinking.initial == "observed":
            raise RecipeError(
                "thinking.initial=observed is for video and images, data.modality is text: set noise or zeros"
            )
        if recipe.thinking.starts_at_context and recipe.thinking.step_rule == "probability_descent":
            raise RecipeError(
                "thinking.initial=context needs steps that add up, and thinking.step_rule=probability_descent replaces "
                "the logits it starts at by their probabilities: set thinking.step_rule=mirror_descent"
            )
        manifest = source.manifest
        tokenizer = source.sidecar(), manifest.tokenizer["sha256"]
        return cls(recipe, manifest.vocab_size, tokenizer, manifest.tokenizer.get("end_of_text"))

    @classmethod
    def of_size(cls, recipe: Recipe, vocab_size: int, channels: int) -> Text:
        """See `Task`."""
        return cls(recipe, vocab_size)

    def made_up(self, sample_ids: Tensor) -> MicroBatch:
        """See `Task`: one document a row, all of which are answers."""
        tokens = torch.zeros(len(sample_ids), self.length + 1, dtype=torch.int64)
        documents = tokens.int() if self.recipe.data.document_mask else None
        return MicroBatch(sample_ids, tokens, documents, {"answers": torch.ones_like(tokens)})

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        """Every token but the last is observed, and every one but the first is to be predicted."""
        tokens, documents = batch.samples, batch.documents
        return Sample(
            observed=tokens[:, :-1].to(device),
            targets=tokens[:, 1:].to(device),
            sample_ids=batch.sample_ids.to(device),
            segments=None if documents is None else documents[:, :-1].to(device=device, dtype=torch.int32),
            counted=self._counted(batch, device),
        )

    def _counted(self, batch: MicroBatch, device: torch.device) -> Tensor | None:
        """Which positions count, bool [B, S]; raises DataError where the data does not say."""
        which = self.recipe.data.learn_from
        if which == "all":
            return None
        if which == "text":
            assert self.end_of_text is not None
            return batch.samples[:, 1:].ne(self.end_of_text).to(device)
        if "answers" not in batch.beside:
            raise DataError(
                "data.learn_from=answers, and the shards mark no answers: prepare them with --answers-after, or set "
                "it to all"
            )
        return batch.beside["answers"][:, 1:].bool().to(device)

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> EnergyTransformer:
        """See `Task`."""
        embeddings = TextEmbeddings(config, self.recipe, *self._vocab, kernels) if first else None
        return EnergyTransformer(config, self.recipe, kernels, embeddings, first, last)

    def feed_forward_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> TransformerLM:
        """See `Task`: Transformer++."""
        embedding = TokenEmbedding(config, *self._vocab, self.recipe.model.initialization) if first else None
        output = TextOutput(config, *self._vocab) if last else None
        return TransformerLM(config, self.recipe, kernels, embedding, output, first, last)

    def cost(self) -> Cost:
        """See `Task`."""
        return cost(self.recipe, self.vocab_size)

    def meter(self, steps: int, device: torch.device) -> TextMeter:
        """See `Task`."""
        return TextMeter(steps, self.vocab_size, device)

    def describe(self, loss: float) -> dict[str, float]:
        """Return the perplexity of a loss."""
        return {"perplexity": perplexity(loss)}

    def example(self, sample: Sample, thinker: Thinker, steps: int) -> dict[str, Any] | None:
        """See `Task`."""
        if self.tokenizer_file is None:
            return None
        from tokenizers import Tokenizer

        from ebt_megatron.tasks.text_example import worked_example

        return worked_example(
            sample, thinker, steps, self.recipe.thinking.max_steps, Tokenizer.from_file(str(self.tokenizer_file))
        )


class TextMeter:
    """How often each token was a target; and, after every step, how many most likely tokens are right, or changed.

    Args:
        steps: n.
        vocab_size: V.
        device: of the counts.
    """

    def __init__(self, steps: int, vocab_size: int, device: torch.device):
        self.counts = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.right, self.changed = torch.zeros(2, steps, dtype=torch.float64, device=device)

    def watch(self, sample: Sample, valid: Tensor) -> Callable[[TextPrediction], None]:
        """See `Meter`."""
        valid = valid.to(self.counts.device)[:, None].expand(sample.targets.shape)
        valid = valid if sample.counted is None else valid & sample.counted
        seen = torch.bincount(sample.targets[valid], minlength=len(self.counts))
        self.counts += seen.double()
        targets, valid = sample.targets.t(), valid.t()
        taken: list[Tensor] = []

        def observe(prediction: TextPrediction) -> None:
            token, step = most_likely(prediction), len(taken)
            self.right[step] += ((token == targets) & valid).sum()
            if taken:
                self.changed[step] += ((token != taken[-1]) & valid).sum()
            taken.append(token)

        return observe

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `Meter`: predictions are on the first pipeline stage alone."""
        return [self.counts], [self.right, self.changed]

    def results(self, positions: int, thinks: bool) -> dict[str, Any]:
        """Accuracy and changed [n], the first of changed NaN; the entropy of the targets, in nats.

        That entropy is the loss of the best prediction that ignores the context.
        """
        p = self.counts[self.counts > 0] / self.counts.sum()
        out: dict[str, Any] = {"unigram_entropy": float(-(p * p.log()).sum())}
        if thinks:
            self.changed[:1] = torch.nan
            out["accuracy"], out["changed"] = (self.right / positions).tolist(), (self.changed / positions).tolist()
        return out
