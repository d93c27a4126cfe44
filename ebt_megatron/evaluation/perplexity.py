"""Validation loss against thinking, and what it should be compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Validation:
    """Means over all validation positions.

    Attributes:
        losses: [n] after 1 .. n thinking steps (nats per token for text).
        energies: [n] before each step; empty for a feed-forward model.
        positions: predictions the means are over.
        counts: text: [V] how often each token was a target; else empty.
    """

    losses: Tensor
    energies: Tensor
    positions: int
    counts: Tensor

    def unigram_entropy(self) -> float:
        """The loss of the best prediction that ignores the context: entropy of the targets, in nats."""
        p = self.counts[self.counts > 0].double() / self.counts.sum()
        return float(-(p * p.log()).sum())


def perplexity(loss: float) -> float:
    """exp of a mean loss per token (of the mean, not a mean of exponentials)."""
    return math.exp(min(loss, 700.0))


def validate(
    objective: Any, micro_batches: Iterable[Any], steps: int, vocab_size: int, data_group: Any, pipeline_group: Any
) -> Validation:
    """Evaluate on micro-batches, without noise in step size or number of steps.

    A run of n steps passes through every smaller number of steps, so one pass gives all.

    Args:
        objective: from `ebt_megatron.training.objective`.
        micro_batches: this data-parallel rank's share; samples whose `counts` is False are left out.
        steps: n.
        vocab_size: > 0 to count targets.
        data_group: the data-parallel group; its ranks have different samples.
        pipeline_group: losses are on its first stage and energies on its last, zeros elsewhere.
    """
    device = objective.state.device
    losses: Tensor | None = None
    energies: Tensor | None = None
    positions = torch.zeros(1, dtype=torch.float64, device=device)
    counts = torch.zeros(vocab_size, dtype=torch.float64, device=device)
    for micro_batch in micro_batches:
        thought = objective.evaluate(micro_batch, steps)
        valid = micro_batch.counts
        parts = [thought.losses, thought.energies]
        if valid is not None and not valid.all():
            parts = [x.where(valid.to(device), torch.zeros((), dtype=x.dtype, device=device)) for x in parts]
        sums = [x.double().sum((1, 2)) for x in parts]
        losses = sums[0] if losses is None else losses + sums[0]
        energies = sums[1] if energies is None else energies + sums[1]
        samples = thought.losses.shape[2] if valid is None else int(valid.sum())
        positions += thought.losses.shape[1] * samples
        if vocab_size:
            tokens = micro_batch.tokens if valid is None else micro_batch.tokens[valid]
            counts += torch.bincount(tokens[:, 1:].reshape(-1).to(device), minlength=vocab_size).double()
    if losses is None or energies is None:
        raise ValueError("no validation samples on this rank")
    for tensor in (losses, energies, positions, counts):
        dist.all_reduce(tensor, group=data_group)
    for tensor in (losses, energies):
        dist.all_reduce(tensor, group=pipeline_group)
    return Validation(losses / positions, energies / positions, int(positions), counts)
