"""Passes over frames and pictures: what is held out, what an encoder is fitted on, and their latents.

Each class knows what the passes before it found out. Every process makes the same ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing, write_whole
from ebt_megatron.core.options import option
from ebt_megatron.data_prep.captions import Captions
from ebt_megatron.data_prep.encoders import Encoder, load_encoder
from ebt_megatron.data_prep.options import path_or_name
from ebt_megatron.data_prep.passes import Settings, Unit, WorkFolder, key_of, save, threshold
from ebt_megatron.data_prep.pieces import Piece, Source, place_of

FIT_UNITS, FIT_FRAMES = 64, 1024  # an encoder is fitted on so many frames of so many units
_BATCH = 64  # frames encoded at once


@dataclass(frozen=True)
class LatentSettings(Settings):
    """What the shards depend on besides the input.

    Attributes:
        encoder: see new_encoder, as `patch`, `channels` and `model`.
        scale: latents are multiplied by it; None: they are normalised by the train split's statistics.
        samples_per_shard: in every tar but the last.
    """

    encoder: str = option(
        "pca", parser=path_or_name, help="pixels, pca, vae, dinov2, or the encoder.npz of other shards."
    )
    model: str | None = option(
        None, parser=path_or_name, help="Folder of a diffusers AutoencoderKL or a transformers Dinov2Model."
    )
    patch: int | None = option(None, min=1, help="Side of a patch in pixels [default: 8, or the model's].")
    channels: int | None = option(None, min=1, help="Principal components kept of a patch [default: 16].")
    scale: float | None = option(
        None, min=1e-6, help="Latents are multiplied by this, instead of normalised by the train split's statistics."
    )
    samples_per_shard: int = 512


@dataclass(frozen=True)
class ClipSettings(LatentSettings):
    """Settings of video, whose shards have another size."""

    samples_per_shard: int = option(512, "--clips-per-shard", min=1, help="Clips in each tar.")


@dataclass(frozen=True)
class PictureSettings(LatentSettings):
    """Settings of pictures, whose shards have another size."""

    samples_per_shard: int = option(8192, "--pictures-per-shard", min=1, help="Samples in each tar.")


@dataclass(frozen=True)
class Pieces:
    """The input's pieces, each of which goes to one split."""

    settings: LatentSettings
    source: Source

    def read(self, unit: Unit, skipped: list[str]) -> Iterator[Piece]:
        """The pieces of a unit's files; those that cannot be read are left out if they may be."""
        for file in unit.parts:
            try:
                yield from self.source.read([file])
            except DataError as error:
                if not self.settings.skip_broken:
                    raise
                skipped.append(str(error))

    def place(self, piece: Piece) -> float:
        """Return a piece's place in [0, 1); pieces of the lowest places are held out."""
        return place_of(self.settings.seed, piece.content)

    def wants(self, sample: np.ndarray) -> bool:
        """Whether a sample uint8 [frames, height, width, 3] moves enough to be kept."""
        least = self.source.least_motion
        return not least or float(np.abs(np.diff(sample.astype(np.int16), axis=0)).mean()) >= least

    def nothing_left(self, why: str) -> DataError:
        """There is nothing for train: why, and what to do about it."""
        smaller = "--validation-fraction" + (" or --least-motion" if self.source.least_motion else "")
        return DataError(f"{why}: give more files, or a smaller {smaller}")

    def held_out(self, units: list[Unit]) -> float:
        """Below which place pieces are held out, from as many as it takes to see that both splits get some."""
        places: list[float] = []
        fraction = self.settings.validation_fraction
        for piece in (p for unit in units for p in self.read(unit, [])):
            places.append(self.place(piece))
            if not fraction or min(places) < fraction <= max(places):
                break
        return threshold(np.array(places), fraction, self.source.piece)


def fitted_on(units: list[Unit], seed: int) -> list[Unit]:
    """The units that an encoder is fitted on."""
    return sorted(units, key=lambda u: place_of(seed, b"fit %d" % u.number))[:FIT_UNITS]


class _Thinned:
    """Evenly spaced frames of a sequence of unknown length: between `count` and 2 * `count`, all if there are fewer."""

    def __init__(self, count: int):
        self.count, self.step, self.seen = count, 1, 0
        self.frames: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        if self.seen % self.step == 0:
            self.frames.append(frame)
        self.seen += 1
        if len(self.frames) > 2 * self.count:
            self.frames, self.step = self.frames[::2], 2 * self.step


@dataclass(frozen=True)
class Fitting:
    """What an encoder is fitted on: sample-KEY.npy of some units, uint8 frames.

    Attributes:
        held_out: as `Pieces` says.
        frames: to take of a unit.
    """

    work: WorkFolder
    pieces: Pieces
    held_out: float
    frames: int

    def file(self, unit: Unit) -> Path:
        """Return the file of the frames of a unit."""
        return self.work.file("sample", key_of(unit.key, self.frames, self.held_out))

    def sample(self, unit: Unit) -> None:
        """Evenly spaced train frames of a unit, about as many as asked for."""
        thinned = _Thinned(self.frames)
        for piece in self.pieces.read(unit, []):
            if self.pieces.place(piece) >= self.held_out:
                try:
                    for sample, _ in piece.samples:
                        for frame in sample if self.pieces.wants(sample) else ():
                            thinned.add(frame)
                        if thinned.seen >= 64 * self.frames:  # enough of a long video
                            break
                except DataError:
                    if not self.pieces.settings.skip_broken:
                        raise
        shape = (-1, self.pieces.source.height, self.pieces.source.width, 3)
        save(self.file(unit), np.array(thinned.frames, np.uint8).reshape(shape))

    def fit(self, encoder: Encoder, units: list[Unit]) -> str:
        """Save the encoder, fitted on the frames of some units if it must be; returns its key."""
        samples = [self.file(u) for u in units]
        key = key_of(*(path.name for path in samples))
        path = self.work.file("fitted", key, "npz")
        if not path.exists():
            if not encoder.fitted:
                frames = np.concatenate([np.load(path) for path in samples])
                if not len(frames):
                    still = ", or nothing in it moves" if self.pieces.source.least_motion else ""
                    raise self.pieces.nothing_left(f"nothing to fit the encoder on, no file is for train{still}")
                encoder.fit(frames)
            encoder.save(path)
        return key


@dataclass(frozen=True)
class Latents:
    """The latents of every unit.

    Per unit: latents-KEY.npy, float32 of every sample, one after the other; hashes-KEY.npy, the place of the piece of
    each sample (NaN: broken); labels-KEY.npy and captions-KEY.npy, of each sample; pieces-KEY.npy, float64 [pieces, 2],
    place and seconds of those that are whole; counts-KEY.json, what was done on the way, by name ("still": samples that
    were not wanted); skipped-KEY.json.

    Attributes:
        fitted: the key of the encoder.
        captions: what is told of pictures, or None.
    """

    work: WorkFolder
    pieces: Pieces
    fitted: str
    captions: Captions | None = None

    def key(self, unit: Unit) -> str:
        """Return the key of what the encoder makes of a unit."""
        return key_of(unit.key, self.fitted)

    def file(self, unit: Unit) -> Path:
        """The file that shows a unit is done."""
        return self.work.file("latents", self.key(unit))

    def encoder(self) -> Encoder:
        """The fitted one."""
        return load_encoder(self.work.file("fitted", self.fitted, "npz"))

    def encode(self, unit: Unit) -> None:
        """The latents of every sample of a unit."""
        encoder, key = self.encoder(), self.key(unit)
        hashes: list[float] = []
        labels: list[int] = []
        texts: list[str] = []
        batch: list[np.ndarray] = []
        whole: list[tuple[float, float]] = []
        skipped: list[str] = []
        counts: Counter[str] = Counter()
        # It shows that the unit is done, so it comes last.
        with replacing(self.file(unit)) as partial, partial.open("wb") as stream:

            def flush() -> None:
                if batch:
                    stream.write(encoder.encode(np.concatenate(batch)).tobytes())
                    batch.clear()

            for piece in self.pieces.read(unit, skipped):
                begin, place, duration = len(hashes), self.pieces.place(piece), 0.0
                try:
                    for sample, seconds in piece.samples:
                        if not self.pieces.wants(sample):
                            counts["still"] += 1
                            continue
                        batch.append(sample)
                        hashes.append(place)
                        labels.append(piece.label)
                        texts.append(piece.caption)
                        duration += seconds
                        if len(batch) * len(sample) >= _BATCH:
                            flush()
                    whole.append((place, duration))
                    counts.update(piece.counts)
                except DataError as error:
                    if not self.pieces.settings.skip_broken:
                        raise
                    hashes[begin:] = [np.nan] * (len(hashes) - begin)
                    skipped.append(str(error))
            flush()
            save(self.work.file("hashes", key), np.array(hashes))
            save(self.work.file("labels", key), np.array(labels, np.int64))
            if self.captions is not None:
                save(self.work.file("captions", key), self.captions.open().encode(texts))
            save(self.work.file("pieces", key), np.array(whole).reshape(-1, 2))
            write_whole(self.work.file("counts", key, "json"), json.dumps(counts))
            write_whole(self.work.file("skipped", key, "json"), json.dumps(skipped))

    def held_out(self, units: list[Unit]) -> float:
        """Do what `Pieces` says, now that it is known which pieces are whole."""
        places = np.concatenate([np.load(self.work.file("pieces", self.key(u)))[:, 0] for u in units])
        return threshold(places, self.pieces.settings.validation_fraction, f"whole {self.pieces.source.piece}")

    def read(self, key: str, encoder: Encoder, count: int) -> np.ndarray:
        """The latents of `count` samples that were made under a key."""
        shape = (count, *self.shape(encoder))
        path = self.work.file("latents", key)
        return np.memmap(path, np.float32, "r", shape=shape) if count else np.zeros(shape, np.float32)

    def counts(self, keys: list[str]) -> Counter[str]:
        """What was done to the input on the way, by name."""
        found: Counter[str] = Counter()
        for path in (self.work.file("counts", key, "json") for key in keys):
            found.update(json.loads(path.read_text()) if path.exists() else {})  # versions before did not write it
        return found

    def shape(self, encoder: Encoder) -> list[int]:
        """Return the shape of a sample."""
        frames = self.pieces.source.frames
        return [frames, *encoder.shape] if frames else encoder.shape
