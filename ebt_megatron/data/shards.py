"""Shards: plain WebDataset tars, an offset index beside each, and one manifest for a folder.

A text member is a `.npy` of up to 64 rows of sequence_length + 1 tokens; consecutive rows of
the packed stream overlap by one token, so every token is predicted once. Stock webdataset
reads the tars; the index lets us map them into memory and pick any row. See
docs/data-format.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

SCHEMA_VERSION = 1
ROWS_PER_MEMBER = 64
VERIFY_BYTES = 512 << 20  # folders up to this size have their checksums verified when training starts


class DataError(ValueError):
    """Data that cannot be used; the message is one line saying what is wrong, where, and what to do."""


@dataclass
class ShardInfo:
    """What the manifest says of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    members: list[tuple[str, int, int, int]] = field(default_factory=list)  # name, offset, bytes, samples


@dataclass
class Manifest:
    """What a folder of shards holds.

    Attributes:
        kind: "text".
        sequence_length: tokens predicted per sample; a row has one more.
        dtype: of the stored tokens.
        vocab_size: entries of the tokenizer.
        tokenizer: {"file", "sha256", "end_of_text"}; the file lies beside the manifest.
        bytes_per_token: of the text the shards were made from.
        provenance: where the data came from and how it was made.
    """

    kind: str
    sequence_length: int
    dtype: str
    vocab_size: int
    tokenizer: dict[str, Any]
    samples: int
    bytes_per_token: float
    shards: list[ShardInfo]
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

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
    shards = [ShardInfo(**{**s, "members": [tuple(m) for m in s["members"]]}) for s in raw.pop("shards")]
    return Manifest(shards=shards, **raw)


class ShardWriter:
    """Writes rows into tars of a fixed number of samples; byte-identical for identical rows.

    Args:
        folder: where to write.
        samples_per_shard: rows in each tar but the last.
    """

    def __init__(self, folder: Path, samples_per_shard: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.samples_per_shard = folder, samples_per_shard
        self.rows: list[np.ndarray] = []
        self.shards: list[ShardInfo] = []

    def add(self, row: np.ndarray) -> None:
        """Take one row."""
        self.rows.append(row)
        if len(self.rows) == self.samples_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken as one tar, renamed into place when complete."""
        if not self.rows:
            return
        name = f"shard-{len(self.shards):06d}.tar"
        partial = self.folder / (name + ".partial")
        members = []
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for first in range(0, len(self.rows), ROWS_PER_MEMBER):
                block = np.stack(self.rows[first : first + ROWS_PER_MEMBER])
                buffer = io.BytesIO()
                np.save(buffer, block)
                member = tarfile.TarInfo(f"{len(self.shards):06d}-{first // ROWS_PER_MEMBER:06d}.tokens.npy")
                member.size = buffer.tell()
                buffer.seek(0)
                offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
                tar.addfile(member, buffer)
                members.append((member.name, offset, member.size, len(block)))
        path = self.folder / name
        os.replace(partial, path)
        self.shards.append(ShardInfo(name, len(self.rows), path.stat().st_size, sha256_of(path), members))
        self.rows = []


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
        self._maps: dict[int, list[np.ndarray]] = {}
        if not self.remote:
            self._check()

    def __len__(self) -> int:
        return int(self.first[-1])

    def _check(self) -> None:
        verify = sum(s.bytes for s in self.manifest.shards) <= VERIFY_BYTES
        for shard in self.manifest.shards:
            path = self.local / shard.name
            if not path.exists():
                raise DataError(f"shard {path} is missing: copy it again, or prepare the data again")
            self._check_file(path, shard, verify)

    @staticmethod
    def _check_file(path: Path, shard: ShardInfo, verify: bool) -> None:
        size = path.stat().st_size
        if size != shard.bytes:
            state = "truncated" if size < shard.bytes else "too long"
            raise DataError(f"shard {path} is {state}: {size} bytes, the manifest says {shard.bytes}; copy it again")
        if verify and sha256_of(path) != shard.sha256:
            raise DataError(f"shard {path} does not match its checksum in manifest.json: copy it again")

    def _fetch(self, shard: ShardInfo, attempts: int = 5) -> Path:
        """A shard of a remote folder, from the cache or the network, verified."""
        path = self.local / shard.name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        for attempt in range(attempts):
            try:
                with fsspec.open(f"{self.folder}/{shard.name}", "rb") as source, partial.open("wb") as target:
                    while chunk := source.read(1 << 20):
                        target.write(chunk)
                self._check_file(partial, shard, verify=True)
                os.replace(partial, path)
                return path
            except (OSError, DataError) as error:
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
                if attempt == attempts - 1:
                    raise DataError(
                        f"{self.folder}/{shard.name} cannot be read ({error}) after {attempts} tries"
                    ) from None
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def _members(self, index: int) -> list[np.ndarray]:
        if index not in self._maps:
            shard = self.manifest.shards[index]
            path = self._fetch(shard) if self.remote else self.local / shard.name
            whole = np.memmap(path, mode="r", dtype=np.uint8)
            members = []
            for name, offset, size, samples in shard.members:
                block = whole[offset : offset + size]
                try:
                    version = np.lib.format.read_magic(header := io.BytesIO(block[:512].tobytes()))
                    reader = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = reader(header)
                    rows = block[header.tell() :].view(dtype).reshape(shape)
                except ValueError as error:
                    raise DataError(
                        f"member {name} of {path} is not an array ({error}); run tools/shards.py verify"
                    ) from None
                expected = (samples, self.manifest.sequence_length + 1)
                if shape != expected:
                    raise DataError(
                        f"member {name} of {path} has shape {shape}, expected {expected}; prepare the data again"
                    )
                members.append(rows)
            self._maps[index] = members
        return self._maps[index]

    def row(self, index: int) -> np.ndarray:
        """Sample `index`, 0 <= index < len(self): sequence_length + 1 tokens."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        within = index - int(self.first[shard])
        return self._members(shard)[within // ROWS_PER_MEMBER][within % ROWS_PER_MEMBER]
