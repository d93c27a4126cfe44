"""Shards: plain WebDataset tars, an offset index beside each, and one manifest for a folder.

A member is a `.npy` block of as many samples as `kinds.py` says: 64 rows of sequence_length + 1 tokens, one clip of a
video, 64 pictures. Stock webdataset reads the tars; the index lets folder.py map local ones into memory and pick any
sample. See docs/data-format.md.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from filelock import FileLock, Timeout

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing, sha256_of, write_whole
from ebt_megatron.data.kinds import Kind, kind_of
from ebt_megatron.data.manifest import ShardInfo, index_name

_SHARD = r"shard-\d{6,}\.(tar|index\.json)"
_PARTIAL = rf"({_SHARD}|manifest\.json|tokenizer\.json|puzzle\.json|captions\.json|encoder\.npz)(\.\d+)?\.partial"
_MADE = re.compile(rf"{_SHARD}|manifest\.json|{_PARTIAL}")
_LEFT = re.compile(rf"{_PARTIAL}|(job\.json|skipped\.txt|rewrite\.json)\.\d+\.partial")


class Member(NamedTuple):
    """A tar member: its name, where its bytes are in the tar, and the samples it holds."""

    name: str
    offset: int
    bytes: int
    samples: int


def shard_name(number: int) -> str:
    """The name of a folder's shard `number`."""
    return f"shard-{number:06d}.tar"


def made_in(folder: Path) -> list[Path]:
    """A folder's manifest, which comes first, its shards, and what killed processes left of any file of ours."""
    return [path for path in sorted(folder.glob("*")) if _MADE.fullmatch(path.name)]


def clear_shards(folder: Path) -> None:
    """Remove what made_in names, and no other file: the manifest first, as what has none is not complete."""
    for path in made_in(folder):
        path.unlink()


def clear_partial(folder: Path) -> None:
    """Remove what killed processes left of files of ours."""
    for path in folder.glob("*.partial"):
        if _LEFT.fullmatch(path.name):
            path.unlink()


class OutputLock:
    """Lets one process at a time write a folder of shards."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder, FileLock(folder / ".lock")

    def acquire(self) -> None:
        """Take the folder, which is made if it is not there.

        Raises:
            DataError: if another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"another process writes {self.folder}: wait for it, or choose another --output") from None

    def release(self) -> None:
        """Give the folder back; harmless if it is not held."""
        if self._lock.is_locked:
            (self.folder / ".lock").unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def write_shard(folder: Path, number: int, kind: str, samples: np.ndarray, **beside: np.ndarray | None) -> None:
    """Write samples [N, *shape] as tar `number` and its index, byte-identical for identical samples.

    The tar is renamed into place when complete and its index after it: a shard that has an index is
    finished.

    Args:
        folder: made if it is not there.
        number: of the shard.
        kind: of the manifest.
        samples: a member holds as many of them as the kind says.
        beside: what else samples of this kind have, by name ("labels", "captions"), [N, ...] each; None: nothing.

    Raises:
        DataError: for what samples of this kind do not have.
    """
    made = kind_of(kind)
    more = {name: array for name, array in beside.items() if array is not None}
    if unknown := set(more) - {part.name for part in made.beside}:
        raise DataError(f"samples of the kind {kind} have no {', '.join(sorted(unknown))}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shard_name(number)
    with replacing(path) as partial:
        index = _write_tar(partial, f"{number:06d}", made, {made.array: samples, **more})
    write_whole(folder / index_name(path.name), json.dumps(index) + "\n")


def _write_tar(path: Path, name: str, kind: Kind, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write a tar; returns what its index says."""
    count, members = len(arrays[kind.array]), []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(0, count, kind.rows):
            key = f"{name}-{first // kind.rows:06d}"
            blocks = [(f"{key}.{what}.npy", rows[first : first + kind.rows]) for what, rows in arrays.items()]
            for member, block in blocks:
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(block))
                entry = tarfile.TarInfo(member)
                entry.size = buffer.tell()
                buffer.seek(0)
                offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
                tar.addfile(entry, buffer)
                members.append(Member(member, offset, entry.size, len(block)))
    return {"samples": count, "bytes": path.stat().st_size, "sha256": sha256_of(path), "members": members}


def shard_infos(folder: Path, count: int) -> list[ShardInfo]:
    """What a manifest says of the `count` finished shards of a folder."""
    infos = []
    for name in map(shard_name, range(count)):
        path = folder / index_name(name)
        index = json.loads(path.read_text())
        infos.append(ShardInfo(name, index["samples"], index["bytes"], index["sha256"], sha256_of(path)))
    return infos
