"""Validation loss against thinking, and what it should be compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
        right: [n] text: how often the most likely token was the target; empty for a feed-forward model.
        changed: [n] how often it was another one than after the step before; the first is NaN.
    """

    losses: Tensor
    energies: Tensor
    positions: int
    counts: Tensor
    right: Tensor
    changed: Tensor

    def unigram_entropy(self) -> float:
        """The loss of the best prediction that ignores the context: entropy of the targets, in nats."""
        p = self.counts[self.counts > 0].double() / self.counts.sum()
        return float(-(p * p.log()).sum())


class Answers:
    """Counts, after every thinking step, how many most likely tokens are right, and how many the step changed.

    Args:
        steps: n.
        device: of the counts.
    """

    def __init__(self, steps: int, device: torch.device):
        self.right, self.changed = torch.zeros(2, steps, dtype=torch.float64, device=device)

    def watch(self, targets: Tensor, valid: Tensor) -> Callable[[Any], None]:
        """What to call with the prediction after each step of a micro-batch.

        Args:
            targets: int64 [S, B].
            valid: bool [B], the samples that count.
        """
        taken: list[Tensor] = []

        def observe(prediction: Any) -> None:
            token, step = prediction.most_likely(), len(taken)
            self.right[step] += ((token == targets) & valid).sum()
            if taken:
                self.changed[step] += ((token != taken[-1]) & valid).sum()
            taken.append(token)

        return observe


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
        vocab_size: > 0 to count targets and most likely tokens.
        data_group: the data-parallel group; its ranks have different samples.
        pipeline_group: losses are on its first stage and energies on its last, zeros elsewhere.
    """
    device = objective.state.device
    losses: Tensor | None = None
    energies: Tensor | None = None
    positions = torch.zeros(1, dtype=torch.float64, device=device)
    counts = torch.zeros(vocab_size, dtype=torch.float64, device=device)
    answers = Answers(steps, device)
    for micro_batch in micro_batches:
        size = len(micro_batch.sample_ids)
        valid = torch.ones(size, dtype=torch.bool) if micro_batch.counts is None else micro_batch.counts
        observe = None
        if vocab_size:
            targets = micro_batch.tokens[:, 1:]
            counts += torch.bincount(targets[valid].reshape(-1).to(device), minlength=vocab_size).double()
            observe = answers.watch(targets.t().to(device), valid.to(device))
        thought = objective.evaluate(micro_batch, steps, observe)
        parts = [thought.losses, thought.energies]
        if not valid.all():
            parts = [x.where(valid.to(device), torch.zeros((), dtype=x.dtype, device=device)) for x in parts]
        sums = [x.double().sum((1, 2)) for x in parts]
        losses = sums[0] if losses is None else losses + sums[0]
        energies = sums[1] if energies is None else energies + sums[1]
        positions += thought.losses.shape[1] * int(valid.sum())
    if losses is None or energies is None:
        raise ValueError("no validation samples on this rank")
    for tensor in (losses, energies, positions, counts, answers.right, answers.changed):
        dist.all_reduce(tensor, group=data_group)
    for tensor in (losses, energies, answers.right, answers.changed):
        dist.all_reduce(tensor, group=pipeline_group)
    thinks = len(energies) > 0
    right, changed = (x / positions if thinks else x[:0] for x in (answers.right, answers.changed))
    changed[:1] = torch.nan
    return Validation(losses / positions, energies / positions, int(positions), counts, right, changed)
