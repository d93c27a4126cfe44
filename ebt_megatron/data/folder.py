"""Reading prepared folders: any sample of a local one, a group of shards at a time of a remote one."""

from __future__ import annotations

import io
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
from ebt_megatron.core.files import sha256_of
from ebt_megatron.data.agreement import layout_problems, manifest_problems, members_of
from ebt_megatron.data.description import Description
from ebt_megatron.data.kinds import Part, kind_of, part_name
from ebt_megatron.data.manifest import ShardInfo
from ebt_megatron.data.remote import Cache, RemoteError, content_of, in_background, is_remote, stream_tar
from ebt_megatron.data.shards import Member

VERIFY_BYTES = 512 << 20  # folders up to this size have their checksums verified when training starts
SAMPLES_CHECKED = 20_000  # of a larger folder, whose values are looked at when it is opened
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

    def __init__(self, path: str | Path, members: list[Member], bytes_of: Any, shapes: dict[str, list[int]]):
        """`bytes_of` gives a member's bytes (uint8); `shapes`, that of a sample in each array, by the array's name."""
        self.path, self.bytes_of, self.shapes = path, bytes_of, shapes
        self.members: dict[str, list[Member]] = {name: [] for name in shapes}
        for member in members:
            if (name := part_name(member.name)) not in shapes:
                raise DataError(f"member {member.name} of {path} is not what the manifest speaks of: prepare it again")
            self.members[name].append(member)
        self.arrays: dict[str, list[np.ndarray | None]] = {k: [None] * len(v) for k, v in self.members.items()}

    def block(self, name: str, index: int) -> np.ndarray:
        """Member `index` of an array, by the array's name."""
        array = self.arrays[name][index]
        if array is None:  # a member becomes an array when it is first asked for
            array = self.arrays[name][index] = self._read(self.members[name][index], self.shapes[name])
        return array

    def _read(self, member: Member, shape: list[int]) -> np.ndarray:
        try:
            array = _npy(self.bytes_of(member))
        except ValueError as error:
            raise DataError(
                f"member {member.name} of {self.path} is not an array ({error}); run ebt-shards verify"
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
        DataError: no manifest, a kind of sample there is not, a shard missing or of the wrong size, a wrong checksum,
            values that the kind rules out, such as tokens outside the vocabulary (folders of up to VERIFY_BYTES are
            read whole; larger ones as they are used, or by `ebt-shards verify`).
    """

    def __init__(self, folder: str, cache: Cache | None = None, readers: int = 4):
        super().__init__(folder)
        self.remote, self.cache = is_remote(folder), cache
        self.sizes = [s.samples for s in self.manifest.shards]
        self.first = np.cumsum([0, *self.sizes])
        if not self.manifest.shards or not self.first[-1]:
            raise DataError(f"no shards at {folder}: the manifest lists none; prepare the data again")
        if problems := manifest_problems(self.manifest):
            raise DataError(f"{folder}/manifest.json contradicts itself: {problems[0]}; prepare the data again")
        self.kind = kind_of(self.manifest.kind)
        self.parts = self.kind.parts(self.manifest)
        self._shapes = {name: list(part.shape(self.manifest) or []) for name, part in self.parts.items()}
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
        if all(part.bounds(self.manifest) is None for part in self.parts.values()):
            for number in range(len(self.sizes) if verify else 0):
                self._shard(number)
            return  # any value does
        if not verify:
            self._check_some()
            return
        for number in range(len(self.sizes)):
            opened = self._shard(number)
            for part in self.parts.values():
                for member in range(len(opened.members[part.name])):
                    self._check_values(opened.block(part.name, member), part)
        self._all_checked = True

    def _check_some(self) -> None:
        """Look at samples spread over every shard of a large folder; `gather` looks at all as they are read."""
        stride = max(1, len(self) // SAMPLES_CHECKED)
        for first, size in zip(self.first.tolist(), self.sizes, strict=False):
            indices = np.arange(first, first + size, min(stride, max(1, size)))
            for begin in range(0, len(indices), 1024):
                some = indices[begin : begin + 1024]
                self.gather(some, np.empty((len(some), *self.manifest.shape), self.manifest.dtype))

    def _check_values(self, block: np.ndarray, part: Part) -> None:
        if problem := part.problem(block, self.manifest):
            raise DataError(f"{self.folder} holds {problem} (ebt-shards verify says where): prepare it again")

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
        """The folder of a remote folder's sidecars where there is no cache, for as long as this object lives."""
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
        members = members_of(index.read_text(), shard, self.manifest)
        path = self._file(shard.name, shard.bytes, shard.sha256)
        try:
            content = np.memmap(path, mode="r", dtype=np.uint8)
        except FileNotFoundError:  # another process made room in the cache just now
            content = np.memmap(self._file(shard.name, shard.bytes, shard.sha256), mode="r", dtype=np.uint8)
        for member in members:  # the header before each says whose the bytes are
            header = content[member.offset - 512 : member.offset].tobytes()
            if header[:100].rstrip(b"\0") != member.name.encode() or not header[124:135].strip(b"\0 ").isdigit():
                raise DataError(f"{path} has no member {member.name} where its index says: prepare the data again")
            if int(header[124:135], 8) != member.bytes:
                raise DataError(f"member {member.name} of {path} is not as long as its index says: prepare it again")
        return _OpenShard(path, members, lambda m: content[m.offset : m.offset + m.bytes], self._shapes)

    def _stream(self, shard: ShardInfo) -> _OpenShard:
        url = self._at(shard.name)
        try:
            content = stream_tar(url, shard.bytes, shard.sha256)
        except RemoteError as error:
            raise DataError(str(error)) from None
        blocks = {name: np.frombuffer(data, np.uint8) for name, data in content}
        left: dict[str, int] = {}
        members = []
        for name, data in content:
            of = part_name(name)
            members.append(Member(name, 0, len(data), min(left.setdefault(of, shard.samples), self.kind.rows)))
            left[of] -= members[-1].samples
        if problems := list(layout_problems(members, shard, self.manifest)):
            raise DataError(f"{url} does not fit the manifest: {problems[0]}; prepare the data again")
        return _OpenShard(url, members, lambda m: blocks[m.name], self._shapes)

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        coming = self._ahead.pop(number, None)
        self._open[number] = coming.result() if coming else self._load(number)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def _take(self, part: Part, indices: np.ndarray, out: np.ndarray) -> None:
        numbers = np.searchsorted(self.first, indices, side="right") - 1
        members, rows = np.divmod(indices - self.first[numbers], self.kind.rows)
        for i, (number, member, row) in enumerate(zip(numbers.tolist(), members.tolist(), rows.tolist(), strict=True)):
            out[i] = self._shard(number).block(part.name, member)[row]

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copy samples `indices` [N] to out [N, *manifest.shape], of any dtype that holds them."""
        self._take(self.kind.samples, indices, out)
        if not self._all_checked:
            self._check_values(out, self.kind.samples)

    def gather_beside(self, name: str, indices: np.ndarray) -> np.ndarray:
        """What samples `indices` have beside them, by name ("labels"): [N, ...] of the dtype that the kind says."""
        part = self.parts[name]
        out = np.empty((len(indices), *self._shapes[name]), part.dtype(self.manifest))
        self._take(part, indices, out)
        self._check_values(out, part)
        return out

    @property
    def beside(self) -> list[str]:
        """The names of what samples have beside them."""
        return list(self.parts)[1:]

    def row(self, index: int) -> np.ndarray:
        """Sample `index`, 0 <= index < len(self): an array of manifest.shape, not copied."""
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        member, row = divmod(index - int(self.first[number]), self.kind.rows)
        return self._shard(number).block(self.kind.array, member)[row]

    def rows(self) -> Iterable[np.ndarray]:
        """Every sample, in order."""
        return (self.row(i) for i in range(len(self)))
