"""The part of a recipe that says where samples come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from ebt_megatron.config.fields import at_least, one_of, path, paths, positive
from ebt_megatron.core.errors import RecipeError


@dataclass
class DataConfig:
    """The part of a recipe that says where samples come from."""

    modality: str = "text"  # a name of ebt_megatron.tasks, or package.module:Class of your own (docs/extending.md)
    train: list[str] = paths()  # shard folders (with manifest.json) or URLs
    train_weights: list[float] = field(default_factory=list)  # blend; default: by sample count
    # train on so many samples alone, drawn by the seed from sources by their sizes, again and again; null: on all
    unique_samples: int | None = at_least(1, None, ", or null for all")
    validation: list[str] = paths()  # the same of held-out samples
    sequence_length: int = positive(256)  # tokens predicted per sample
    # positions of text whose loss counts: all | all but those where the end of text comes, which are the padding of the
    # public code's rows | those that shards mark as answers
    learn_from: str = one_of("all", "text", "answers", default="all")
    document_mask: bool = False  # attention stays inside a document of a packed sequence
    shuffle: bool = True  # a new random order each epoch; false: as stored
    # samples are mixed within random groups of so many shards; 0: with all others
    shuffle_shards: int = at_least(0, 0, ": a number of shards, or 0 for all")
    prefetch: int = positive(32)  # micro-batches a background thread keeps ready, at least
    remote_readers: int = positive(4)  # shards of a URL that are read at a time
    cache_dir: str | None = path(None)  # where shards of URLs are kept; default: two groups of shuffle_shards in memory
    cache_gb: float | None = None  # shards used longest ago are removed from cache_dir to stay below; default: kept

    def check(self) -> None:
        """Raise RecipeError unless the blend and the cache make sense."""
        if self.cache_gb is not None and (self.cache_gb <= 0 or self.cache_dir is None):
            raise RecipeError(
                f"data.cache_gb={self.cache_gb:g} bounds data.cache_dir={self.cache_dir}: give a folder and more than 0"
            )
        weights = self.train_weights
        if weights and len(weights) != len(self.train):
            raise RecipeError(
                f"data.train_weights has {len(weights)} entries for {len(self.train)} sources in data.train"
            )
        if any(w < 0 for w in weights) or (weights and not sum(weights)):
            raise RecipeError(f"data.train_weights={weights}: must be at least 0, and not all 0")
