"""The replay buffer in training: which samples of the global batch it feeds, and which it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.objectives.interface import RankState
from ebt_megatron.parallel.setup import ParallelState
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.thinking.replay import Entry, ReplayBuffer, reshard, stack_start


@dataclass
class ReplayedSample(Sample):
    """Fresh samples and, behind them, replayed ones.

    Attributes:
        replayed: the replayed ones' entries.
    """

    replayed: list[Entry] = field(default_factory=list)


class Replaying:
    """This rank's replay buffer.

    Args:
        recipe: the run.
        state: the layout.
    """

    def __init__(self, recipe: Recipe, state: ParallelState):
        self.recipe, self.rank = recipe, state
        self.buffer = ReplayBuffer(recipe.thinking.replay.capacity, recipe.training.seed)
        self.begun = False  # whether any rank's buffer holds something: ranks without slots must know too
        self._ids: dict[int, list[int]] = {}  # of each micro-batch's fresh samples: the device is not asked for them

    @staticmethod
    def share_of(fresh: int) -> int:
        """Replayed samples beside so many fresh ones."""
        return (fresh + 1) // 2

    def in_batch(self) -> int:
        """Replayed samples in the global batch: none until the buffer holds something."""
        return self.share_of(self.recipe.training.global_batch_size) if self.begun else 0

    def _slots(self, index: int, count: int) -> list[int | None]:
        """The replay slots of micro-batch `index` of this rank, in the global batch's order (Megatron's)."""
        first = (index * self.rank.data_size + self.rank.data_rank) * self.recipe.training.micro_batch_size
        return [ReplayBuffer.slot_of(s) for s in range(first, first + count)]

    def extend(self, sample: Sample, index: int, iteration: int, sample_ids: list[int]) -> Sample:
        """The fresh samples of micro-batch `index`, whose ids are given, and behind them those the buffer gives."""
        self._ids[index] = sample_ids
        drawn = [self.buffer.draw(s, iteration) for s in self._slots(index, len(sample.observed)) if s is not None]
        entries = [e for e in drawn if e is not None]
        if not entries:
            return sample
        counted = sample.counted
        if counted is not None:
            all_of_it = torch.ones_like(counted[0])  # of what was kept before the recipe said what counts
            kept = [all_of_it if e.counted is None else e.counted for e in entries]
            counted = torch.cat([counted, torch.stack(kept)])
        ids = torch.tensor([ReplayBuffer.replay_id(e) for e in entries], device=sample.sample_ids.device)
        return ReplayedSample(
            torch.cat([sample.observed, torch.stack([e.observed for e in entries])]),
            torch.cat([sample.targets, torch.stack([e.targets for e in entries])]),
            torch.cat([sample.sample_ids, ids]),
            None,
            stack_start(len(sample.observed), entries, sample.start),
            counted,
            replayed=entries,
        )

    def keep(self, sample: Sample, index: int, final: Tensor | None) -> None:
        """Keep the predictions [S, B, ...] that micro-batch `index` ended with (None off the first stage)."""
        ended: Sequence[Tensor | None] = [None] * len(sample.observed) if final is None else final.unbind(1)
        replayed = sample.replayed if isinstance(sample, ReplayedSample) else []
        fresh = len(sample.observed) - len(replayed)
        for entry, end in zip(replayed, ended[fresh:], strict=True):
            self.buffer.update(entry, end)
        for i, slot in enumerate(self._slots(index, fresh)):
            if slot is not None:
                counted = None if sample.counted is None else sample.counted[i]
                ids = self._ids[index]
                self.buffer.add(slot, ids[i], sample.observed[i], sample.targets[i], ended[i], counted)

    def state(self) -> RankState:
        """What a checkpoint must keep of this rank."""
        return {
            "tensor_rank": self.rank.tensor_rank,
            "pipeline_rank": self.rank.pipeline_rank,
            "replay": self.buffer.state_dict(),
        }

    def load(self, states: list[RankState]) -> None:
        """Take this rank's part of what all ranks of the saving run kept, whatever their layout."""
        size, micro = self.rank.data_size, self.recipe.training.micro_batch_size
        samples = range(0, self.recipe.training.global_batch_size, 2)
        own = {s // 2 for s in samples if s // micro % size == self.rank.data_rank}
        first_stage = [s for s in states if s["pipeline_rank"] == 0]
        self.buffer.load_state_dict(reshard(first_stage, self.rank.tensor_rank, self.rank.tensor_size, own))
        self.begun = any(s["replay"] for s in states)
