"""What training, evaluation and inference need to know of a modality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe, ThinkingConfig
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.flops import Cost
from ebt_megatron.model.sharding import StageModule
from ebt_megatron.prediction.interface import Prediction
from ebt_megatron.thinking.dual_stream import Thinker


@dataclass
class Sample:
    """A micro-batch as a model sees it.

    Attributes:
        observed: [B, S, ...] what the context stream reads.
        targets: [B, S, ...] what is to be predicted at each position.
        sample_ids: int64 [B] global sample indices, which fix all noise.
        segments: int32 [B, S] documents, or None.
        start: [S, B, ...] where predictions start (NaN: by `thinking.initial`), or None.
        counted: bool [B, S] whose losses count; None: all do.
        weight: [S, B] what each counts for in the mean over the global batch, of a sample to be learned; None: all
            alike.
    """

    observed: Tensor
    targets: Tensor
    sample_ids: Tensor
    segments: Tensor | None = None
    start: Tensor | None = None
    counted: Tensor | None = None
    weight: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """Where predictions start, [B, S, ...]; of a task whose samples say so."""
        assert self.start is not None
        return self.start.transpose(0, 1)


class Embeddings(Protocol):
    """How an energy model's first stage sees a modality; a module, `EnergyModel.modality`."""

    def context(self, observed: Tensor) -> Tensor:
        """What the context stream begins with, [S(/TP), B, D], of observed values [B, S, ...]."""
        ...

    def prediction(
        self, targets: Tensor, sample_ids: Tensor, thinking: ThinkingConfig, seed: int, start: Tensor | None = None
    ) -> Prediction:
        """The initial state of a micro-batch of predictions.

        Args:
            targets: [B, S, ...].
            sample_ids: int64 [B].
            thinking: how it starts and steps.
            seed: the run's seed.
            start: [S, B, ...] where to start instead, where not NaN.
        """
        ...


class Meter(Protocol):
    """What a task measures in validation besides loss and energy."""

    def watch(self, sample: Sample, valid: Tensor) -> Callable[[Any], None] | None:
        """Look at a micro-batch; what is returned is called with the prediction after each of its steps.

        Args:
            sample: the micro-batch.
            valid: bool [B], the samples that count.
        """
        ...

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is to be summed over data-parallel ranks alone, and over pipeline stages as well."""
        ...

    def results(self, positions: int, thinks: bool) -> dict[str, Any]:
        """Measures by name, once the sums are those of all ranks: a number, or one per step.

        Args:
            positions: predictions seen.
            thinks: whether the model takes steps.
        """
        ...


class Task(Protocol):
    """A modality: what a batch means, the models of it, and what its evaluation is.

    Attributes:
        kind: of the samples it reads: a name of `data.kinds.KINDS`, or package.module:NAME of your own.
        evaluation: package.module:Class of its `evaluation.interface.Evaluation`, a name so that no task imports one;
            a task without this has no suite, and the report of any run.
        length: S, the positions predicted in a sample.
        identity: what a checkpoint must share with the run that loads it, by name.
    """

    kind: str
    length: int
    identity: dict[str, Any]

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Task:
        """The task of a recipe, by what its data says; raises DataError where they do not fit."""
        ...

    @classmethod
    def of_size(cls, recipe: Recipe, vocab_size: int, channels: int) -> Task:
        """The task without data, to plan with: of a vocabulary, or of so many numbers at a position."""
        ...

    def made_up(self, sample_ids: Tensor) -> MicroBatch:
        """A micro-batch of these samples [B] that says nothing, shaped as the loader's: a step without data."""
        ...

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        """A micro-batch of the loader's as a model sees it, on `device`."""
        ...

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> StageModule:
        """This pipeline stage of the EBT: an `EnergyModel` with `modality: Embeddings` on the first stage."""
        ...

    def feed_forward_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> StageModule:
        """This pipeline stage of the baseline: (observed, targets, segments) -> losses [S, B] on the last stage."""
        ...

    def cost(self) -> Cost:
        """FLOPs of the parts of a training step, per sample, and what the model holds."""
        ...

    def meter(self, steps: int, device: torch.device) -> Meter:
        """A new meter of validation over `steps` thinking steps."""
        ...

    def describe(self, loss: float) -> dict[str, float]:
        """A validation loss in the modality's own terms, by name (text: perplexity)."""
        ...

    def example(self, sample: Sample, thinker: Thinker, steps: int) -> dict[str, Any] | None:
        """Thinking about one thing followed in detail, for the report; None: there is nothing to show.

        Args:
            sample: a micro-batch, on one process.
            thinker: of it, ready to think.
            steps: to follow.
        """
        ...


class NoMeter:
    """Nothing besides loss and energy."""

    def watch(self, sample: Sample, valid: Tensor) -> None:
        """See `Meter`."""

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `Meter`."""
        return [], []

    def results(self, positions: int, thinks: bool) -> dict[str, Any]:
        """See `Meter`."""
        return {}
