"""What is kept of an input holds no secret; a full disk, and one without shared memory, are named."""

import errno
import json
import multiprocessing.synchronize
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ebt_megatron.core.files import replacing, write_whole
from ebt_megatron.data_prep import passes
from ebt_megatron.data_prep.files import recorded_names, without_secrets
from tests.data_prep.media import contents, said
from tests.data_prep.test_trouble import corpus, prepare


def signed(secret):
    """The corpus behind URLs that are signed."""
    return [f"memory://signed/{i}.jsonl?X-Amz-Signature={secret}" for i in range(3)]


def test_the_signature_of_a_url_is_neither_kept_nor_compared(tmp_path):
    memory = fsspec.filesystem("memory")
    raw = corpus(tmp_path / "raw", files=3)
    for secret in ("hushhush", "fresh"):
        for i, url in enumerate(signed(secret)):
            memory.pipe(url.removeprefix("memory:/"), (raw / f"{i}.jsonl").read_bytes())
    first, *rest = signed("hushhush")
    more = [part for url in rest for part in ("--input", url)]
    assert prepare(first, tmp_path / "out", *more).exit_code == 0
    kept = contents(tmp_path / "out")
    assert not [name for name, data in kept.items() if b"hushhush" in data]
    assert '/signed/0.jsonl"' in json.dumps(json.loads(kept["job.json"])["input"])
    first, *rest = signed("fresh")
    more = [part for url in rest for part in ("--input", url)]
    result = prepare(first, tmp_path / "out", *more, "--resume")
    assert result.exit_code == 0, result.output
    memory.pipe("/signed/bad.jsonl?sig=hushhush", b"{broken\n")
    result = prepare("memory://signed/bad.jsonl?sig=hushhush", tmp_path / "bad")
    assert result.exit_code == 2 and "bad.jsonl line 1" in said(result) and "hushhush" not in result.output


def test_urls_that_only_their_queries_tell_apart_stay_apart():
    urls = ["https://a:pass@host/get?id=1", "https://a:pass@host/get?id=2", "/local/get?id=1"]
    assert list(recorded_names(urls).values()) == ["https://host/get", "https://host/get#2", "/local/get?id=1"]
    assert len({u.key for u in passes.units_of([[(url, 5)] for url in urls])}) == 3
    assert without_secrets("read https://h/a?sig=1 and s3://b/c: why?") == "read https://h/a and s3://b/c: why?"


@pytest.fixture
def full_disk(monkeypatch):
    """Files take 100 bytes; whoever writes more learns no name, as from the system."""

    class Full:
        def __init__(self, stream):
            self.stream, self.left = stream, 100

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: Full(opened(self, mode)))


def test_a_full_disk_is_named_with_the_file(tmp_path, full_disk):
    with pytest.raises(OSError) as raised:
        passes.save(tmp_path / "a.npy", np.zeros(1000))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "a.npy"))
    assert not list(tmp_path.iterdir())


def test_a_preparation_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self, unit):
        with replacing(self.file(unit)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    raw = corpus(tmp_path / "raw")
    monkeypatch.setattr("ebt_megatron.data_prep.text_passes.Documents.hash", full)
    result = prepare(raw, tmp_path / "out")
    assert result.exit_code == 2 and "(the disk is full)" in said(result) and "documents-" in said(result)


def test_whole_files_say_which_one_the_disk_had_no_room_for(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as raised:
        write_whole(tmp_path / "manifest.json", "{}")
    assert raised.value.filename == str(tmp_path / "manifest.json")


def test_shared_memory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def readonly(*given):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", readonly)
    result = prepare(corpus(tmp_path / "raw"), tmp_path / "out", "--workers", 2)
    assert result.exit_code == 2 and "/dev/shm cannot be written" in said(result) and "--workers 1" in said(result)


def test_an_output_whose_name_is_no_utf8(tmp_path):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    result = prepare(corpus(tmp_path / "raw"), output)
    assert result.exit_code == 0 and os.path.exists(output + "/train/manifest.json")
