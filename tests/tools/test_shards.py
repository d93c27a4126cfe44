"""Shard tools: good data passes, and whatever is wrong is named; the loader never serves damaged data."""

import json
import random
import shutil
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import Manifest, read_manifest
from ebt_megatron.data.shards import made_in, shard_infos, write_shard
from ebt_megatron.tools.shards import app
from tests.builders import text_shards

DOCUMENTS = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(30)) for i in range(60)]
run = CliRunner().invoke


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS, 16, 90, validation_fraction=0.2) / "train"


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "train")


@pytest.mark.parametrize("command", ["inspect", "verify", "stats", "sample"])
def test_good_data(good, command):
    result = run(app, [command, str(good)])
    assert result.exit_code == 0, result.output


def test_a_sample_is_its_text(good):
    assert " word" in run(app, ["sample", str(good), "--index", "3"]).output


def test_an_index_out_of_range_is_one_line(good):
    result = run(app, ["sample", str(good), "--index", "99999"])
    assert result.exit_code == 2


def test_verify_names_shard_and_member(folder):
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"000001-000001.tokens.npy", b"000001-000009.tokens.npy"))
    result = run(app, ["verify", str(folder)])
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "shard-000001.tar: checksum differs" in said
    assert "member 000001-000001.tokens.npy is missing" in said


def test_verify_finds_a_truncated_and_a_missing_shard(folder):
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    (folder / "shard-000001.tar").unlink()
    said = " ".join(run(app, ["verify", str(folder)]).output.split())
    assert "shard-000000.tar: 2000 bytes" in said and "shard-000001.tar: missing" in said


def test_verify_finds_a_member_that_is_there_twice(folder):
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.add(folder / "tokenizer.json", tar.getnames()[0])
    said = " ".join(run(app, ["verify", str(folder)]).output.split())
    assert "shard-000000.tar: member 000000-000000.tokens.npy is there twice" in said


def test_verify_finds_counts_that_do_not_add_up(folder):
    manifest = read_manifest(str(folder))
    manifest.samples += 5
    manifest.write(folder)
    result = run(app, ["verify", str(folder)])
    assert result.exit_code == 1 and "manifest.json: " in result.output and "samples, its shards have" in result.output


def test_verify_finds_a_missing_and_a_damaged_index(folder):
    (folder / "shard-000000.index.json").unlink()
    path = folder / "shard-000001.index.json"
    path.write_text(path.read_text().replace("tokens", "takens"))
    said = " ".join(run(app, ["verify", str(folder)]).output.split())
    assert "shard-000000.index.json: missing" in said and "shard-000001.index.json: checksum differs" in said


def rewritten(folder, kind, change, **manifest):
    """Shards whose values were changed before they were written, with checksums that fit."""
    data = ShardFolder(str(folder))
    samples = np.stack(list(data.rows()))
    labels = np.zeros(len(samples), np.int64) if manifest.get("classes") else None
    change(samples, labels)
    old = read_manifest(str(folder))
    for path in made_in(folder):
        path.unlink()
    write_shard(folder, 0, kind, samples, labels=labels)
    made = {**vars(old), "kind": kind, "shards": shard_infos(folder, 1), **manifest}
    Manifest(**made).write(folder)


def set_token(samples, _):
    samples[3, 5] = 60_000


def set_label(_, labels):
    labels[70] = 2


def set_infinite(samples, _):
    samples[70, 0] = np.inf


@pytest.mark.parametrize("change", [set_token, set_label, set_infinite])
def test_values_that_mean_nothing_are_found(folder, change, tmp_path):
    """Checksums fit, as they do after a preparation that did not look."""
    if change is set_token:
        rewritten(folder, "text", change)
        said = "member 000000-000000.tokens.npy holds token 60000, outside the 400 entries"
    elif change is set_label:
        rewritten(folder, "images", change, classes=["a", "b"])
        said = "member 000000-000001.labels.npy holds label 2, outside the 2 classes"
    else:
        data = ShardFolder(str(folder)).manifest
        samples = np.zeros((100, 4), np.float16)
        change(samples, None)
        [path.unlink() for path in made_in(folder)]
        write_shard(folder, 0, "images", samples)
        encoder = {**data.tokenizer, "kind": "pixels"}
        Manifest("images", [4], "float16", 100, shard_infos(folder, 1), {}, encoder=encoder).write(folder)
        said = "member 000000-000001.latents.npy has values that are not finite"
    result = run(app, ["verify", str(folder)])
    assert result.exit_code == 1 and said in " ".join(result.output.split())
    if change is not set_infinite:
        with pytest.raises(DataError, match="outside the"):  # small: when it is opened, so also by a dry run
            ShardFolder(str(folder))


def test_tokens_of_a_large_folder_are_looked_at_as_they_are_read(folder, monkeypatch):
    rewritten(folder, "text", set_token)
    monkeypatch.setattr("ebt_megatron.data.folder.VERIFY_BYTES", 0)
    monkeypatch.setattr("ebt_megatron.data.folder.SAMPLES_CHECKED", 1)
    data = ShardFolder(str(folder))
    out = np.empty((1, *data.manifest.shape), np.int64)
    data.gather(np.array([2]), out)
    with pytest.raises(DataError, match="holds token 60000, outside the 400 entries"):
        data.gather(np.array([3]), out)
    result = run(app, ["stats", str(folder)])
    assert result.exit_code == 2 and "token 60000" in result.output


def test_verify_finds_a_manifest_that_counts_too_few_entries(folder):
    manifest = read_manifest(str(folder))
    manifest.tokenizer["vocab_size"] = 399
    manifest.write(folder)
    assert "has ids up to 399, the manifest a vocabulary of 399" in run(app, ["verify", str(folder)]).output


@pytest.mark.parametrize("command", ["inspect", "verify", "stats", "sample"])
def test_a_missing_folder_with_brackets_is_one_line(tmp_path, command):
    (tmp_path / "file").write_text("")
    for name in ("[/none] here", "file"):
        result = run(app, [command, str(tmp_path / name)])
        assert result.exit_code == 2 and f"no shards at {tmp_path / name}" in result.output
        assert result.output.count("\n") == 1 and "Traceback" not in result.output


def corrupt(folder, generator):
    """One random damage to one random file of a prepared folder."""
    path = generator.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = generator.choice(["truncate", "flip", "swap", "insert", "empty", "type"])
    at = generator.randrange(len(data))
    if kind == "truncate":
        data = data[:at]
    elif kind == "flip":
        data[at] ^= 1 << generator.randrange(8)
    elif kind == "swap":
        other = generator.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    elif kind == "insert":
        data[at:at] = generator.randbytes(3)
    elif kind == "empty":
        data = bytearray()
    elif path.name == "manifest.json":
        manifest = json.loads(data)
        key = generator.choice(sorted(manifest))
        manifest[key] = generator.choice([None, "x", [], -1, {"a": 1}])
        data = bytearray(json.dumps(manifest).encode())
    path.write_bytes(bytes(data))
    return path, data


def test_damaged_folders_give_a_clear_error_or_the_right_data(good, tmp_path):
    """A thousand random damages: never another exception, never a silently wrong row."""
    reference = ShardFolder(str(good))
    rows = [np.array(reference.row(i)) for i in range(len(reference))]
    originals = {path.name: path.read_bytes() for path in good.iterdir()}
    folder = shutil.copytree(good, tmp_path / "train")
    generator = random.Random(0)
    refused = 0
    for case in range(1000):
        path, _ = corrupt(folder, generator)
        try:
            damaged = ShardFolder(str(folder))
            for i in range(min(len(damaged), len(rows))):
                assert (damaged.row(i) == rows[i]).all(), f"case {case}: wrong data from {path.name}"
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
        path.write_bytes(originals[path.name])
    assert refused > 300
