"""Shards: plain WebDataset tars, an offset index beside each, and one manifest for a folder.

A member is a `.npy` block of samples: 64 rows of sequence_length + 1 tokens, one clip of a
video, 64 pictures. Stock webdataset reads the tars; the index lets folder.py map local ones
into memory and pick any sample. See docs/data-format.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from filelock import FileLock, Timeout

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing, write_whole
from ebt_megatron.data.remote import open_url, retry

SCHEMA_VERSION = 2
ROWS_PER_MEMBER = {"text": 64, "video": 1, "images": 64}
ARRAY_NAME = {"text": "tokens", "video": "latents", "images": "latents"}
LABELS, CAPTIONS = "labels", "captions"  # beside the samples of a member, where pictures have them
_SHARD = r"shard-\d{6,}\.(tar|index\.json)"
_PARTIAL = rf"({_SHARD}|manifest\.json|tokenizer\.json|captions\.json|encoder\.npz)(\.\d+)?\.partial"
_MADE = re.compile(rf"{_SHARD}|manifest\.json|{_PARTIAL}")
_LEFT = re.compile(rf"{_PARTIAL}|(job\.json|skipped\.txt|rewrite\.json)\.\d+\.partial")


class Member(NamedTuple):
    """A tar member: its name, where its bytes are in the tar, and the samples it holds."""

    name: str
    offset: int
    bytes: int
    samples: int


@dataclass
class ShardInfo:
    """What the manifest says of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The offset index beside the tar."""
        return index_name(self.name)


@dataclass
class Manifest:
    """What a folder of shards holds.

    Attributes:
        kind: "text", "video" or "images".
        shape: of one sample: [sequence_length + 1] tokens, [frames, patches, channels] of a clip,
            [patches, channels] of a picture.
        dtype: of the stored samples.
        samples: in all shards.
        provenance: where the data came from and how it was made.
        tokenizer: of text: {"file", "sha256", "end_of_text", "vocab_size", "bytes_per_token"}; the
            file lies beside the manifest.
        encoder: of frames and pictures: {"file", "sha256", "kind", "patch", "height", "width", "mean",
            "std"}; samples are (encoding - mean) / std, by channel.
        classes: names of the labels, where pictures have labels.
        captions: where pictures have captions: {"kind", "shape", "sha256", "origin", ...}; see `data.captions`.
    """

    kind: str
    shape: list[int]
    dtype: str
    samples: int
    shards: list[ShardInfo]
    provenance: dict[str, Any]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    captions: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def sequence_length(self) -> int:
        """Tokens or frames predicted per sample."""
        return self.shape[0] - 1

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer; 0 without one."""
        return self.tokenizer.get("vocab_size", 0)

    @property
    def sidecar(self) -> dict[str, Any]:
        """The tokenizer or the encoder: what turns samples back into text or pixels."""
        return self.tokenizer or self.encoder

    def write(self, folder: Path) -> None:
        """Publish: written last and renamed into place, so that a folder with a manifest is complete."""
        data = asdict(self)
        data["checksum"] = _checksum(data)
        write_whole(folder / "manifest.json", json.dumps(data, indent=1) + "\n")


def _checksum(manifest: dict[str, Any]) -> str:
    """Of everything else a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def member_kind(name: str) -> str:
    """What a tar member holds, by its name: "samples", LABELS or CAPTIONS."""
    return next((kind for kind in (LABELS, CAPTIONS) if name.endswith(f".{kind}.npy")), "samples")


def sample_shape(manifest: Manifest, kind: str) -> list[int]:
    """The shape that a sample has in members of a kind."""
    return {"samples": manifest.shape, LABELS: [], CAPTIONS: manifest.captions.get("shape", [])}[kind]


def caption_key(manifest: Manifest) -> list[Any]:
    """What captions must have in common to be told to one model."""
    return [manifest.captions.get(key) for key in ("kind", "shape", "sha256")]


def out_of_range(block: np.ndarray, manifest: Manifest, kind: str) -> str:
    """What is wrong with the values of a member of a kind: ids that the manifest knows nothing of; or ""."""
    entries = "entries of the vocabulary"
    what, least, count, of = {
        "samples": ("token", 0, manifest.vocab_size, entries),
        LABELS: ("label", 0, len(manifest.classes), "classes"),
        CAPTIONS: ("token", -1, manifest.captions.get("entries", 0), entries),
    }[kind]
    if not block.size or (not count and kind != LABELS):
        return ""
    low, high = int(block.min()), int(block.max())
    if low >= least and high < count:
        return ""
    return f"{what} {low if low < least else high}, outside the {count} {of}"


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One SHA-256 of several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def shard_name(number: int) -> str:
    """The name of a folder's shard `number`."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """The name of the offset index beside a tar."""
    return shard.removesuffix(".tar") + ".index.json"


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


def is_remote(folder: str) -> bool:
    """Whether it is a URL rather than a path."""
    return "://" in folder


def content_of(path: str) -> bytes:
    """All bytes of a file (a path or a URL)."""
    if not is_remote(path):
        return Path(path).read_bytes()

    def work() -> bytes:
        with open_url(path) as stream:
            return bytes(stream.read())

    return retry(path, work)


def read_manifest(folder: str) -> Manifest:
    """Read a shard folder's manifest (a path or a URL).

    Raises:
        DataError: if there is none, or it is not one of ours.
    """
    path = f"{folder.rstrip('/')}/manifest.json"
    again = "copy it again, or prepare the data again"
    try:
        raw = json.loads(content_of(path))
        recorded = raw.pop("checksum", None)
    except FileNotFoundError:
        raise DataError(f"no shards at {folder}: manifest.json is missing; make them with data_prep/") from None
    except OSError as error:
        raise DataError(f"no shards at {folder}: {error}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not a manifest ({' '.join(str(error).split())}); {again}") from None
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; prepare the data again"
        )
    if recorded != _checksum(raw):
        raise DataError(f"{path} does not match its own checksum: it was damaged or edited; {again}")
    shards = [ShardInfo(**s) for s in raw.pop("shards")]
    return Manifest(shards=shards, **raw)


def write_shard(
    folder: Path,
    number: int,
    kind: str,
    samples: np.ndarray,
    labels: np.ndarray | None = None,
    captions: np.ndarray | None = None,
) -> None:
    """Write samples [N, *shape] as tar `number` and its index, byte-identical for identical samples.

    The tar is renamed into place when complete and its index after it: a shard that has an index is
    finished.

    Args:
        folder: made if it is not there.
        number: of the shard.
        kind: of the manifest.
        samples: a member holds ROWS_PER_MEMBER of them.
        labels: int64 [N], or none.
        captions: [N, *shape of the manifest's captions], or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shard_name(number)
    with replacing(path) as partial:
        index = _write_tar(partial, f"{number:06d}", kind, samples, {LABELS: labels, CAPTIONS: captions})
    write_whole(folder / index_name(path.name), json.dumps(index) + "\n")


def _write_tar(
    path: Path, name: str, kind: str, samples: np.ndarray, beside: dict[str, np.ndarray | None]
) -> dict[str, Any]:
    """Write a tar; returns what its index says."""
    rows, members = ROWS_PER_MEMBER[kind], []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(0, len(samples), rows):
            key = f"{name}-{first // rows:06d}"
            blocks = [(f"{key}.{ARRAY_NAME[kind]}.npy", samples[first : first + rows])]
            blocks += [
                (f"{key}.{what}.npy", more[first : first + rows]) for what, more in beside.items() if more is not None
            ]
            for member, block in blocks:
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(block))
                entry = tarfile.TarInfo(member)
                entry.size = buffer.tell()
                buffer.seek(0)
                offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
                tar.addfile(entry, buffer)
                members.append(Member(member, offset, entry.size, len(block)))
    return {"samples": len(samples), "bytes": path.stat().st_size, "sha256": sha256_of(path), "members": members}


def shard_infos(folder: Path, count: int) -> list[ShardInfo]:
    """What a manifest says of the `count` finished shards of a folder."""
    infos = []
    for name in map(shard_name, range(count)):
        path = folder / index_name(name)
        index = json.loads(path.read_text())
        infos.append(ShardInfo(name, index["samples"], index["bytes"], index["sha256"], sha256_of(path)))
    return infos
