"""A kind of sample of one's own: waveforms of 8 bits, and the task that predicts their next window."""

from pathlib import Path
from typing import Self

import numpy as np
import torch

from ebt_megatron.config import Recipe
from ebt_megatron.data.description import Description
from ebt_megatron.data.kinds import Bounds, Kind
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.shards import shard_infos, write_shard
from ebt_megatron.tasks import Sample
from examples.points.points import Points

WINDOW = 8  # values that are predicted together


def drawn(row: np.ndarray, source: Description) -> str:
    return "".join("▁▂▃▄▅▆▇█"[(int(value) + 128) // 32] for value in row.ravel())


SIGNAL = Kind("signal", unit="windows", bounds=lambda manifest: Bounds("value", -128, 128, "levels"), text=drawn)


class Signals(Points):
    """Next-window prediction, a `Task`: [length + 1, WINDOW] of int8, which a model sees in [-1, 1)."""

    kind, size = "examples.signals.signals:SIGNAL", WINDOW

    def __init__(self, recipe: Recipe, rate: int = 0):
        super().__init__(recipe)
        self.identity = {"rate": rate}

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Self:
        return cls(recipe, source.manifest.facts["rate"])

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        windows = batch.samples.to(device) / 128
        return Sample(windows[:, :-1], windows[:, 1:], batch.sample_ids.to(device))

    def describe(self, loss: float) -> dict[str, float]:
        return {"signal_to_noise": -10 * np.log10(2 * loss)}  # dB below full scale; the loss is half a square


def write_signals(folder: Path, count: int, length: int, rate: int, seed: int) -> None:
    """Shards of `count` tones of random pitch, each (length + 1) * WINDOW values at `rate` Hz."""
    draw = np.random.default_rng(seed)
    seconds = np.arange((length + 1) * WINDOW) / rate
    tones = np.sin(2 * np.pi * (draw.uniform(200, 800, (count, 1)) * seconds + draw.uniform(0, 1, (count, 1))))
    samples = (100 * tones).round().astype(np.int8).reshape(count, length + 1, WINDOW)
    write_shard(folder, 0, Signals.kind, samples)
    shards, made = shard_infos(folder, 1), {"seed": seed}
    Manifest(Signals.kind, [length + 1, WINDOW], "int8", count, shards, made, facts={"rate": rate}).write(folder)
