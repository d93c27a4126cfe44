"""Encoded latents as shards: statistics, the plan of shards, their writing, and the manifests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of, write_whole
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.shards import shard_infos, write_shard
from ebt_megatron.data_prep.encoders import load_encoder
from ebt_megatron.data_prep.latent_passes import Latents, LatentSettings
from ebt_megatron.data_prep.passes import Shard, Unit, WorkFolder, save, write_skipped
from ebt_megatron.data_prep.pieces import NO_LABEL


@dataclass(frozen=True)
class LatentShards:
    """Latents, normalised, as shards of each split.

    Of the whole input: moments-N.npy, float64 [2, channels], sums of the train samples of unit N and of their squares.

    Attributes:
        held_out: pieces of a lower place are for validation.
    """

    work: WorkFolder
    latents: Latents
    held_out: float

    @property
    def settings(self) -> LatentSettings:
        """What to make."""
        return self.latents.pieces.settings

    def splits(self, key: str) -> np.ndarray:
        """The split of each sample that was made under a key; -1: it is left out."""
        hashes = np.load(self.work.file("hashes", key))
        return np.where(np.isnan(hashes), -1, hashes < self.held_out).astype(np.int8)

    def moments(self, unit: Unit) -> Path:
        """Return the file of the moments of a unit."""
        return self.work.of_whole("moments", unit.number)

    def measure(self, unit: Unit) -> None:
        """The moments of a unit's train samples."""
        key = self.latents.key(unit)
        encoder, splits = self.latents.encoder(), self.splits(key)
        moments = np.zeros((2, encoder.channels))
        latents = self.latents.read(key, encoder, len(splits))
        for row in np.flatnonzero(splits == 0):
            values = latents[row].reshape(-1, encoder.channels).astype(np.float64)
            moments += values.sum(0), (values * values).sum(0)
        save(self.moments(unit), moments)

    # --- between the passes, on the first rank ---------------------------------------------------------

    def plan(self, units: list[Unit]) -> list[Shard]:
        """Save the encoder with its mean and standard deviation, keys.json, of what the encoder made of every unit,
        and samples.npy: int64 [units, splits], the samples of each split in every unit. Returns the shards to write.
        """
        keys = [self.latents.key(u) for u in units]
        counts = np.zeros((len(units), len(self.settings.splits)), np.int64)
        labelled = set()
        for row, key in zip(counts, keys, strict=True):
            splits, labels = self.splits(key), np.load(self.work.file("labels", key))
            row[:] = [(splits == s).sum() for s in range(len(row))]
            labelled |= set((labels[splits >= 0] != NO_LABEL).tolist())
        if len(labelled) > 1:
            raise DataError("some pictures of the input have labels and some have none: prepare them separately")
        names, highest = len(self.latents.pieces.source.classes), self._highest(keys)
        if names and highest >= names:
            raise DataError(f"the input has label {highest}, and --class-names has {names}: name all labels")
        if not names and highest >= counts.sum():
            raise DataError(
                f"the input has label {highest} and {counts.sum():,} samples, so that most classes have "
                "none: number labels from 0 on, or name them all with --class-names"
            )
        if not counts[:, 0].sum():
            still = self.latents.counts(keys)["still"]
            why = f", and {still:,} samples move less than --least-motion" if still else ""
            raise self.latents.pieces.nothing_left(f"nothing of the input is for train{why}")
        encoder = self.latents.encoder()
        if self.settings.scale is not None:
            encoder.normalise_by(np.zeros(encoder.channels), np.full(encoder.channels, 1 / self.settings.scale))
        elif encoder.mean is None:
            total, square = sum(np.load(self.moments(u)) for u in units)
            entries = int(counts[:, 0].sum()) * np.prod(self.latents.shape(encoder)[:-1])
            mean = total / entries
            encoder.normalise_by(mean, np.sqrt(np.maximum(square / entries - mean**2, 0)))
        save(self.work.whole("samples.npy"), counts)
        write_whole(self.work.whole("keys.json"), json.dumps(keys))
        encoder.save(self.work.whole("encoder.npz"))
        per_shard = self.settings.samples_per_shard
        totals = zip(self.settings.splits, counts.sum(0).tolist(), strict=True)
        return [(name, k) for name, total in totals for k in range(-(-total // per_shard))]

    def _highest(self, keys: list[str]) -> int:
        """The highest label, or NO_LABEL."""
        return max(int(np.load(self.work.file("labels", key)).max(initial=NO_LABEL)) for key in keys)

    def write(self, item: Shard) -> None:
        """One shard: samples of its split, of all units in order, from number * samples_per_shard on."""
        name, number = item
        encoder, split = load_encoder(self.work.whole("encoder.npz")), self.settings.splits.index(name)
        ends = np.load(self.work.whole("samples.npy"))[:, split].cumsum()
        keys = json.loads(self.work.whole("keys.json").read_text())
        begin = number * self.settings.samples_per_shard
        end = min(begin + self.settings.samples_per_shard, int(ends[-1]))
        samples, labels, captions = [], [], []
        for unit in range(int(ends.searchsorted(begin, "right")), int(ends.searchsorted(end)) + 1):
            splits = self.splits(keys[unit])
            rows = np.flatnonzero(splits == split)
            first = int(ends[unit]) - len(rows)
            rows = rows[max(0, begin - first) : end - first]
            latents = self.latents.read(keys[unit], encoder, len(splits))
            samples += [encoder.to_samples(latents[row]) for row in rows]
            labels.append(np.load(self.work.file("labels", keys[unit]))[rows])
            if self.latents.captions is not None:
                captions.append(np.load(self.work.file("captions", keys[unit]))[rows])
        numbers = np.concatenate(labels)
        write_shard(
            self.work.output / name,
            number,
            self.latents.pieces.source.kind,
            np.stack(samples),
            labels=None if numbers[0] == NO_LABEL else numbers,
            captions=np.concatenate(captions) if captions else None,
        )

    def publish(self, units: list[Unit], shards: list[Shard], source: str) -> dict[str, Manifest]:
        """Write encoders and manifests."""
        encoder, input = load_encoder(self.work.whole("encoder.npz")), self.latents.pieces.source
        keys = [self.latents.key(u) for u in units]
        pieces = np.concatenate([np.load(self.work.file("pieces", key)) for key in keys])
        skipped = [line for key in keys for line in json.loads(self.work.file("skipped", key, "json").read_text())]
        highest, captions = self._highest(keys), self.latents.captions
        manifests = {}
        for split, name in enumerate(self.settings.splits):
            folder = self.work.output / name
            encoder.save(folder / "encoder.npz")
            infos = shard_infos(folder, sum(s == name for s, _ in shards))
            samples = sum(i.samples for i in infos)
            made: dict[str, Any] = {"source": source, "seed": self.settings.seed}
            seconds = pieces[(pieces[:, 0] < self.held_out) == split, 1]
            if input.frames:
                made |= {
                    "files": len(seconds),
                    "frames": samples * input.frames,
                    "clips": samples,
                    "seconds": round(float(seconds.sum()), 3),
                }
            else:
                made |= {"pictures": len(seconds)}
            made["skipped"] = len(skipped)
            made |= {name: count for name, count in sorted(self.latents.counts(keys).items()) if count}
            manifests[name] = Manifest(
                kind=input.kind,
                shape=self.latents.shape(encoder),
                dtype="float16",
                samples=samples,
                shards=infos,
                encoder={"file": "encoder.npz", "sha256": sha256_of(folder / "encoder.npz"), **encoder.describe()},
                classes=(input.classes or [str(i) for i in range(highest + 1)]),
                provenance=made,
                captions={} if captions is None else captions.save(folder),
            )
        write_skipped(self.work.output, skipped)
        for name, manifest in manifests.items():
            manifest.write(self.work.output / name)
        return manifests
