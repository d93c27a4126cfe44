"""Reading prepared folders: any sample of a local one, a group of shards at a time of a remote one."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.description import Description
from ebt_megatron.data.remote import Cache, RemoteError, in_background, stream_tar
from ebt_megatron.data.shards import (
    CAPTIONS,
    LABELS,
    ROWS_PER_MEMBER,
    Manifest,
    Member,
    ShardInfo,
    content_of,
    is_remote,
    member_kind,
    out_of_range,
    sample_shape,
    sha256_of,
)

VERIFY_BYTES = 512 << 20  # folders up to this size have their checksums verified when training starts
SAMPLES_CHECKED = 20_000  # of a larger folder, whose tokens are compared with the vocabulary at start
_MEMBERS = ("samples", LABELS, CAPTIONS)
_OPEN_SHARDS = 256  # mapped at once: a map holds a file descriptor


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
    """The members of a tar, as arrays."""

    def __init__(self, path: str | Path, members: list[Member], bytes_of: Any, manifest: Manifest):
        """`bytes_of` gives a member's bytes (uint8)."""
        self.path, self.bytes_of = path, bytes_of
        self.members = {what: [m for m in members if member_kind(m.name) == what] for what in _MEMBERS}
        self.shapes = {what: sample_shape(manifest, what) for what in _MEMBERS}
        self.arrays: dict[str, list[np.ndarray | None]] = {k: [None] * len(v) for k, v in self.members.items()}

    def block(self, what: str, index: int) -> np.ndarray:
        """The array of member `index` of "samples", LABELS or CAPTIONS."""
        array = self.arrays[what][index]
        if array is None:  # a member becomes an array when it is first asked for
            array = self.arrays[what][index] = self._read(self.members[what][index], self.shapes[what])
        return array

    def _read(self, member: Member, shape: list[int]) -> np.ndarray:
        try:
            array = _npy(self.bytes_of(member))
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


class ShardFolder(Description):
    """A prepared folder: mapped into memory if it is a path, read shard by shard if it is a URL.

    Remote shards go through a cache on disk, or, without one, are streamed through webdataset and held
    in memory while `expect` names them. Both are verified against the manifest.

    Args:
        folder: path or URL.
        cache: where shards of a URL are kept; None: in memory.
        readers: remote shards read at a time.

    Raises:
        DataError: no manifest, a shard missing or of the wrong size, a wrong checksum, tokens outside the
            vocabulary or labels outside the classes (folders of up to VERIFY_BYTES are read whole; larger ones
            as they are used, or by `tools/shards.py verify`).
    """

    def __init__(self, folder: str, cache: Cache | None = None, readers: int = 4):
        super().__init__(folder)
        self.remote, self.cache = is_remote(folder), cache
        self.sizes = [s.samples for s in self.manifest.shards]
        self.first = np.cumsum([0, *self.sizes])
        if not self.manifest.shards or not self.first[-1]:
            raise DataError(f"no shards at {folder}: the manifest lists none; prepare the data again")
        self._rows = ROWS_PER_MEMBER[self.manifest.kind]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._all_checked = False
        self._ahead: dict[int, Future[_OpenShard]] = {}
        self._slots = threading.Semaphore(readers)
        if not self.remote:
            self._check()

    def __len__(self) -> int:
        return int(self.first[-1])

    def _check(self) -> None:
        verify = sum(s.bytes for s in self.manifest.shards) <= VERIFY_BYTES
        for shard in self.manifest.shards:
            for name in (shard.name, shard.index_name):
                if not Path(self._at(name)).exists():
                    raise DataError(f"shard {self._at(name)} is missing: copy it again, or prepare the data again")
            self._check_tar(Path(self._at(shard.name)), shard, verify)
        if self.manifest.kind == "video":
            return
        if not verify:
            self._check_some()
            return
        for number, what in itertools.product(range(len(self.sizes)), _MEMBERS):
            opened = self._shard(number)
            for member in range(len(opened.members[what])):
                self._check_values(opened.block(what, member), what)
        self._all_checked = True

    def _check_some(self) -> None:
        """Look at samples spread over every shard of a large folder; `gather` looks at all as they are read."""
        stride = max(1, len(self) // SAMPLES_CHECKED)
        for first, size in zip(self.first.tolist(), self.sizes, strict=False):
            indices = np.arange(first, first + size, min(stride, max(1, size)))
            for begin in range(0, len(indices), 1024):
                some = indices[begin : begin + 1024]
                self.gather(some, np.empty((len(some), *self.manifest.shape), self.manifest.dtype))

    def _check_values(self, block: np.ndarray, what: str) -> None:
        problem = out_of_range(block, self.manifest, what)
        if problem:
            raise DataError(f"{self.folder} holds {problem} (tools/shards.py verify says where): prepare it again")

    @staticmethod
    def _check_tar(path: Path, shard: ShardInfo, verify: bool) -> None:
        size = path.stat().st_size
        if size != shard.bytes:
            state = "truncated" if size < shard.bytes else "too long"
            raise DataError(f"shard {path} is {state}: {size} bytes, the manifest says {shard.bytes}; copy it again")
        if verify and sha256_of(path) != shard.sha256:
            raise DataError(f"shard {path} does not match its checksum in manifest.json: copy it again")

    def _at(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _file(self, name: str, size: int | None, sha256: str) -> Path:
        """The local path of one of the folder's files, from the cache if the folder is remote."""
        if not self.remote:
            return Path(self._at(name))
        assert self.cache is not None
        try:
            return self.cache.fetch(self._at(name), size, sha256)
        except RemoteError as error:
            raise DataError(str(error)) from None

    def _local(self, name: str, sha256: str) -> Path:
        if not self.remote or self.cache is not None:
            return self._file(name, None, sha256)
        path = Path(self._temporary.name, name)
        if not path.exists():
            path.write_bytes(content_of(self._at(name)))
        return path

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        """Where a remote folder's sidecars are without a cache, for as long as this object lives."""
        return tempfile.TemporaryDirectory(prefix="ebt-megatron-")

    def expect(self, numbers: list[int]) -> None:
        """Read these remote shards in the background, the first ones first, and let go of all others."""
        for number in set(self._open) - set(numbers):
            del self._open[number]
        for number in set(self._ahead) - set(numbers):
            self._ahead.pop(number).cancel()
        for number in numbers:
            if self.cache is not None:
                self.cache.want(self._at(self.manifest.shards[number].name))
            if number not in self._open and number not in self._ahead:
                self._ahead[number] = in_background(partial(self._load, number), self._slots)

    def _load(self, number: int) -> _OpenShard:
        shard = self.manifest.shards[number]
        if self.remote and self.cache is None:
            return self._stream(shard)
        index = self._file(shard.index_name, None, shard.index_sha256)
        if sha256_of(index) != shard.index_sha256:
            raise DataError(f"index {index} does not match its checksum in manifest.json: copy it again")
        members = [Member(*m) for m in json.loads(index.read_text())["members"]]
        path = self._file(shard.name, shard.bytes, shard.sha256)
        try:
            content = np.memmap(path, mode="r", dtype=np.uint8)
        except FileNotFoundError:  # another process made room in the cache just now
            content = np.memmap(self._file(shard.name, shard.bytes, shard.sha256), mode="r", dtype=np.uint8)
        return _OpenShard(path, members, lambda m: content[m.offset : m.offset + m.bytes], self.manifest)

    def _stream(self, shard: ShardInfo) -> _OpenShard:
        url = self._at(shard.name)
        try:
            content = dict(stream_tar(url, shard.bytes, shard.sha256))
        except RemoteError as error:
            raise DataError(str(error)) from None
        blocks = {name: np.frombuffer(data, np.uint8) for name, data in content.items()}
        left = dict.fromkeys(_MEMBERS, shard.samples)
        members = []
        for name, block in blocks.items():
            what = member_kind(name)
            members.append(Member(name, 0, len(block), min(left[what], self._rows)))
            left[what] -= members[-1].samples
        return _OpenShard(url, members, lambda m: blocks[m.name], self.manifest)

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        coming = self._ahead.pop(number, None)
        self._open[number] = coming.result() if coming else self._load(number)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def _take(self, what: str, indices: np.ndarray, out: np.ndarray) -> None:
        numbers = np.searchsorted(self.first, indices, side="right") - 1
        members, rows = np.divmod(indices - self.first[numbers], self._rows)
        for i, (number, member, row) in enumerate(zip(numbers.tolist(), members.tolist(), rows.tolist(), strict=True)):
            out[i] = self._shard(number).block(what, member)[row]

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copy samples `indices` [N] to out [N, *manifest.shape], of any dtype that holds them."""
        self._take("samples", indices, out)
        if not self._all_checked:
            self._check_values(out, "samples")

    def gather_labels(self, indices: np.ndarray) -> np.ndarray:
        """The labels int64 [N] of samples `indices`, of pictures that have classes."""
        out = np.empty(len(indices), np.int64)
        self._take(LABELS, indices, out)
        self._check_values(out, LABELS)
        return out

    def gather_captions(self, indices: np.ndarray) -> np.ndarray:
        """The captions [N, *shape] of samples `indices`, int64 tokens or float32 vectors, of pictures that have any."""
        captions = self.manifest.captions
        out = np.empty((len(indices), *captions["shape"]), np.int64 if captions.get("entries") else np.float32)
        self._take(CAPTIONS, indices, out)
        self._check_values(out, CAPTIONS)
        return out

    def row(self, index: int) -> np.ndarray:
        """Sample `index`, 0 <= index < len(self): an array of manifest.shape, not copied."""
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        member, row = divmod(index - int(self.first[number]), self._rows)
        return self._shard(number).block("samples", member)[row]

    def label(self, index: int) -> int:
        """The label of sample `index`."""
        return int(self.gather_labels(np.array([index]))[0])

    def rows(self) -> Iterable[np.ndarray]:
        """Every sample, in order."""
        return (self.row(i) for i in range(len(self)))
