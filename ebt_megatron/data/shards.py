"""Shards: plain WebDataset tars, an offset index beside each, and one manifest for a folder.

A member is a `.npy` block of samples: 64 rows of sequence_length + 1 tokens, one clip of a
video, 64 pictures. Stock webdataset reads the tars; the index lets us map them into memory
and pick any sample. See docs/data-format.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

SCHEMA_VERSION = 2
ROWS_PER_MEMBER = {"text": 64, "video": 1, "images": 64}
ARRAY_NAME = {"text": "tokens", "video": "latents", "images": "latents"}
LABELS = "labels"
VERIFY_BYTES = 512 << 20  # folders up to this size have their checksums verified when training starts
_OPEN_SHARDS = 256  # mapped at once: a map holds a file descriptor


class DataError(ValueError):
    """Data that cannot be used; the message is one line saying what is wrong, where, and what to do."""


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
        partial = folder / "manifest.json.partial"
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, folder / "manifest.json")


def _checksum(manifest: dict[str, Any]) -> str:
    """Of everything else a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shard_name(number: int) -> str:
    """The name of a folder's shard `number`."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """The name of the offset index beside a tar."""
    return shard.removesuffix(".tar") + ".index.json"


def read_manifest(folder: str) -> Manifest:
    """Read a shard folder's manifest (a path or any fsspec URL).

    Raises:
        DataError: if there is none, or it is not one of ours.
    """
    path = f"{folder.rstrip('/')}/manifest.json"
    again = "copy it again, or prepare the data again"
    try:
        with fsspec.open(path, "rb") as stream:
            raw = json.loads(stream.read())
        recorded = raw.pop("checksum", None)
    except FileNotFoundError:
        raise DataError(f"no shards at {folder}: manifest.json is missing; make them with data_prep/") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not a manifest ({' '.join(str(error).split())}); {again}") from None
    if recorded != _checksum(raw):
        raise DataError(f"{path} does not match its own checksum: it was damaged or edited; {again}")
    if raw["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {raw['schema_version']}, this program reads {SCHEMA_VERSION}; prepare the "
            "data again"
        )
    shards = [ShardInfo(**s) for s in raw.pop("shards")]
    return Manifest(shards=shards, **raw)


def write_shard(folder: Path, number: int, kind: str, samples: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write samples [N, *shape] as tar `number` and its index, byte-identical for identical samples.

    The tar is renamed into place when complete and its index after it: a shard that has an index is
    finished.

    Args:
        folder: made if it is not there.
        number: of the shard.
        kind: of the manifest.
        samples: a member holds ROWS_PER_MEMBER of them.
        labels: int64 [N], or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, members = ROWS_PER_MEMBER[kind], []
    path = folder / shard_name(number)
    partial = path.with_suffix(f".tar.{os.getpid()}.partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(0, len(samples), rows):
            key = f"{number:06d}-{first // rows:06d}"
            blocks = [(f"{key}.{ARRAY_NAME[kind]}.npy", samples[first : first + rows])]
            if labels is not None:
                blocks.append((f"{key}.{LABELS}.npy", labels[first : first + rows]))
            for name, block in blocks:
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(block))
                entry = tarfile.TarInfo(name)
                entry.size = buffer.tell()
                buffer.seek(0)
                offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
                tar.addfile(entry, buffer)
                members.append(Member(name, offset, entry.size, len(block)))
    index = {"samples": len(samples), "bytes": partial.stat().st_size, "sha256": sha256_of(partial), "members": members}
    os.replace(partial, path)
    partial.write_text(json.dumps(index) + "\n")
    os.replace(partial, folder / index_name(path.name))


def shard_infos(folder: Path, count: int) -> list[ShardInfo]:
    """What a manifest says of the `count` finished shards of a folder."""
    infos = []
    for name in map(shard_name, range(count)):
        path = folder / index_name(name)
        index = json.loads(path.read_text())
        infos.append(ShardInfo(name, index["samples"], index["bytes"], index["sha256"], sha256_of(path)))
    return infos


def _npy(block: np.ndarray) -> np.ndarray:
    """The array of a `.npy` file's bytes, without copying.

    Raises:
        ValueError: if they are not one.
    """
    header = io.BytesIO(block[:512].tobytes())
    version = np.lib.format.read_magic(header)
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = parse(header)
    return block[header.tell() :].view(dtype).reshape(shape)


class _OpenShard:
    """A tar mapped into memory; its members become arrays when they are asked for."""

    def __init__(self, path: Path, index: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        members = [Member(*m) for m in json.loads(index.read_text())["members"]]
        suffix = f".{LABELS}.npy"
        self.members = {
            "samples": [m for m in members if not m.name.endswith(suffix)],
            LABELS: [m for m in members if m.name.endswith(suffix)],
        }
        self.bytes = np.memmap(path, mode="r", dtype=np.uint8)
        self.arrays: dict[str, list[np.ndarray | None]] = {k: [None] * len(v) for k, v in self.members.items()}

    def block(self, what: str, index: int, shape: list[int]) -> np.ndarray:
        """The array of member `index` of "samples" or LABELS, each of its samples having `shape`."""
        array = self.arrays[what][index]
        if array is None:
            array = self.arrays[what][index] = self._read(self.members[what][index], shape)
        return array

    def _read(self, member: Member, shape: list[int]) -> np.ndarray:
        try:
            array = _npy(self.bytes[member.offset : member.offset + member.bytes])
        except ValueError as error:
            raise DataError(
                f"member {member.name} of {self.path} is not an array ({error}); run tools/shards.py verify"
            ) from None
        if list(array.shape) != [member.samples, *shape]:
            raise DataError(
                f"member {member.name} of {self.path} has shape {list(array.shape)}, expected "
                f"{[member.samples, *shape]}; prepare the data again"
            )
        return array


class ShardFolder:
    """A prepared folder, mapped into memory (local) or fetched shard by shard into a cache (remote).

    Args:
        folder: path or fsspec URL.
        cache_dir: where shards of a URL are kept; needed for URLs.

    Raises:
        DataError: no manifest, a shard missing or of the wrong size, a wrong checksum (folders of up to
            VERIFY_BYTES are read whole; for larger ones there is `tools/shards.py verify`).
    """

    def __init__(self, folder: str, cache_dir: str | None = None):
        self.folder, self.manifest = folder.rstrip("/"), read_manifest(folder)
        self.remote = "://" in folder
        if self.remote and not cache_dir:
            raise DataError(f"{folder} is remote: set data.cache_dir to a folder for its shards")
        digest = hashlib.sha256(self.folder.encode()).hexdigest()[:16]
        self.local = Path(cache_dir or "") / digest if self.remote else Path(folder)
        self.first = np.cumsum([0] + [s.samples for s in self.manifest.shards])
        if not self.manifest.shards or not self.first[-1]:
            raise DataError(f"no shards at {folder}: the manifest lists none; prepare the data again")
        self._rows = ROWS_PER_MEMBER[self.manifest.kind]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        if not self.remote:
            self._check()

    def __len__(self) -> int:
        return int(self.first[-1])

    def _check(self) -> None:
        verify = sum(s.bytes for s in self.manifest.shards) <= VERIFY_BYTES
        for shard in self.manifest.shards:
            for name in (shard.name, shard.index_name):
                if not (self.local / name).exists():
                    raise DataError(f"shard {self.local / name} is missing: copy it again, or prepare the data again")
            self._check_tar(self.local / shard.name, shard, verify)

    @staticmethod
    def _check_tar(path: Path, shard: ShardInfo, verify: bool) -> None:
        size = path.stat().st_size
        if size != shard.bytes:
            state = "truncated" if size < shard.bytes else "too long"
            raise DataError(f"shard {path} is {state}: {size} bytes, the manifest says {shard.bytes}; copy it again")
        if verify and sha256_of(path) != shard.sha256:
            raise DataError(f"shard {path} does not match its checksum in manifest.json: copy it again")

    @staticmethod
    def _check_index(path: Path, shard: ShardInfo) -> None:
        if sha256_of(path) != shard.index_sha256:
            raise DataError(f"index {path} does not match its checksum in manifest.json: copy it again")

    def fetch(self, name: str, check: Any = None, attempts: int = 5) -> Path:
        """The local path of one of the folder's files; a remote one comes from the cache or the network.

        Args:
            name: of the file.
            check: called with the path of what was read; raises DataError to have it read again.
            attempts: before giving up.
        """
        path = self.local / name
        if not self.remote or path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{name}.{os.getpid()}.partial")
        for attempt in range(attempts):
            try:
                with fsspec.open(f"{self.folder}/{name}", "rb") as source, partial.open("wb") as target:
                    while chunk := source.read(1 << 20):
                        target.write(chunk)
                if check:
                    check(partial)
                os.replace(partial, path)
                return path
            except (OSError, DataError) as error:
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
                if attempt == attempts - 1:
                    raise DataError(f"{self.folder}/{name} cannot be read ({error}) after {attempts} tries") from None
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def sidecar(self) -> Path:
        """The tokenizer or encoder file, verified.

        Raises:
            DataError: if it is missing or not the one the shards were made with.
        """
        name, expected = self.manifest.sidecar["file"], self.manifest.sidecar["sha256"]
        path = self.fetch(name)
        if not path.exists():
            raise DataError(f"{path} is missing: copy it beside the manifest again")
        if sha256_of(path) != expected:
            raise DataError(f"{path} does not match the manifest beside it: put back the one the shards were made "
                            "with, or prepare the data again")  # fmt: skip
        return path

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.manifest.shards[number]
        path = self.fetch(shard.name, lambda p: self._check_tar(p, shard, verify=True))
        index = self.fetch(shard.index_name, lambda p: self._check_index(p, shard))
        self._check_index(index, shard)
        self._open[number] = _OpenShard(path, index, self.manifest)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def _take(self, what: str, shape: list[int], indices: np.ndarray, out: np.ndarray) -> None:
        numbers = np.searchsorted(self.first, indices, side="right") - 1
        members, rows = np.divmod(indices - self.first[numbers], self._rows)
        for i, (number, member, row) in enumerate(zip(numbers.tolist(), members.tolist(), rows.tolist(), strict=True)):
            out[i] = self._shard(number).block(what, member, shape)[row]

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copy samples `indices` [N] to out [N, *manifest.shape], of any dtype that holds them."""
        self._take("samples", self.manifest.shape, indices, out)

    def gather_labels(self, indices: np.ndarray) -> np.ndarray:
        """The labels int64 [N] of samples `indices`, of pictures that have classes."""
        out = np.empty(len(indices), np.int64)
        self._take(LABELS, [], indices, out)
        return out

    def row(self, index: int) -> np.ndarray:
        """Sample `index`, 0 <= index < len(self): an array of manifest.shape, not copied."""
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        member, row = divmod(index - int(self.first[number]), self._rows)
        return self._shard(number).block("samples", member, self.manifest.shape)[row]

    def label(self, index: int) -> int:
        """The label of sample `index`."""
        return int(self.gather_labels(np.array([index]))[0])

    def rows(self) -> Iterable[np.ndarray]:
        """Every sample, in order."""
        return (self.row(i) for i in range(len(self)))
