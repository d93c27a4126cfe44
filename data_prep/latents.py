"""Frames and pictures to shards of normalised latents: the passes that video and images share.

Passes, each restartable (data_prep/job.py): look at a sample of the input, where the encoder must be fitted;
encode every unit; measure the mean and standard deviation of the train split; cut each split's samples,
normalised by them, into shards; publish.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing
from ebt_megatron.data.shards import Manifest, read_manifest, sha256_of, shard_infos, write_shard

from .captions import Captions
from .encoders import KINDS, Encoder, load_encoder, new_encoder
from .files import InputFile
from .job import Job
from .passes import Passes, Settings, Unit, key_of, threshold, units_of, write_skipped
from .pieces import NO_LABEL, Piece, Source, place_of

_FIT_UNITS, _FIT_FRAMES = 64, 1024  # an encoder is fitted on so many frames of so many units
_BATCH = 64  # frames encoded at once


@dataclass(frozen=True)
class LatentSettings(Settings):
    """What the shards depend on besides the input.

    Attributes:
        encoder: see new_encoder, as `patch`, `channels` and `model`.
        samples_per_shard: in every tar but the last.
        validation_fraction: share of files (pictures) held out; 0: no validation folder.
        seed: of the split, and of the sample that an encoder is fitted on.
        skip_broken: leave out files that cannot be decoded; else they end the preparation.
        scale: latents are multiplied by it; None: they are normalised by the train split's statistics.
    """

    encoder: str = "pca"
    patch: int | None = None
    channels: int | None = None
    model: str | None = None
    samples_per_shard: int = 512
    validation_fraction: float = 0.02
    seed: int = 0
    skip_broken: bool = False
    scale: float | None = None


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
class LatentPasses(Passes):
    """What every process does to a unit or a shard.

    Per unit: sample-KEY.npy, frames uint8 to fit on; latents-KEY.npy, float32 of every sample, one after the
    other; hashes-KEY.npy, of the piece of each sample (NaN: broken); labels-KEY.npy and captions-KEY.npy, of each
    sample; pieces-KEY.npy, float64 [pieces, 2], hash and seconds of those that are whole; skipped-KEY.json. Of the
    whole input: moments-N.npy, float64 [2, channels], sums of the train samples of unit N and of their squares.

    Attributes:
        held_out: pieces of a smaller hash are for validation.
        fitted: the key of the encoder that latents are made with.
        captions: what is told of pictures, or None.
    """

    settings: LatentSettings
    source: Source
    held_out: float = 0.0
    fitted: str = ""
    captions: Captions | None = None

    def of(self, unit: Unit) -> str:
        """The key of what the encoder makes of a unit."""
        return key_of(unit.key, self.fitted)

    def encoder(self, path: Path | None = None) -> Encoder:
        """The fitted one, or that of a file, which knows its mean and standard deviation."""
        return load_encoder(path or self.file("fitted", self.fitted, "npz"))

    def _hash(self, piece: Piece) -> float:
        return place_of(self.settings.seed, piece.content)

    def pieces(self, unit: Unit, skipped: list[str]) -> Iterator[Piece]:
        """The pieces of a unit's files; those that cannot be read are left out if they may be."""
        for file in unit.parts:
            try:
                yield from self.source.read([file])
            except DataError as error:
                if not self.settings.skip_broken:
                    raise
                skipped.append(str(error))

    def splits(self, key: str) -> np.ndarray:
        """The split of each sample that was made under a key; -1: it is left out."""
        hashes = np.load(self.file("hashes", key))
        return np.where(np.isnan(hashes), -1, hashes < self.held_out).astype(np.int8)

    # --- which pieces are held out -------------------------------------------------------------------

    def look(self, units: list[Unit]) -> float:
        """held_out, from as many pieces as it takes to see that both splits get some."""
        hashes: list[float] = []
        fraction = self.settings.validation_fraction
        for piece in (p for unit in units for p in self.pieces(unit, [])):
            hashes.append(self._hash(piece))
            if not fraction or min(hashes) < fraction <= max(hashes):
                break
        return threshold(np.array(hashes), fraction, self.source.piece)

    def look_again(self, units: list[Unit]) -> float:
        """held_out, once it is known which pieces are whole."""
        hashes = np.concatenate([np.load(self.file("pieces", self.of(u)))[:, 0] for u in units])
        return threshold(hashes, self.settings.validation_fraction, f"whole {self.source.piece}")

    # --- what the encoder is fitted on ---------------------------------------------------------------

    def chosen(self, units: list[Unit]) -> list[Unit]:
        """The units to take a sample of."""
        return sorted(units, key=lambda u: place_of(self.settings.seed, b"fit %d" % u.number))[:_FIT_UNITS]

    def sample_of(self, unit: Unit, frames: int) -> Path:
        """Where the sample of a unit is."""
        return self.file("sample", key_of(unit.key, frames, self.held_out))

    def sample(self, unit: Unit, frames: int) -> None:
        """Evenly spaced train frames of a unit, about as many as asked for."""
        thinned = _Thinned(frames)
        for piece in self.pieces(unit, []):
            if self._hash(piece) >= self.held_out:
                try:
                    for sample, _ in piece.samples:
                        for frame in sample:
                            thinned.add(frame)
                        if thinned.seen >= 64 * frames:  # enough of a long video
                            break
                except DataError:
                    if not self.settings.skip_broken:
                        raise
        shape = (-1, self.source.height, self.source.width, 3)
        self.save(self.sample_of(unit, frames), np.array(thinned.frames, np.uint8).reshape(shape))

    def fit(self, encoder: Encoder, samples: list[Path]) -> str:
        """Save the encoder, fitted on what `sample` took; returns its key."""
        key = key_of(*(path.name for path in samples))
        path = self.file("fitted", key, "npz")
        if not path.exists():
            if not encoder.fitted:
                frames = np.concatenate([np.load(path) for path in samples])
                if not len(frames):
                    raise DataError("nothing to fit the encoder on: no file of the input is for train; give more files "
                                    "or a smaller --validation-fraction")  # fmt: skip
                encoder.fit(frames)
            encoder.save(path)
        return key

    # --- encoding -----------------------------------------------------------------------------------

    def encode(self, unit: Unit) -> None:
        """The latents of every sample of a unit."""
        encoder = self.encoder()
        hashes: list[float] = []
        labels: list[int] = []
        texts: list[str] = []
        batch: list[np.ndarray] = []
        whole: list[tuple[float, float]] = []
        skipped: list[str] = []
        # It shows that the unit is done, so it comes last.
        with replacing(self.file("latents", self.of(unit))) as partial, partial.open("wb") as stream:

            def flush() -> None:
                if batch:
                    stream.write(encoder.encode(np.concatenate(batch)).tobytes())
                    batch.clear()

            for piece in self.pieces(unit, skipped):
                begin, place, duration = len(hashes), self._hash(piece), 0.0
                try:
                    for sample, seconds in piece.samples:
                        batch.append(sample)
                        hashes.append(place)
                        labels.append(piece.label)
                        texts.append(piece.caption)
                        duration += seconds
                        if len(batch) * len(sample) >= _BATCH:
                            flush()
                    whole.append((place, duration))
                except DataError as error:
                    if not self.settings.skip_broken:
                        raise
                    hashes[begin:] = [np.nan] * (len(hashes) - begin)
                    skipped.append(str(error))
            flush()
            self.save(self.file("hashes", self.of(unit)), np.array(hashes))
            self.save(self.file("labels", self.of(unit)), np.array(labels, np.int64))
            if self.captions is not None:
                self.save(self.file("captions", self.of(unit)), self.captions.open().encode(texts))
            self.save(self.file("pieces", self.of(unit)), np.array(whole).reshape(-1, 2))
            self.file("skipped", self.of(unit), "json").write_text(json.dumps(skipped))

    def moments_of(self, unit: Unit) -> Path:
        """Where the moments of a unit are."""
        return self.whole(f"moments-{unit.number:06d}.npy")

    def measure(self, unit: Unit) -> None:
        """The moments of a unit's train samples."""
        encoder, splits = self.encoder(), self.splits(self.of(unit))
        moments = np.zeros((2, encoder.channels))
        latents = self._latents(self.file("latents", self.of(unit)), len(splits), encoder)
        for row in np.flatnonzero(splits == 0):
            values = latents[row].reshape(-1, encoder.channels).astype(np.float64)
            moments += values.sum(0), (values * values).sum(0)
        self.save(self.moments_of(unit), moments)

    def _latents(self, path: Path, count: int, encoder: Encoder) -> np.ndarray:
        shape = (count, *self._shape(encoder))
        return np.memmap(path, np.float32, "r", shape=shape) if count else np.zeros(shape, np.float32)

    def _shape(self, encoder: Encoder) -> list[int]:
        """Of a sample."""
        return [self.source.frames, *encoder.shape] if self.source.frames else encoder.shape

    # --- between the passes, on the first rank ---------------------------------------------------------

    def plan(self, units: list[Unit]) -> list[tuple[str, int]]:
        """Save the encoder with its mean and standard deviation, keys.json, of what the encoder made of every unit,
        and samples.npy: int64 [units, splits], the samples of each split in every unit. Returns the shards to write.
        """
        counts = np.zeros((len(units), len(self.settings.splits)), np.int64)
        labelled = set()
        for unit in units:
            splits, labels = self.splits(self.of(unit)), np.load(self.file("labels", self.of(unit)))
            counts[unit.number] = [(splits == s).sum() for s in range(counts.shape[1])]
            labelled |= set((labels[splits >= 0] != NO_LABEL).tolist())
        if len(labelled) > 1:
            raise DataError("some pictures of the input have labels and some have none: prepare them separately")
        names, highest = len(self.source.classes), self._highest([self.of(u) for u in units])
        if names and highest >= names:
            raise DataError(f"the input has label {highest}, and --class-names has {names}: name all labels")
        encoder = self.encoder()
        if self.settings.scale is not None:
            encoder.normalise_by(np.zeros(encoder.channels), np.full(encoder.channels, 1 / self.settings.scale))
        elif encoder.mean is None:
            total, square = sum(np.load(self.moments_of(u)) for u in units)
            entries = int(counts[:, 0].sum()) * np.prod(self._shape(encoder)[:-1])
            mean = total / entries
            encoder.normalise_by(mean, np.sqrt(np.maximum(square / entries - mean**2, 0)))
        self.save(self.whole("samples.npy"), counts)
        self.whole("keys.json").write_text(json.dumps([self.of(u) for u in units]))
        encoder.save(self.whole("encoder.npz"))
        per_shard = self.settings.samples_per_shard
        totals = zip(self.settings.splits, counts.sum(0).tolist(), strict=True)
        return [(name, k) for name, total in totals for k in range(-(-total // per_shard))]

    def _highest(self, keys: list[str]) -> int:
        """The highest label, or NO_LABEL."""
        return max(int(np.load(self.file("labels", key)).max(initial=NO_LABEL)) for key in keys)

    def write(self, item: tuple[str, int]) -> None:
        """One shard: samples of its split, of all units in order, from number * samples_per_shard on."""
        name, number = item
        encoder, split = self.encoder(self.whole("encoder.npz")), self.settings.splits.index(name)
        ends = np.load(self.whole("samples.npy"))[:, split].cumsum()
        keys = json.loads(self.whole("keys.json").read_text())
        begin = number * self.settings.samples_per_shard
        end = min(begin + self.settings.samples_per_shard, int(ends[-1]))
        samples, labels, captions = [], [], []
        for unit in range(int(ends.searchsorted(begin, "right")), int(ends.searchsorted(end)) + 1):
            splits = self.splits(keys[unit])
            rows = np.flatnonzero(splits == split)
            first = int(ends[unit]) - len(rows)
            rows = rows[max(0, begin - first) : end - first]
            latents = self._latents(self.file("latents", keys[unit]), len(splits), encoder)
            samples += [encoder.to_samples(latents[row]) for row in rows]
            labels.append(np.load(self.file("labels", keys[unit]))[rows])
            if self.captions is not None:
                captions.append(np.load(self.file("captions", keys[unit]))[rows])
        numbers = np.concatenate(labels)
        write_shard(self.output / name, number, self.source.kind, np.stack(samples),
                    None if numbers[0] == NO_LABEL else numbers,
                    np.concatenate(captions) if captions else None)  # fmt: skip

    def publish(self, units: list[Unit], shards: list[tuple[str, int]], described: str) -> dict[str, Manifest]:
        """Write encoders and manifests."""
        encoder = self.encoder(self.whole("encoder.npz"))
        keys = [self.of(u) for u in units]
        pieces = np.concatenate([np.load(self.file("pieces", key)) for key in keys])
        skipped = [line for key in keys for line in json.loads(self.file("skipped", key, "json").read_text())]
        told = {} if self.captions is None else {s: self.captions.save(self.output / s) for s in self.settings.splits}
        highest = self._highest(keys)
        manifests = {}
        for split, name in enumerate(self.settings.splits):
            folder = self.output / name
            encoder.save(folder / "encoder.npz")
            infos = shard_infos(folder, sum(s == name for s, _ in shards))
            samples = sum(i.samples for i in infos)
            made: dict[str, Any] = {"source": described, "seed": self.settings.seed}
            seconds = pieces[(pieces[:, 0] < self.held_out) == split, 1]
            if self.source.frames:
                made |= {"files": len(seconds), "frames": samples * self.source.frames, "clips": samples,
                         "seconds": round(float(seconds.sum()), 3)}  # fmt: skip
            else:
                made |= {"pictures": len(seconds)}
            made["skipped"] = len(skipped)
            manifests[name] = Manifest(
                kind=self.source.kind, shape=self._shape(encoder), dtype="float16", samples=samples, shards=infos,
                encoder={"file": "encoder.npz", "sha256": sha256_of(folder / "encoder.npz"), **encoder.describe()},
                classes=(self.source.classes or [str(i) for i in range(highest + 1)]), provenance=made,
                captions=told.get(name, {}),
            )  # fmt: skip
        write_skipped(self.output, skipped)
        for name, manifest in manifests.items():
            manifest.write(self.output / name)
        return manifests


def prepare_latents(
    output: Path, units: list[list[InputFile]], source: Source, settings: LatentSettings, described: str, *,
    workers: int = 1, resume: bool = False, overwrite: bool = False, captions: Captions | None = None,
) -> dict[str, Manifest]:  # fmt: skip
    """Encode, normalise and write every split.

    Args:
        output: folder for train/ and validation/.
        units: the input's files, in order, in pieces of work.
        source: what reads them; a dataclass with the attributes and methods of Source.
        settings: what to make.
        described: what the input is, for the manifest.
        workers, resume, overwrite: see Job.
        captions: what is told of pictures; the pieces of `source` then have captions.

    Raises:
        DataError: an encoder that cannot be had, files that cannot be decoded (unless they are skipped), or
            input that cannot be split.
    """
    pieces = units_of(units)
    encoder = new_encoder(settings.encoder, source.height, source.width, settings.patch, settings.channels,
                          settings.model)  # fmt: skip
    given = None if settings.encoder in KINDS else sha256_of(Path(settings.encoder))
    options = {k: v for k, v in asdict(settings).items() if k != "skip_broken"}  # it changes nothing of what was made
    if settings.scale is None:
        del options["scale"]  # preparations of before had none
    elif encoder.mean is not None:
        raise DataError(f"--scale {settings.scale:g}: {settings.encoder} has a normalisation of its own: leave it out")
    about = {k: v for k, v in vars(source).items() if k != "captions"}
    record: dict[str, Any] = {"settings": options, "source": about, "encoder": [encoder.settings(), given]}
    if captions is not None:
        record["captions"] = captions.record()
    with Job(output, record, [file for files in units for file in files], workers, resume, overwrite) as job:
        if job.complete:
            return {name: read_manifest(str(output / name)) for name in settings.splits}
        passes = LatentPasses(output, settings, source, input=key_of(*(u.key for u in pieces)), captions=captions)
        passes = replace(passes, held_out=job.once(lambda: passes.look(pieces)))
        chosen = [] if encoder.fitted else passes.chosen(pieces)
        share = _FIT_FRAMES // max(len(chosen), 1)
        sample = functools.partial(passes.sample, frames=share)
        job.each("sampling", sample, chosen, lambda u: passes.sample_of(u, share))
        samples = [passes.sample_of(u, share) for u in chosen]
        passes = replace(passes, fitted=job.once(lambda: passes.fit(encoder, samples)))
        job.each("encoding", passes.encode, pieces, lambda u: passes.file("latents", passes.of(u)))
        passes = replace(passes, held_out=job.once(lambda: passes.look_again(pieces)))
        job.each("measuring", passes.measure, pieces, passes.moments_of)
        shards = job.once(lambda: passes.plan(pieces))
        job.once(passes.clear)
        job.each("writing shards", passes.write, shards, passes.shard_index)
        manifests = job.once(lambda: passes.publish(pieces, shards, described))
        job.finish()
        for name, manifest in manifests.items():
            counts = ", ".join(f"{v:,} {k}" for k, v in manifest.provenance.items() if k not in ("source", "seed"))
            shape = " x ".join(map(str, manifest.shape))
            job.console.print(
                f"{name}: {counts}, {manifest.samples:,} samples of {shape} in {len(manifest.shards)} shards"
            )
        if manifests["train"].provenance["skipped"]:
            job.console.print(f"broken files left out: {output / 'skipped.txt'}")
    return manifests
