"""Positions whose losses count, and means over them, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.tasks.interface import Sample


def weighed(samples: Sequence[Sample], state: ParallelState) -> list[Sample]:
    """This rank's micro-batches of a global batch, each position with its weight in the mean over those that count.

    Where none of the global batch counts, nothing is learned.

    Args:
        samples: all of them say which positions count, or none does.
        state: the layout.
    """
    if not samples or samples[0].counted is None:
        return list(samples)
    masks = [sample.counted.t() for sample in samples if sample.counted is not None]
    total = torch.stack([mask.sum() for mask in masks]).sum().double()
    dist.all_reduce(total, group=state.data_group)
    share = 1 / total.clamp_min(1)
    return [replace(sample, weight=mask * share) for sample, mask in zip(samples, masks, strict=True)]


def mean_of(values: Sequence[Tensor], samples: Sequence[Sample], positions: int) -> Tensor:
    """This rank's share of the mean of per-position values [..., S, B] over the global batch, float64 [...].

    Args:
        values: of each micro-batch.
        samples: from `weighed`.
        positions: of the global batch, where all count alike.
    """
    if samples[0].weight is None:
        return torch.stack([v.double().sum((-2, -1)) for v in values]).sum(0) / positions
    pairs = zip(values, samples, strict=True)
    return torch.stack([(v.double() * s.weight).sum((-2, -1)) for v, s in pairs if s.weight is not None]).sum(0)
