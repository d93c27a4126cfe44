"""Frames and pictures to shards of normalised latents: the passes that video and images share.

Four passes, each restartable (data_prep/job.py): look at a sample of the input, where the encoder must
be fitted; encode every unit; cut each split's samples into shards, normalised by the mean and standard
deviation of the train split; publish.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ebt_megatron.data.shards import (
    DataError,
    Manifest,
    index_name,
    read_manifest,
    sha256_of,
    shard_infos,
    shard_name,
    write_shard,
)

from .encoders import KINDS, Encoder, load_encoder, new_encoder
from .files import InputFile, open_file
from .job import Job

_FIT_UNITS, _FIT_FRAMES = 64, 1024  # an encoder is fitted on so many frames of so many units
_BATCH = 64  # frames encoded at once
NO_LABEL = -1


class Piece(NamedTuple):
    """What goes to one split as a whole: a video or a picture.

    Attributes:
        content: bytes that its split is a hash of.
        samples: uint8 [frames, height, width, 3] of every clip or tile (of a picture one frame), in order,
            and the seconds it lasts; raises DataError where the file is broken.
        label: of every sample, or NO_LABEL.
    """

    content: bytes
    samples: Iterator[tuple[np.ndarray, float]]
    label: int = NO_LABEL


class Source(Protocol):
    """A kind of input: a frozen dataclass of options, the same in every process."""

    @property
    def kind(self) -> str:
        """Of the manifest."""

    @property
    def frames(self) -> int | None:
        """Of a sample of video, none of a picture."""

    @property
    def height(self) -> int:
        """Of a frame."""

    @property
    def width(self) -> int:
        """Of a frame."""

    @property
    def classes(self) -> list[str]:
        """Names of the labels; empty: their numbers."""

    def read(self, files: list[InputFile]) -> Iterator[Piece]:
        """The pieces of some files, in order."""
        ...


@dataclass(frozen=True)
class LatentSettings:
    """What the shards depend on besides the input.

    Attributes:
        encoder: see new_encoder, as `patch`, `channels` and `model`.
        samples_per_shard: in every tar but the last.
        validation_fraction: share of files (pictures) held out; 0: no validation folder.
        seed: of the split, and of the sample that an encoder is fitted on.
        skip_broken: leave out files that cannot be decoded; else they end the preparation.
    """

    encoder: str = "pca"
    patch: int | None = None
    channels: int | None = None
    model: str | None = None
    samples_per_shard: int = 512
    validation_fraction: float = 0.02
    seed: int = 0
    skip_broken: bool = False

    @property
    def splits(self) -> list[str]:
        """Folders to make."""
        return ["train", "validation"] if self.validation_fraction else ["train"]


@dataclass(frozen=True)
class Unit:
    """A piece of work: some files."""

    number: int
    files: list[InputFile]


def fingerprint(file: InputFile) -> bytes:
    """What tells a file from others: its size, and its first and last megabyte (all of it, up to two).

    A path is no part of it, and the rest of a long video behind a URL need not be fetched.

    Raises:
        DataError: if it cannot be read.
    """
    size, megabyte = file.bytes, 1 << 20
    try:
        with open_file(file.path) as stream:
            first = stream.read(megabyte)
            stream.seek(max(len(first), size - megabyte))
            return b"%d " % size + first + stream.read(megabyte)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error})") from None


def _hash(seed: int, content: bytes) -> float:
    """In [0, 1)."""
    digest = hashlib.blake2b(content, digest_size=6, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") / 2.0**48


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
class Passes:
    """What every process does to a unit or a shard.

    Per unit, in OUTPUT/.work: sample-N.npy, frames uint8 to fit on; latents-N.npy, float32 of every
    sample, one after the other; splits-N.npy, of each sample (-1: dropped); labels-N.npy, of each;
    moments-N.npy, float64 [2, channels], sums of the train samples and of their squares; record-N.json.
    """

    settings: LatentSettings
    source: Source
    output: Path

    def file(self, what: str, number: int, suffix: str = "npy") -> Path:
        """An intermediate file of a unit."""
        return self.output / ".work" / f"{what}-{number:06d}.{suffix}"

    def encoder(self, name: str) -> Encoder:
        """`fitted`, or `encoder` once it knows its mean and standard deviation."""
        return load_encoder(self.output / ".work" / f"{name}.npz")

    def shard_index(self, item: tuple[str, int]) -> Path:
        """The file that shows shard (split, number) is finished."""
        return self.output / item[0] / index_name(shard_name(item[1]))

    def _save(self, what: str, number: int, array: np.ndarray) -> None:
        path = self.file(what, number)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.save(stream, array)
        os.replace(partial, path)

    def _split(self, piece: Piece) -> int:
        return int(_hash(self.settings.seed, piece.content) < self.settings.validation_fraction)

    # --- what the encoder is fitted on ---------------------------------------------------------------

    def chosen(self, units: list[Unit]) -> list[Unit]:
        """The units to take a sample of."""
        return sorted(units, key=lambda u: _hash(self.settings.seed, b"fit %d" % u.number))[:_FIT_UNITS]

    def sample(self, unit: Unit, frames: int) -> None:
        """Evenly spaced train frames of a unit, about as many as asked for."""
        thinned = _Thinned(frames)
        for piece in self.source.read(unit.files):
            if self._split(piece) == 0:
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
        self._save("sample", unit.number, np.array(thinned.frames, np.uint8).reshape(shape))

    def fit(self, encoder: Encoder, units: list[Unit]) -> None:
        """Save the encoder, fitted on what `sample` took."""
        path = self.output / ".work/fitted.npz"
        if not encoder.fitted and not path.exists():
            frames = np.concatenate([np.load(self.file("sample", u.number)) for u in units])
            if not len(frames):
                raise DataError("nothing to fit the encoder on: no file of the input is for train; give more files or "
                                "a smaller --validation-fraction")  # fmt: skip
            encoder.fit(frames)
        if not path.exists():
            encoder.save(path)

    # --- encoding -----------------------------------------------------------------------------------

    def encode(self, unit: Unit) -> None:
        """The latents of every sample of a unit."""
        encoder = self.encoder("fitted")
        splits: list[int] = []
        labels: list[int] = []
        batch: list[np.ndarray] = []
        record: dict[str, Any] = {"pieces": [0, 0], "seconds": [0.0, 0.0], "skipped": []}
        partial = self.file("latents", unit.number).with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:

            def flush() -> None:
                if batch:
                    stream.write(encoder.encode(np.concatenate(batch)).tobytes())
                    batch.clear()

            for piece in self.source.read(unit.files):
                begin, split, duration = len(splits), self._split(piece), 0.0
                try:
                    for sample, seconds in piece.samples:
                        batch.append(sample)
                        splits.append(split)
                        labels.append(piece.label)
                        duration += seconds
                        if len(batch) * len(sample) >= _BATCH:
                            flush()
                    record["pieces"][split] += 1
                    record["seconds"][split] += duration
                except DataError as error:
                    if not self.settings.skip_broken:
                        raise
                    splits[begin:] = [-1] * (len(splits) - begin)
                    record["skipped"].append(str(error))
            flush()
        self._save("splits", unit.number, np.array(splits, np.int8))
        self._save("labels", unit.number, np.array(labels, np.int64))
        self._save("moments", unit.number, self._moments(partial, np.array(splits, np.int8), encoder))
        self.file("record", unit.number, "json").write_text(json.dumps(record))
        os.replace(partial, self.file("latents", unit.number))

    def _moments(self, path: Path, splits: np.ndarray, encoder: Encoder) -> np.ndarray:
        moments = np.zeros((2, encoder.channels))
        latents = self._latents(path, len(splits), encoder)
        for row in np.flatnonzero(splits == 0):
            values = latents[row].reshape(-1, encoder.channels).astype(np.float64)
            moments += values.sum(0), (values * values).sum(0)
        return moments

    def _latents(self, path: Path, count: int, encoder: Encoder) -> np.ndarray:
        shape = (count, *self._shape(encoder))
        return np.memmap(path, np.float32, "r", shape=shape) if count else np.zeros(shape, np.float32)

    def _shape(self, encoder: Encoder) -> list[int]:
        """Of a sample."""
        return [self.source.frames, *encoder.shape] if self.source.frames else encoder.shape

    # --- between the passes, on the first rank ---------------------------------------------------------

    def plan(self, units: list[Unit]) -> list[tuple[str, int]]:
        """Save the encoder with its mean and standard deviation, and samples.npy: int64 [units, splits], the
        samples of each split in every unit. Returns the shards to write.
        """
        counts = np.zeros((len(units), len(self.settings.splits)), np.int64)
        labelled = set()
        for unit in units:
            splits, labels = np.load(self.file("splits", unit.number)), np.load(self.file("labels", unit.number))
            counts[unit.number] = [(splits == s).sum() for s in range(counts.shape[1])]
            labelled |= set((labels[splits >= 0] != NO_LABEL).tolist())
        if len(labelled) > 1:
            raise DataError("some pictures of the input have labels and some have none: prepare them separately")
        for name, count in zip(self.settings.splits, counts.sum(0).tolist(), strict=True):
            if not count:
                raise DataError(f"nothing of the input is for {name} (the split is by a hash of each file): give more "
                                "files, or another --validation-fraction or --seed")  # fmt: skip
        encoder = self.encoder("fitted")
        if encoder.mean is None:
            total, square = sum(np.load(self.file("moments", u.number)) for u in units)
            entries = int(counts[:, 0].sum()) * np.prod(self._shape(encoder)[:-1])
            mean = total / entries
            encoder.normalise_by(mean, np.sqrt(np.maximum(square / entries - mean**2, 0)))
        encoder.save(self.output / ".work/encoder.npz")
        np.save(self.output / ".work/samples.npy", counts)
        per_shard = self.settings.samples_per_shard
        totals = zip(self.settings.splits, counts.sum(0).tolist(), strict=True)
        return [(name, k) for name, total in totals for k in range(-(-total // per_shard))]

    def write(self, item: tuple[str, int]) -> None:
        """One shard: samples of its split, of all units in order, from number * samples_per_shard on."""
        name, number = item
        encoder, split = self.encoder("encoder"), self.settings.splits.index(name)
        ends = np.load(self.output / ".work/samples.npy")[:, split].cumsum()
        begin = number * self.settings.samples_per_shard
        end = min(begin + self.settings.samples_per_shard, int(ends[-1]))
        samples, labels = [], []
        for unit in range(int(ends.searchsorted(begin, "right")), int(ends.searchsorted(end)) + 1):
            splits = np.load(self.file("splits", unit))
            rows = np.flatnonzero(splits == split)
            first = int(ends[unit]) - len(rows)
            rows = rows[max(0, begin - first) : end - first]
            latents = self._latents(self.file("latents", unit), len(splits), encoder)
            samples += [encoder.to_samples(latents[row]) for row in rows]
            labels.append(np.load(self.file("labels", unit))[rows])
        numbers = np.concatenate(labels)
        write_shard(self.output / name, number, self.source.kind, np.stack(samples),
                    None if numbers[0] == NO_LABEL else numbers)  # fmt: skip

    def publish(self, units: list[Unit], shards: list[tuple[str, int]], described: str) -> dict[str, Manifest]:
        """Write encoders and manifests."""
        encoder = self.encoder("encoder")
        records = [json.loads(self.file("record", u.number, "json").read_text()) for u in units]
        highest = max(int(np.load(self.file("labels", u.number)).max(initial=NO_LABEL)) for u in units)
        manifests = {}
        for split, name in enumerate(self.settings.splits):
            folder = self.output / name
            encoder.save(folder / "encoder.npz")
            infos = shard_infos(folder, sum(s == name for s, _ in shards))
            samples = sum(i.samples for i in infos)
            made: dict[str, Any] = {"source": described, "seed": self.settings.seed}
            pieces = sum(r["pieces"][split] for r in records)
            if self.source.frames:
                made |= {"files": pieces, "frames": samples * self.source.frames, "clips": samples,
                         "seconds": round(sum(r["seconds"][split] for r in records), 3)}  # fmt: skip
            else:
                made |= {"pictures": pieces}
            made["skipped"] = sum(len(r["skipped"]) for r in records)
            manifests[name] = Manifest(
                kind=self.source.kind, shape=self._shape(encoder), dtype="float16", samples=samples, shards=infos,
                encoder={"file": "encoder.npz", "sha256": sha256_of(folder / "encoder.npz"), **encoder.describe()},
                classes=(self.source.classes or [str(i) for i in range(highest + 1)]), provenance=made,
            )  # fmt: skip
        skipped = [line for r in records for line in r["skipped"]]
        if skipped:
            (self.output / "skipped.txt").write_text("".join(f"{line}\n" for line in skipped))
        for name, manifest in manifests.items():
            manifest.write(self.output / name)
        return manifests


def prepare_latents(
    output: Path, units: list[list[InputFile]], source: Source, settings: LatentSettings, described: str, *,
    workers: int = 1, resume: bool = False, overwrite: bool = False,
) -> dict[str, Manifest]:  # fmt: skip
    """Encode, normalise and write every split.

    Args:
        output: folder for train/ and validation/.
        units: the input's files, in order, in pieces of work.
        source: what reads them; a dataclass with the attributes and methods of Source.
        settings: what to make.
        described: what the input is, for the manifest.
        workers, resume, overwrite: see Job.

    Raises:
        DataError: an encoder that cannot be had, files that cannot be decoded (unless they are skipped), or
            nothing for a split.
    """
    pieces, passes = [Unit(i, files) for i, files in enumerate(units)], Passes(settings, source, output)
    encoder = new_encoder(settings.encoder, source.height, source.width, settings.patch, settings.channels,
                          settings.model)  # fmt: skip
    given = None if settings.encoder in KINDS else sha256_of(Path(settings.encoder))
    record = {"settings": asdict(settings), "source": vars(source), "encoder": [encoder.settings(), given],
              "input": units}  # fmt: skip
    with Job(output, record, workers, resume, overwrite) as job:
        if job.complete:
            return {name: read_manifest(str(output / name)) for name in settings.splits}
        chosen = [] if encoder.fitted else passes.chosen(pieces)
        share = _FIT_FRAMES // max(len(chosen), 1)
        job.each(
            "sampling",
            functools.partial(passes.sample, frames=share),
            chosen,
            lambda u: passes.file("sample", u.number),
        )
        job.once(lambda: passes.fit(encoder, chosen))
        job.each("encoding", passes.encode, pieces, lambda u: passes.file("latents", u.number))
        shards = job.once(lambda: passes.plan(pieces))
        job.each("writing shards", passes.write, shards, passes.shard_index)
        manifests = job.once(lambda: passes.publish(pieces, shards, described))
        job.finish()
        for name, manifest in manifests.items():
            counts = ", ".join(f"{v:,} {k}" for k, v in manifest.provenance.items() if k not in ("source", "seed"))
            shape = " x ".join(map(str, manifest.shape))
            job.console.print(f"{name}: {counts}, {manifest.samples:,} samples of {shape} in {len(manifest.shards)} "
                              "shards", soft_wrap=True, highlight=False)  # fmt: skip
        if manifests["train"].provenance["skipped"]:
            job.console.print(f"broken files left out: {output / 'skipped.txt'}", soft_wrap=True, highlight=False)
    return manifests
