"""Validation loss against thinking, and what the task measures besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives.interface import Objective


@dataclass
class Validation:
    """Means over all validation positions that count.

    Attributes:
        losses: after 1 .. n thinking steps (nats per token for text), [n]; before them the loss of none, [n + 1], where
            thinking starts at the context's prediction.
        energies: [n] before each step; empty for a feed-forward model.
        positions: predictions the means are over.
        measures: the task's own, by name: a number, or one for each of the losses.
        first: the steps of the first loss, 1 or 0.
    """

    losses: Tensor
    energies: Tensor
    positions: int
    measures: dict[str, Any]
    first: int = 1

    def by_steps(self) -> dict[int, float]:
        """Losses by the number of steps."""
        return dict(enumerate(self.losses.tolist(), self.first))


def validate(objective: Objective, micro_batches: Iterable[MicroBatch], steps: int, measure: bool = True) -> Validation:
    """Evaluate on micro-batches, without noise in step size or number of steps.

    A run of n steps passes through every smaller number of steps, so one pass gives all.

    Args:
        objective: from `ebt_megatron.objectives`.
        micro_batches: this data-parallel rank's share; samples whose `counts` is False are left out.
        steps: n; 0 where thinking starts at the context's prediction, for that alone.
        measure: also take the task's own measures.
    """
    state, task = objective.state, objective.task
    losses: Tensor | None = None
    energies: Tensor | None = None
    positions = torch.zeros(1, dtype=torch.float64, device=state.device)
    first = 0 if objective.starts_at_context else 1
    meter = task.meter(steps + 1 - first, state.device)
    for micro_batch in micro_batches:
        sample = task.sample(micro_batch, state.device)
        size = len(micro_batch.sample_ids)
        valid = torch.ones(size, dtype=torch.bool) if micro_batch.counts is None else micro_batch.counts
        observe = meter.watch(sample, valid.to(state.device)) if measure else None
        thought = objective.evaluate(sample, steps, observe)
        start = [] if thought.initial is None else [thought.initial[None].to(thought.losses)]
        parts = [torch.cat([*start, thought.losses]), thought.energies]
        counted = valid.to(state.device).expand(thought.losses.shape[1], size)
        if sample.counted is not None:
            counted = counted & sample.counted.t()
        if not counted.all():
            zero = torch.zeros((), device=state.device)
            parts = [x.where(counted, zero.to(x.dtype)) for x in parts]
        sums = [x.double().sum((1, 2)) for x in parts]
        losses = sums[0] if losses is None else losses + sums[0]
        energies = sums[1] if energies is None else energies + sums[1]
        positions += counted.sum()
    if losses is None or energies is None:
        raise ValueError("no validation samples on this rank")
    over_data, over_stages = meter.sums()
    # Losses are on the first pipeline stage and energies on the last, zeros elsewhere.
    for tensor in (losses, energies, positions, *over_data, *over_stages):
        dist.all_reduce(tensor, group=state.data_group)
    for tensor in (losses, energies, *over_stages):
        dist.all_reduce(tensor, group=state.pipeline_group)
    measures = meter.results(int(positions), objective.thinks) if measure else {}
    return Validation(losses / positions, energies / positions, int(positions), measures, first)
