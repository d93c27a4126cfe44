"""A modality of one's own: where does a point that circles in the plane go next?"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.data.description import Description
from ebt_megatron.data.kinds import Kind
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.shards import shard_infos, write_shard
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.flops import Cost, cost
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.tasks import NoMeter, Sample
from ebt_megatron.tasks.latent_model import LatentEmbedding, LatentEmbeddings, LatentOutput

POINTS = Kind("points", unit="points")  # a sample is [length + 1, 2], float32


class Points:
    """Next-point prediction, a `Task`: sequences of points (x, y)."""

    kind, size = "examples.points.points:POINTS", 2

    def __init__(self, recipe: Recipe):
        self.recipe, self.length = recipe, recipe.data.sequence_length
        self.identity: dict[str, Any] = {}

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Self:
        return cls(recipe)

    @classmethod
    def of_size(cls, recipe: Recipe, vocab_size: int, channels: int) -> Self:
        return cls(recipe)

    def made_up(self, sample_ids: Tensor) -> MicroBatch:
        return MicroBatch(sample_ids, torch.zeros(len(sample_ids), self.length + 1, self.size))

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        points = batch.samples.to(device)  # [B, S + 1, 2]
        return Sample(points[:, :-1], points[:, 1:], batch.sample_ids.to(device))

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> EnergyTransformer:
        embeddings = LatentEmbeddings(config, self.size, kernels) if first else None
        return EnergyTransformer(config, self.recipe, kernels, embeddings, first, last)

    def feed_forward_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> TransformerLM:
        embedding = LatentEmbedding(config, self.size) if first else None
        output = LatentOutput(config, self.size) if last else None
        return TransformerLM(config, self.recipe, kernels, embedding, output, first, last)

    def cost(self) -> Cost:
        return cost(self.recipe, self.size, distribution=False)

    def meter(self, steps: int, device: torch.device) -> NoMeter:
        return NoMeter()

    def describe(self, loss: float) -> dict[str, float]:
        return {"distance": 2 * loss**0.5}  # the loss is half the square of one coordinate's error

    def example(self, sample: Sample, thinker: Any, steps: int) -> None:
        return None


def write_points(folder: Path, count: int, length: int, seed: int) -> None:
    """Shards of `count` circles of random centre, radius and speed, each length + 1 points long."""
    draw = np.random.default_rng(seed)
    angle = draw.uniform(0, 6, (count, 1)) + draw.uniform(0.2, 0.8, (count, 1)) * np.arange(length + 1)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1) * draw.uniform(0.5, 1.5, (count, 1, 1))
    points = circle + draw.normal(0, 0.5, (count, 1, 2))
    write_shard(folder, 0, Points.kind, points.astype(np.float32))
    Manifest(Points.kind, [length + 1, 2], "float32", count, shard_infos(folder, 1), {"seed": seed}).write(folder)
