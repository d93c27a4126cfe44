"""The replay buffer: earlier samples start again from the prediction they ended with.

Training then meets predictions that have been thought about for longer than one training
step allows. One replay slot belongs to each pair of neighbouring samples of the global
batch, so there is one replayed sample for every two fresh ones, and what is replayed does
not depend on how the batch is split over ranks and micro-batches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.core.randomness import stable_seed

# A replayed sample draws new noise each time: its index moves to a range of its own.
_REUSE = 1 << 40


@dataclass
class Entry:
    """One kept sample: what was observed, what to predict, and the last prediction."""

    sample_id: int
    uses: int
    observed: Tensor
    targets: Tensor
    prediction: Tensor | None  # [S, ...], of this tensor-parallel rank; None off the first pipeline stage
    counted: Tensor | None = None  # bool [S] whose losses count; None: all do


class ReplayBuffer:
    """First-in, first-out buffers, one for each replay slot of this rank.

    Args:
        capacity: entries kept per slot.
        seed: of the choice among them.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity, self.seed = capacity, seed
        self.slots: dict[int, deque[Entry]] = {}

    @staticmethod
    def slot_of(batch_slot: int) -> int | None:
        """The replay slot that a sample of the global batch feeds and draws from; every second has one."""
        return batch_slot // 2 if batch_slot % 2 == 0 else None

    def draw(self, slot: int, iteration: int) -> Entry | None:
        """An entry of `slot` to replay in this iteration; the same for every layout."""
        entries = self.slots.get(slot)
        if not entries:
            return None
        return entries[stable_seed(self.seed, "replay", slot, iteration) % len(entries)]

    @staticmethod
    def replay_id(entry: Entry) -> int:
        """The sample index that fixes the noise of this use of an entry."""
        return entry.sample_id + _REUSE * (entry.uses + 1)

    def update(self, entry: Entry, prediction: Tensor | None) -> None:
        """Keep a replayed entry's new prediction."""
        entry.uses += 1
        entry.prediction = None if prediction is None else prediction.clone()

    def add(
        self,
        slot: int,
        sample_id: int,
        observed: Tensor,
        targets: Tensor,
        prediction: Tensor | None,
        counted: Tensor | None = None,
    ) -> None:
        """Keep a fresh sample and the prediction it ended with; the oldest of a full slot goes."""
        entries = self.slots.setdefault(slot, deque(maxlen=self.capacity))
        prediction = None if prediction is None else prediction.clone()
        counted = None if counted is None else counted.clone()
        entries.append(Entry(sample_id, 0, observed.clone(), targets.clone(), prediction, counted))

    def state_dict(self) -> dict[str, Any]:
        """This rank's entries by slot, as plain tensors and integers."""
        return {str(slot): [vars(entry).copy() for entry in entries] for slot, entries in sorted(self.slots.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` or `reshard` gave."""
        self.slots = {
            int(slot): deque((Entry(**entry) for entry in entries), maxlen=self.capacity)
            for slot, entries in state.items()
        }


def reshard(states: list[dict[str, Any]], tensor_rank: int, tensor_size: int, slots: set[int]) -> dict[str, Any]:
    """The content for one rank of a new layout, from the ranks of an old one.

    Args:
        states: of each old rank of the first pipeline stage, with its "tensor_rank" and "replay".
        tensor_rank, tensor_size: of the new rank. Predictions are split over their last dimension, but for those of the
            targets' own shape (latents), which every rank has whole.
        slots: replay slots of the new rank.
    """
    parts: dict[str, dict[int, Any]] = {}
    for state in states:
        for slot, entries in state["replay"].items():
            if int(slot) in slots:
                parts.setdefault(slot, {})[state["tensor_rank"]] = entries
    merged: dict[str, Any] = {}
    for slot, by_rank in parts.items():
        ordered = [by_rank[r] for r in sorted(by_rank)]
        merged[slot] = []
        for same in zip(*ordered, strict=True):
            part = same[0]["prediction"]
            if part.shape != same[0]["targets"].shape:
                part = torch.cat([entry["prediction"] for entry in same], -1).chunk(tensor_size, -1)[tensor_rank]
            merged[slot].append({**same[0], "prediction": part.clone()})
    return merged


def stack_start(fresh: int, entries: list[Entry], given: Tensor | None = None) -> Tensor | None:
    """Starting predictions [S, fresh + replayed, ...]: of the fresh ones those given, or NaN (by the recipe)."""
    predictions = [e.prediction for e in entries if e.prediction is not None]
    if not predictions:
        return None
    replayed = torch.stack(predictions, 1)
    if given is None:
        given = replayed.new_full((replayed.shape[0], fresh, *replayed.shape[2:]), torch.nan)
    return torch.cat([given.to(replayed), replayed], 1)
