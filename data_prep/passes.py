"""What the passes of every preparation share: pieces of work, their files, and shards made anew.

In OUTPUT/.work a pass keeps what it made of a piece of work under that piece's key, which changes with its
files. What depends on the whole input is in a folder named by all keys. So a preparation of input of which
some files have changed goes on, and nothing is mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing, write_whole
from ebt_megatron.core.options import option
from ebt_megatron.data.manifest import Manifest, index_name
from ebt_megatron.data.shards import clear_shards, shard_name
from ebt_megatron.data_prep.files import recorded_names, without_secrets
from ebt_megatron.data_prep.job import Job

Shard = tuple[str, int]  # split, number


def key_of(*what: Any) -> str:
    """Sixteen letters that are others for other things."""
    return hashlib.blake2b(repr(what).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the shards of every preparation depend on besides the input.

    Attributes:
        validation_fraction: share of documents, files or pictures held out; 0: no validation folder.
        skip_broken: leave out what cannot be read; else it ends the preparation.
        seed: of the split, and of the sample that an encoder is fitted on.
    """

    validation_fraction: float = option(0.02, min=0.0, max=0.5, help="Share held out; 0: no validation folder.")
    skip_broken: bool = option(False, help="Leave out what cannot be read or decoded; OUTPUT/skipped.txt names it.")
    seed: int = option(0, min=0, help="Seed of the split and of what is fitted.")

    @property
    def splits(self) -> list[str]:
        """Folders to make."""
        return ["train", "validation"] if self.validation_fraction else ["train"]


@dataclass(frozen=True)
class Unit:
    """A piece of work: consecutive files of the input, or parts of them; plain tuples that begin with a path.

    Attributes:
        number: in the input.
        parts: the files.
        key: of the files as they are now, by their recorded names.
    """

    number: int
    parts: Sequence[Any]
    key: str


def units_of(parts: Sequence[Sequence[Any]]) -> list[Unit]:
    """The input, in order, in pieces of work."""
    names = recorded_names([file[0] for part in parts for file in part])
    keys = [key_of(*((names[path], *rest) for path, *rest in part)) for part in parts]
    return [Unit(i, part, key) for i, (part, key) in enumerate(zip(parts, keys, strict=True))]


@dataclass(frozen=True)
class WorkFolder:
    """The folder in which every process finds the files of a preparation.

    Attributes:
        output: folder of the splits.
        input: the key of all pieces of work.
    """

    output: Path
    input: str

    @classmethod
    def of(cls, output: Path, units: Sequence[Unit]) -> WorkFolder:
        """Return the work folder of a preparation of some pieces of work."""
        return cls(output, key_of(*(u.key for u in units)))

    def file(self, what: str, key: str, suffix: str = "npy") -> Path:
        """What a pass makes of a piece of work."""
        return self.output / ".work" / f"{what}-{key}.{suffix}"

    def whole(self, name: str) -> Path:
        """A file that depends on the whole input."""
        return self.output / ".work" / self.input / name

    def of_whole(self, what: str, number: int) -> Path:
        """What a pass makes of a piece of work, of a number, that depends on the others."""
        return self.whole(f"{what}-{number:06d}.npy")

    def shard_index(self, item: Shard) -> Path:
        """The file that shows a shard is finished."""
        return self.output / item[0] / index_name(shard_name(item[1]))

    def clear(self) -> None:
        """Remove the shards that were there before, once, before the first of this input is written."""
        done = self.whole("cleared")
        if not done.exists():
            for split in ("train", "validation"):
                clear_shards(self.output / split)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()


def save(path: Path, array: np.ndarray) -> None:
    """Write an array and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as stream:
        # Given the file itself, numpy says of a full disk how many items it wrote, and no more.
        np.save(cast(Any, SimpleNamespace(write=stream.write)), array)


class Shards(Protocol):
    """The last passes of a preparation."""

    @property
    def work(self) -> WorkFolder:
        """The folder of the files."""

    def write(self, item: Shard) -> None:
        """Write one shard."""
        ...

    def publish(self, units: list[Unit], shards: list[Shard], source: str) -> dict[str, Manifest]:
        """Write manifests, and what they name; `source` says what the input is."""
        ...


def finish(job: Job, last: Shards, units: list[Unit], shards: list[Shard], source: str) -> dict[str, Manifest]:
    """Write the shards in place of those that were there, then manifests, which show that they are whole."""
    job.once(last.work.clear)
    job.each("writing shards", last.write, shards, last.work.shard_index)
    manifests = job.once(lambda: last.publish(units, shards, source))
    job.finish()
    return manifests


def threshold(hashes: np.ndarray, fraction: float, what: str) -> float:
    """Below which a hash in [0, 1) means held out: the fraction, or so that both splits get something.

    Args:
        hashes: of all that is split, or enough of it to find something for both.
        fraction: share held out; 0: nothing.
        what: is split, for the message.

    Raises:
        DataError: if there is nothing, or only one to be split.
    """
    if not len(hashes):
        raise DataError(f"the input has no {what} that can be read")
    if not fraction or ((hashes < fraction).any() and (hashes >= fraction).any()):
        return fraction
    found = np.unique(hashes)
    if len(found) < 2:
        raise DataError(
            f"the input is one {what}, which cannot be split: give more, or pass --validation-fraction 0 "
            "for no validation folder"
        )
    return float(found[1] if found[0] >= fraction else found[-1])


def write_skipped(output: Path, lines: list[str]) -> None:
    """Name what was left out in OUTPUT/skipped.txt; none, no file."""
    path = output / "skipped.txt"
    if lines:
        write_whole(path, "".join(f"{without_secrets(line)}\n" for line in lines).encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)
