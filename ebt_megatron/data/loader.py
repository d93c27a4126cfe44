"""The loader: a global order of samples that no layout changes, read ahead by a thread.

The order is order.py's; a position in the run is one number, the count of samples consumed.
So a run stops at any sample and goes on with any number of ranks, and the global sequence is
the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.order import Blend, drawn_samples
from ebt_megatron.data.remote import Cache

VALIDATION_IDS = 1 << 50  # sample ids of validation samples start here, apart from training's


@dataclass
class MicroBatch:
    """Samples for one forward pass.

    Attributes:
        sample_ids: int64 [B], each sample's global index in the run; fixes its noise.
        samples: [B, *shape of the manifest], int64 or float32 as their kind says: tokens [B, S + 1] of text, latents
            [B, frames, patches, channels] of video, [B, patches, channels] of pictures.
        documents: int32 [B, S + 1], which document of its row each token belongs to, or None.
        beside: what else each sample has, by name [B, ...]: labels and captions of pictures that have them.
        counts: bool [B], of validation: False for samples that only fill the last micro-batch; else None.
    """

    sample_ids: Tensor
    samples: Tensor
    documents: Tensor | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None

    def part(self, begin: int, end: int) -> MicroBatch:
        """Its samples begin .. end - 1."""
        documents, counts = (None if t is None else t[begin:end] for t in (self.documents, self.counts))
        beside = {name: t[begin:end] for name, t in self.beside.items()}
        return MicroBatch(self.sample_ids[begin:end], self.samples[begin:end], documents, beside, counts)


def open_sources(recipe: Recipe, split: str) -> list[ShardFolder]:
    """The shard folders of a split, checked against each other and the recipe.

    Raises:
        DataError: naming the folder and what does not fit.
    """
    folders = recipe.data.train if split == "train" else recipe.data.validation
    if not folders:
        raise DataError(f"data.{split} names no shards: give folders made by data_prep/")
    data = recipe.data
    cache = None
    if data.cache_dir is not None:
        cache = Cache(Path(data.cache_dir), None if data.cache_gb is None else data.cache_gb * 1e9)
    sources = [ShardFolder(folder, cache, data.remote_readers) for folder in folders]
    _check_room(recipe, [s for s in sources if s.remote])
    first, kind = sources[0].manifest, sources[0].kind
    for source in sources:
        m = source.manifest
        if m.kind != first.kind:
            raise DataError(f"{source.folder} holds {m.kind}, {sources[0].folder} {first.kind}: give one kind")
        if kind.unit and m.sequence_length != recipe.data.sequence_length:
            raise DataError(
                f"{source.folder} has sequences of {m.sequence_length} {kind.unit}, data.sequence_length is "
                f"{recipe.data.sequence_length}: change the recipe, or prepare the data again"
            )
        if m.sidecar.get("sha256") != first.sidecar.get("sha256"):
            raise DataError(
                f"{source.folder} was made with another {kind.sidecar} than {sources[0].folder}: prepare one again"
            )
        if (m.shape, m.classes) != (first.shape, first.classes):
            raise DataError(
                f"{source.folder} has samples of {m.shape} and {len(m.classes)} classes, "
                f"{sources[0].folder} of {first.shape} and {len(first.classes)}, or others: prepare one "
                "again"
            )
        if m.caption_key != first.caption_key:
            raise DataError(
                f"{source.folder} has captions of another encoder or length than {sources[0].folder}, or "
                "one has none: prepare one again"
            )
        if m.facts != first.facts:
            raise DataError(f"{source.folder} has other facts than {sources[0].folder}: prepare one again")
        if m.sidecar:
            source.sidecar()
    return sources


def _check_room(recipe: Recipe, remote: list[ShardFolder]) -> None:
    """Refuse remote sources whose shards in use find no room."""
    data = recipe.data
    if not remote:
        return
    if data.cache_dir is None and not data.shuffle_shards:
        raise DataError(
            f"{remote[0].folder} is remote: set data.shuffle_shards, to stream it that many shards at a "
            "time, or data.cache_dir, to keep its shards there"
        )
    sizes = [sorted((s.bytes for s in source.manifest.shards), reverse=True) for source in remote]
    most = sum(sum(s[: 2 * data.shuffle_shards] if data.shuffle_shards else s) for s in sizes) / 1e9
    if data.cache_gb is not None and most > data.cache_gb:
        if data.shuffle_shards:
            need, mend = f"two groups of data.shuffle_shards={data.shuffle_shards} shards", "lower data.shuffle_shards"
        else:
            need, mend = "all shards", "set data.shuffle_shards"
        raise DataError(
            f"data.cache_gb={data.cache_gb:g} is less than the {most:.4g} GB of {need}: raise it, or {mend}"
        )


def identity(manifest: Manifest) -> str:
    """What stays the same when a folder is moved or copied, and changes with any sample: a SHA-256."""
    content = [
        manifest.kind,
        manifest.shape,
        manifest.dtype,
        manifest.sidecar.get("sha256"),
        [s.sha256 for s in manifest.shards],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


_PATIENCE = 10.0  # seconds for a thread to end: only a slow remote shard takes so long


class Loader:
    """Micro-batches of one data-parallel rank.

    Tensor- and pipeline-parallel peers pass the same rank and see the same samples.

    Args:
        recipe: data.*, batch sizes and seed.
        split: "train" (endless) or "validation" (one pass over training.validation_samples).
        data_parallel_rank, data_parallel_size: this rank's place.
    """

    def __init__(self, recipe: Recipe, split: str, data_parallel_rank: int, data_parallel_size: int):
        self.recipe, self.split = recipe, split
        self.rank, self.size = data_parallel_rank, data_parallel_size
        self.sources = open_sources(recipe, split)
        train = split == "train"
        weights = recipe.data.train_weights if train else []
        shuffle = recipe.data.shuffle and train
        sizes, seed, kept = [s.sizes for s in self.sources], recipe.training.seed, None
        if train and recipe.data.unique_samples is not None:
            kept = drawn_samples(sizes, recipe.data.unique_samples, seed)
        self.blend = Blend(sizes, weights, seed, shuffle, recipe.data.shuffle_shards, kept)
        self.unique = [source.size for source in self.blend.sources]
        self.end_of_text: int = self.sources[0].manifest.tokenizer.get("end_of_text", -1)
        if recipe.data.document_mask and self.end_of_text < 0:
            raise DataError(
                f"data.document_mask=true needs documents, and {self.sources[0].folder} does not say how they end: set "
                "data.document_mask=false"
            )
        self.consumed = 0
        self.wait_seconds = 0.0
        for source, weight, share in zip(self.sources, weights, self.blend.share.tolist(), strict=False):
            if weight and not share:
                raise DataError(
                    f"data.train_weights gives {source.folder} {weight:g}, which is not one sample in an "
                    "epoch: raise it, or set it to 0"
                )
        if not train and recipe.training.validation_samples < 1:
            raise DataError(
                f"training.validation_samples={recipe.training.validation_samples}: must be at least 1, or "
                "set training.validation_interval=0"
            )

    @property
    def validation_samples(self) -> int:
        """How many samples of validation there are to look at."""
        return min(self.recipe.training.validation_samples, len(self.blend))

    @property
    def epoch(self) -> float:
        """How often all of the data has been gone through."""
        return self.consumed / len(self.blend)

    def most_repeated(self, samples: int) -> tuple[float, str]:
        """How often the source that is repeated most is gone through in so many samples of the run, and its name."""
        turns = self.blend.share / np.array(self.unique) * samples / len(self.blend)
        worst = int(np.argmax(turns))
        return float(turns[worst]), self.sources[worst].folder

    def state_dict(self) -> dict[str, Any]:
        """The position in the run, and what its order depends on: the same for every rank and layout."""
        return {
            "consumed": self.consumed,
            "seed": self.recipe.training.seed,
            "shuffle": self.blend.shuffle,
            "shuffle_shards": self.recipe.data.shuffle_shards,
            "samples_per_epoch": self.blend.share.tolist(),
            "sources": [identity(s.manifest) for s in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            DataError: when it belongs to another order or other data, so that samples would repeat or be lost.
        """
        own = self.state_dict()
        before = state.get("sources", own["sources"])  # older checkpoints do not know theirs
        if before != own["sources"]:
            raise DataError(
                f"the checkpoint was made with {self._differing(before, own['sources'])}: resume with the "
                "same shards in the same order, or start a new output_dir"
            )
        for key, mine in own.items():
            if key not in ("consumed", "sources") and state.get(key) != mine:
                raise DataError(
                    f"the checkpoint's data position has {key}={state.get(key)}, this run has {mine}: "
                    "resume with the same seed, shards and data.* keys, or start a new "
                    "output_dir"
                )
        self.consumed = state["consumed"]

    def _differing(self, before: list[str], now: list[str]) -> str:
        if sorted(before) == sorted(now):
            return "the folders of data.train in another order"
        changed = next((s.folder for s, i in zip(self.sources, now, strict=True) if i not in before), "one more folder")
        return f"other data than {changed}"

    def read(self, positions: list[int]) -> MicroBatch:
        """The micro-batch of the samples at these places of the run's order."""
        order = np.array(positions, np.int64)
        if self.recipe.data.shuffle_shards and any(s.remote for s in self.sources):
            for number, shards in self.blend.shards(order).items():
                if self.sources[number].remote:
                    self.sources[number].expect(shards)
        first = self.sources[0]
        rows = np.empty((len(positions), *first.manifest.shape), first.kind.dtype)
        beside: dict[str, np.ndarray] = {}
        for number, at, samples in self.blend.locate_all(order):
            source, whole = self.sources[number], len(at) == len(rows)
            mine = rows if whole else np.empty((len(at), *first.manifest.shape), rows.dtype)
            source.gather(samples, mine)
            if not whole:
                rows[at] = mine
            for name in first.beside:
                found = source.gather_beside(name, samples)
                beside.setdefault(name, np.empty((len(rows), *found.shape[1:]), found.dtype))[at] = found
        sample_ids, data = torch.from_numpy(order), torch.from_numpy(rows)
        counts = documents = None
        if self.split == "validation":
            counts = sample_ids < self.validation_samples
            sample_ids = sample_ids + VALIDATION_IDS
        if self.recipe.data.document_mask:
            # A document ends with its end-of-text token; the next token begins another.
            ends = (data == self.end_of_text).int()
            documents = (ends.cumsum(1) - ends).int()
        return MicroBatch(sample_ids, data, documents, {k: torch.from_numpy(v) for k, v in beside.items()}, counts)

    def _plan(self) -> Iterator[tuple[list[int], int]]:
        """(positions of a micro-batch, samples consumed once it is taken), in order."""
        size = self.recipe.training.micro_batch_size
        if self.split == "validation":
            rounds = -(-self.validation_samples // (size * self.size))
            own = list(range(self.rank, rounds * size * self.size, self.size))
            for i in range(0, len(own), size):  # equal shapes on every rank: what is too much does not count
                yield own[i : i + size], 0
            return
        batch = self.recipe.training.global_batch_size
        per_rank = batch // (size * self.size)
        start = self.consumed
        while True:
            for m in range(per_rank):
                first = start + (m * self.size + self.rank) * size
                yield list(range(first, first + size)), start + (batch if m == per_rank - 1 else 0)
            start += batch

    def __iter__(self) -> Generator[MicroBatch, None, None]:
        """Read ahead in a thread; `consumed` moves when a global batch has been taken whole."""
        # Several micro-batches at a time: handing one over costs more than reading it.
        together = max(1, self.recipe.data.prefetch // 2)
        ready: queue.Queue[Any] = queue.Queue(maxsize=2)
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                plan = self._plan()
                while planned := list(itertools.islice(plan, together)):
                    whole = self.read([p for positions, _ in planned for p in positions])
                    ends = list(itertools.accumulate(len(positions) for positions, _ in planned))
                    parts = [whole.part(b, e) for b, e in zip([0, *ends], ends, strict=False)]
                    if not put([(part, consumed) for part, (_, consumed) in zip(parts, planned, strict=True)]):
                        return
                put(None)
            except BaseException as error:  # handed to the loop, which raises it
                put(error)

        thread = threading.Thread(target=work, daemon=True, name="loader")
        thread.start()
        try:
            while True:
                begin = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - begin
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                for micro_batch, consumed in item:
                    self.consumed = max(self.consumed, consumed)
                    yield micro_batch
        finally:
            stop.set()
            # One that is inside torch when the interpreter ends would take the process down with it.
            thread.join(_PATIENCE)
