"""A manifest, its indexes and tars say the same, or the loader and `ebt-shards verify` say in one line what differs."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of
from ebt_megatron.data import manifest as manifests
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.tools.shards import app
from tests.builders import text_shards


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    documents = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(30)) for i in range(60)]
    return text_shards(tmp_path_factory.mktemp("data"), documents, 16, 90, validation_fraction=0.2) / "train"


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "train")


def edit(folder, change):
    """Change the manifest, and make its checksum right again."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["checksum"]
    change(raw)
    path.write_text(json.dumps({**raw, "checksum": manifests._checksum(raw)}))


def edit_index(folder, change, tar=False):
    """Change the first index; the manifest has its checksum, and that of the tar."""
    path = folder / "shard-000000.index.json"
    index = json.loads(path.read_text())
    change(index)
    if tar:
        size, digest = (folder / "shard-000000.tar").stat().st_size, sha256_of(folder / "shard-000000.tar")
        index |= {"bytes": size, "sha256": digest}
    path.write_text(json.dumps(index))

    def follow(raw):
        raw["shards"][0]["index_sha256"] = sha256_of(path)
        if tar:
            raw["shards"][0] |= {"bytes": size, "sha256": digest}

    edit(folder, follow)


def rewritten(folder, change):
    """The first tar with other members, at the places that its index has."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        entries = [(entry, tar.extractfile(entry).read()) for entry in tar]
    entries = change(entries)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, data in entries:
            tar.addfile(entry, io.BytesIO(data))


def more(raw, key, by):
    raw[key] += by


def total(raw, by):
    raw["samples"] += by
    raw["shards"][0]["samples"] += by


def recount(raw):
    raw["samples"] = sum(shard["samples"] for shard in raw["shards"])


def set_member(index, number, **values):
    names = ("name", "offset", "bytes", "samples")
    index["members"][number] = [values.get(n, v) for n, v in zip(names, index["members"][number], strict=True)]


MANIFESTS = {
    "five more": lambda raw: more(raw, "samples", 5),
    "five fewer": lambda raw: more(raw, "samples", -5),
    "five more, of a shard too": lambda raw: total(raw, 5),
    "five fewer, of a shard too": lambda raw: total(raw, -5),
    "none at all": lambda raw: total(raw, -raw["shards"][0]["samples"]),
    "a shard twice": lambda raw: (raw["shards"].append(raw["shards"][0]), recount(raw)),
    "an unknown key": lambda raw: raw.update(colour="red"),
    "a missing key": lambda raw: raw.pop("dtype"),
    "an unknown key of a shard": lambda raw: raw["shards"][0].update(colour="red"),
    "a missing key of a shard": lambda raw: raw["shards"][0].pop("bytes"),
    "a count that is a text": lambda raw: raw.update(samples="many"),
    "no list of shards": lambda raw: raw.update(shards="none"),
}  # fmt: skip
INDEXES = {
    "a member twice": lambda index: index["members"].insert(1, index["members"][0]),
    "a member less": lambda index: index["members"].pop(),
    "the order": lambda index: index["members"].reverse(),
    "an offset": lambda index: set_member(index, 1, offset=index["members"][1][1] + 512),
    "two offsets swapped": lambda index: (
        set_member(index, 0, offset=index["members"][1][1], name=index["members"][0][0]),
        set_member(index, 1, offset=512),
    ),
    "the samples of a member": lambda index: set_member(index, 0, samples=60),
    "its samples": lambda index: more(index, "samples", 5),
    "its bytes": lambda index: more(index, "bytes", 512),
    "no members": lambda index: index.pop("members"),
    "an unknown key": lambda index: index.update(colour="red"),
}


def refused(folder):
    with pytest.raises(DataError) as raised:
        ShardFolder(str(folder))
    assert "\n" not in str(raised.value)
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code in (1, 2) and "all good" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_counts_wrong_is_refused(folder, what):
    edit(folder, MANIFESTS[what])
    refused(folder)


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_that_differs_from_its_manifest_or_tar_is_refused(folder, what):
    edit_index(folder, INDEXES[what])
    refused(folder)


@pytest.mark.parametrize("what", ["swapped", "twice"])
def test_a_tar_of_members_in_other_places_is_refused(folder, what):
    rewritten(folder, lambda e: [e[1], e[0], *e[2:]] if what == "swapped" else [e[0], e[0], *e[2:]])
    edit_index(folder, lambda index: None, tar=True)
    refused(folder)


def test_good_data_is_as_it_was(good, folder):
    edit(folder, lambda raw: None)
    edit_index(folder, lambda index: None, tar=True)
    ours, theirs = ShardFolder(str(folder)), ShardFolder(str(good))
    assert (np.stack(list(ours.rows())) == np.stack(list(theirs.rows()))).all()
