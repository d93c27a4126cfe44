"""Remote shards: streamed or cached, the same samples as from disk, in bounded room; errors tried again, then named."""

import errno
import http.server
import io
import itertools
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data import remote
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.loader import Loader
from ebt_megatron.data.remote import Cache
from tests.builders import text_shards
from tests.data.test_loader import DOCUMENTS, recipe_for


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Many small shards."""
    return text_shards(tmp_path_factory.mktemp("remote"), DOCUMENTS, 16, 40)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)


@pytest.fixture
def memory(shards):
    """The same folders in fsspec's memory file system, at memory://bucket."""
    system = fsspec.filesystem("memory")
    for path in shards.rglob("*.*"):
        if path.is_file():
            system.pipe(f"/bucket/{path.relative_to(shards)}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def batches(recipe, rank=0, size=1, start=0, count=60):
    loader = Loader(recipe, "train", rank, size)
    loader.consumed = start
    stream = iter(loader)
    taken = [(b.sample_ids.tolist(), b.samples.tolist()) for b in itertools.islice(stream, count)]
    stream.close()
    return taken


STREAMED = ("data.shuffle_shards=2",)


def test_streamed_shards_give_the_samples_and_order_of_local_ones(shards, memory):
    epoch = len(ShardFolder(f"{shards}/train")) // 2  # micro-batches of two
    local = batches(recipe_for(shards, *STREAMED), count=2 * epoch)
    assert batches(recipe_for("memory://bucket", *STREAMED), count=2 * epoch) == local


def test_a_stream_is_taken_up_anywhere_on_any_number_of_ranks(shards, memory):
    whole = batches(recipe_for(shards, *STREAMED), start=64, count=40)
    ranks = [batches(recipe_for("memory://bucket", *STREAMED), r, 4, start=64, count=10) for r in range(4)]
    assert [rank[m] for m in range(10) for rank in ranks] == whole


def test_only_the_shards_of_two_groups_are_held(memory, monkeypatch):
    loader = Loader(recipe_for("memory://bucket", *STREAMED), "train", 0, 1)
    (source,) = loader.sources
    held, read = [], []
    load = source._load
    monkeypatch.setattr(source, "_load", lambda number: read.append(number) or load(number))
    for begin in range(0, len(source), 4):
        loader.read(list(range(begin, min(begin + 4, len(source)))))
        held.append(len(source._open) + len(source._ahead))
    assert max(held) <= 2 * 2 + 2  # a chunk may lie across two groups
    assert len(source.sizes) <= len(read) <= len(source.sizes) + 4, "a shard is read once an epoch"


def test_shards_are_read_ahead(memory):
    loader = Loader(recipe_for("memory://bucket", *STREAMED), "train", 0, 1)
    (source,) = loader.sources
    loader.read([0])
    coming = loader.blend.shards(np.array([0]))[0]
    assert set(source._open) | set(source._ahead) == set(coming) and len(coming) == 4


def test_the_cache_is_verified_shared_and_bounded(shards, memory, tmp_path):
    size = max(s.bytes for s in ShardFolder(f"{shards}/train").manifest.shards)
    limit = 5 * size / 1e9
    overrides = (*STREAMED, f"data.cache_dir={tmp_path}", f"data.cache_gb={limit}")
    recipe = recipe_for("memory://bucket", *overrides)
    epoch = len(ShardFolder(f"{shards}/train")) // 2
    assert batches(recipe, count=epoch) == batches(recipe_for(shards, *STREAMED), count=epoch)
    kept = list(tmp_path.rglob("*.tar"))
    assert 0 < sum(p.stat().st_size for p in kept) <= 5 * size
    assert not list(tmp_path.rglob("*.partial"))


def test_room_is_made_among_what_the_cache_brought_only(memory, tmp_path):
    own = tmp_path / "mine/shard-000000.tar"  # data.cache_dir may be the folder that prepared data is in
    own.parent.mkdir()
    own.write_bytes(b"x" * 999)
    list(ShardFolder("memory://bucket/train", Cache(tmp_path, 1)).rows())
    assert own.exists() and len(list(tmp_path.glob("*/*.tar"))) == 2


def test_a_full_disk_under_the_cache_is_named_at_once(memory, tmp_path, monkeypatch):
    opened = []

    class Full(io.RawIOBase):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, mode: opened.append(p) or Full() if "w" in mode else real(p, mode))
    with pytest.raises(OSError) as raised:
        Cache(tmp_path).fetch("memory://bucket/train/shard-000000.tar", None, "")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename.endswith("shard-000000.tar")
    assert len(opened) == 1 and not list(tmp_path.rglob("*.partial"))


def test_without_a_limit_the_cache_keeps_every_shard_and_reads_it_once(shards, memory, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(remote, "open_url", lambda url, real=remote.open_url: opened.append(url) or real(url))
    folder = ShardFolder("memory://bucket/train", Cache(tmp_path))
    assert [r.tolist() for r in folder.rows()] == [r.tolist() for r in ShardFolder(f"{shards}/train").rows()]
    list(ShardFolder("memory://bucket/train", Cache(tmp_path)).rows())
    kept = [url for url in opened if not url.endswith("manifest.json")]
    assert len(kept) == len(set(kept)) == 2 * len(folder.sizes)  # tars and indexes


@pytest.mark.parametrize("cached", [False, True])
def test_a_connection_that_breaks_is_opened_again(shards, memory, tmp_path, monkeypatch, cached):
    opened = itertools.count()

    class Breaks:
        def __init__(self, file):
            self.file, self.left, self.closed = file, 3 if next(opened) % 2 == 0 else 1 << 30, False

        def __enter__(self):
            self.stream = self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def read(self, size=-1):
            self.left -= 1
            if not self.left:
                raise TimeoutError("the network is down")
            return self.stream.read(min(size, 4096) if size >= 0 else -1)

    monkeypatch.setattr(remote, "open_url", lambda url, real=remote.open_url: Breaks(real(url)))
    folder = ShardFolder("memory://bucket/train", Cache(tmp_path) if cached else None)
    assert (folder.row(100) == ShardFolder(f"{shards}/train").row(100)).all()
    assert next(opened) >= 2


@pytest.mark.parametrize("cached", [False, True])
def test_a_sidecar_stays_where_it_is(memory, cached, tmp_path):
    folder = ShardFolder("memory://bucket/train", Cache(tmp_path / "cache") if cached else None)
    first = folder.sidecar()
    folder.copy_to(tmp_path / "kept")
    assert folder.sidecar() == first and first.read_bytes() == (tmp_path / "kept" / first.name).read_bytes()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-700], "shard-000000.tar cannot be read.*it is truncated"),
        (lambda data: b"short", "shard-000000.tar cannot be read.*it is truncated"),
        (
            lambda data: data[:900] + b"x" + data[901:],
            "shard-000000.tar cannot be read.*it does not match its checksum",
        ),
        (lambda data: data + b"more", "shard-000000.tar cannot be read.*it is too long"),
        (lambda data: b"\xff" * len(data), "shard-000000.tar cannot be read.*it does not match its checksum"),
        (None, "shard-000000.tar is missing"),
    ],
)
def test_damaged_remote_shards_are_refused(memory, tmp_path, cached, damage, message):
    path = "/bucket/train/shard-000000.tar"
    memory.pipe(path, damage(memory.cat(path))) if damage else memory.rm(path)
    folder = ShardFolder("memory://bucket/train", Cache(tmp_path) if cached else None)
    with pytest.raises(DataError, match=message) as error:
        folder.row(0)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("shard-000000.tar*al"))


def test_a_damaged_shard_read_ahead_reaches_the_loop(memory):
    for path in memory.glob("/bucket/train/*.tar"):
        memory.pipe(path, memory.cat(path)[:-1])
    with pytest.raises(DataError, match="it is truncated"):
        batches(recipe_for("memory://bucket", *STREAMED))


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens http with curl")
def test_schemes_that_fsspec_cannot_open_are_webdatasets(shards, monkeypatch):
    """As http without aiohttp."""

    def no_package(*_):
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr(remote.fsspec, "open", no_package)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert batches(recipe_for(url, *STREAMED)) == batches(recipe_for(shards, *STREAMED))
        with pytest.raises(DataError, match=r"no shards at .*/nowhere"):
            ShardFolder(f"{url}/nowhere")
        server.shutdown()


def refuse(error, match, *overrides):
    with pytest.raises(error, match=match):
        Loader(recipe_for("memory://bucket", *overrides), "train", 0, 1)


def test_remote_data_needs_room_of_known_size(memory, tmp_path):
    refuse(DataError, "set data.shuffle_shards, to stream it .* or data.cache_dir")
    cache = f"data.cache_dir={tmp_path}"
    refuse(
        DataError,
        "less than the .* GB of all shards: raise it, or set data.shuffle_shards",
        cache,
        "data.cache_gb=1e-6",
    )
    refuse(DataError, "two groups of data.shuffle_shards=2", cache, "data.cache_gb=1e-6", *STREAMED)
    refuse(RecipeError, "data.cache_gb=1 bounds data.cache_dir=None", "data.cache_gb=1", *STREAMED)
    refuse(RecipeError, "data.shuffle_shards=-1", "data.shuffle_shards=-1")


def test_a_scheme_nobody_knows(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 1e9)  # trying again would not help
    with pytest.raises(DataError, match=r"no shards at xyz://bucket.*Protocol not known: xyz"):
        ShardFolder("xyz://bucket")
