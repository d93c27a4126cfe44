"""What a training step computes: one interface for the loop and for evaluation, one module per architecture.

An objective turns the micro-batches of one optimizer step into gradients and totals. All totals are already divided by
the number of positions in the global batch, so that summing over micro-batches and data-parallel ranks gives means,
and no layout changes the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.tasks.interface import Sample, Task
from ebt_megatron.thinking.dual_stream import ThinkingOutput

RankState = dict[str, Any]
Phase = Callable[[str], AbstractContextManager]


class Timing(Protocol):
    """Told what is being done."""

    def phase(self, name: str) -> AbstractContextManager:
        """A context manager around one phase, e.g. "propose"."""
        ...


@dataclass
class BatchMetrics:
    """Per-step means over the global batch, as this rank's share of them.

    Attributes:
        losses: [n] after each thinking step (n = 1 for a feed-forward model).
        energies: [n] before each step; empty for a feed-forward model.
        loss: what is minimised.
        positions: predictions made, over all ranks.
        initial: the loss where thinking starts, if the context says where.
    """

    losses: Tensor
    energies: Tensor
    loss: Tensor
    positions: int
    initial: Tensor | None = None


class Objective(Protocol):
    """An architecture in training and in evaluation.

    Attributes:
        thinks: whether predictions are made in steps.
        starts_at_context: whether they start at the context's own prediction, so that there is one after no step.
        task: the modality.
        state: the layout.
    """

    thinks: bool
    starts_at_context: bool
    task: Task
    state: ParallelState

    def train_batch(self, micro_batches: list[MicroBatch], iteration: int) -> BatchMetrics:
        """Add the gradients of this rank's micro-batches of one optimizer step."""
        ...

    def evaluate(self, sample: Sample, steps: int, observe: Callable[[Any], None] | None = None) -> ThinkingOutput:
        """Per-position losses and energies [steps, S, B] of a micro-batch; nothing is learned."""
        ...

    def rank_state(self) -> RankState | None:
        """What a checkpoint must keep of this rank besides weights."""
        ...

    def load_rank_states(self, states: list[RankState]) -> None:
        """Take this rank's part of what all ranks of the saving run kept, whatever their layout."""
        ...
