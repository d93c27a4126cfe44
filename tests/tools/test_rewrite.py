"""Resharded and merged folders hold the samples of those they were made from, in order."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.shards import OutputLock, shard_infos, write_shard
from ebt_megatron.data_prep.encoders import PixelEncoder
from ebt_megatron.tools.rewrite import rewrite
from ebt_megatron.tools.shards import app
from tests.builders import text_shards

DOCUMENTS = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(30)) for i in range(60)]
run = CliRunner().invoke


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS, 16, 90, validation_fraction=0.2)


def pictures(folder, seed, count=10, classes=("cat", "dog")):
    """Shards of random pictures of 8 x 8 with labels, without a preparation."""
    generator = np.random.default_rng(seed)
    encoder = PixelEncoder(8, 8, 4)
    encoder.normalise_by(np.zeros(48), np.ones(48))
    latents = encoder.encode(generator.integers(0, 256, (count, 8, 8, 3), np.uint8))
    write_shard(folder, 0, "images", encoder.to_samples(latents), labels=generator.integers(0, 2, count))
    encoder.save(folder / "encoder.npz")
    Manifest(
        kind="images",
        shape=[4, 48],
        dtype="float16",
        samples=count,
        shards=shard_infos(folder, 1),
        provenance={},
        encoder={"file": "encoder.npz", "sha256": sha256_of(folder / "encoder.npz"), **encoder.describe()},
        classes=list(classes),
    ).write(folder)
    return folder


def samples(*folders):
    return [row for folder in folders for row in ShardFolder(str(folder)).rows()]


def bytes_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", [1, 64, 100_000])
def test_resharding_keeps_every_sample_and_its_place(text, size, tmp_path):
    result = run(app, ["reshard", str(text / "train"), "--output", str(tmp_path), "--samples-per-shard", str(size)])
    assert result.exit_code == 0, result.output
    assert np.array_equal(samples(tmp_path), samples(text / "train"))
    assert run(app, ["verify", str(tmp_path)]).exit_code == 0
    manifest = ShardFolder(str(tmp_path)).manifest
    assert all(s.samples == size for s in manifest.shards[:-1])
    assert manifest.provenance["tokens"] == ShardFolder(str(text / "train")).manifest.provenance["tokens"]


def test_merging_adds_up(text, tmp_path):
    folders = [text / "train", text / "validation"]
    assert run(app, ["merge", *map(str, folders), "--output", str(tmp_path / "out")]).exit_code == 0
    assert np.array_equal(samples(tmp_path / "out"), samples(*folders))
    merged, parts = ShardFolder(str(tmp_path / "out")).manifest, [ShardFolder(str(f)).manifest for f in folders]
    assert merged.provenance["documents"] == 60 == sum(p.provenance["documents"] for p in parts)
    low, high = sorted(p.tokenizer["bytes_per_token"] for p in parts)
    assert low <= merged.tokenizer["bytes_per_token"] <= high


def test_labels_stay_with_their_pictures(tmp_path):
    folders = [pictures(tmp_path / "a", 1), pictures(tmp_path / "b", 2)]
    rewrite([str(f) for f in folders], tmp_path / "out", 7, False)
    labels = [ShardFolder(str(f)).gather_beside("labels", np.array([i]))[0] for f in folders for i in range(10)]
    merged = ShardFolder(str(tmp_path / "out"))
    assert [merged.gather_beside("labels", np.array([i]))[0] for i in range(20)] == labels and 0 < sum(labels) < 20
    assert np.array_equal(samples(tmp_path / "out"), samples(*folders))


def test_what_was_left_half_done_is_completed_to_the_same_bytes(text, tmp_path):
    source = str(text / "train")
    rewrite([source], tmp_path / "whole", 50, False)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half/manifest.json").unlink()
    (tmp_path / "half/shard-000001.index.json").unlink()
    (tmp_path / "half/shard-000001.tar").write_bytes(b"half")
    digest = hashlib.sha256((text / "train/manifest.json").read_bytes()).hexdigest()
    (tmp_path / "half/rewrite.json").write_text(json.dumps([[[source, digest]], 50]))
    rewrite([source], tmp_path / "half", 50, False)
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "whole")


def test_what_cannot_be_one_is_refused(text, tmp_path):
    few = pictures(tmp_path / "few", 1)
    with pytest.raises(DataError, match="another kind than"):
        rewrite([str(text / "train"), str(few)], tmp_path / "out", 8, False)
    other = pictures(tmp_path / "other", 1, classes=("cow", "dog"))
    with pytest.raises(DataError, match="another classes than"):
        rewrite([str(few), str(other)], tmp_path / "out", 8, False)
    with pytest.raises(DataError, match="already holds data"):
        rewrite([str(few)], other, 8, False)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(text, tmp_path):
    result = run(app, ["merge", str(text / "train"), "--output", str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0 and not (tmp_path / "out").exists()


def test_a_contact_sheet_shows_the_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder, sheet = pictures(tmp_path / "a", 1), tmp_path / "sheet.png"
    result = run(app, ["sample", str(folder), "--output", str(sheet), "--count", "5", "--index", "2"])
    assert result.exit_code == 0, result.output
    refused = run(app, ["sample", str(folder), "--output", str(tmp_path / "sheet.table")])
    assert refused.exit_code == 2 and "give it the suffix of a picture" in refused.output
    drawn = np.array(image.open(sheet))
    assert drawn.shape == (16, 24, 3) or drawn.shape == (24, 24, 3)
    generator = np.random.default_rng(1)
    third = generator.integers(0, 256, (10, 8, 8, 3), np.uint8)[2]
    assert np.abs(drawn[:8, :8].astype(int) - third).max() <= 1  # float16


def test_statistics_of_pictures(tmp_path):
    said = run(app, ["stats", str(pictures(tmp_path / "a", 1))]).output
    assert "10 samples of [4, 48]" in said and "cat" in said and "dog" in said


def test_what_is_read_or_belongs_to_others_is_not_removed(text, tmp_path):
    source = shutil.copytree(text / "train", tmp_path / "[odd] source")
    before = bytes_of(source)
    for output in (source, tmp_path / "elsewhere/../[odd] source"):
        result = run(app, ["reshard", str(source), "--output", str(output), "--samples-per-shard", "9", "--overwrite"])
        assert result.exit_code == 2 and "is read and written" in result.output
    (tmp_path / "notes.md").write_text("mine")
    rewrite([str(source)], tmp_path, 9, True)  # the folder that its source is in
    assert bytes_of(source) == before and (tmp_path / "notes.md").read_text() == "mine"
    assert np.array_equal(samples(tmp_path), samples(source))


def test_two_do_not_write_one_folder_and_files_of_others_stay(text, tmp_path):
    out = tmp_path / "out"
    rewrite([str(text / "validation")], out, 9, False)
    for name in ("notes.partial", "shard-of-mine.tar", "shard-000000.tar.12.partial"):
        (out / name).write_text("mine")
    before = bytes_of(out)
    with OutputLock(out), pytest.raises(DataError, match=f"another process writes {out}"):
        rewrite([str(text / "train")], out, 9, True)
    assert bytes_of(out) == before
    rewrite([str(text / "train")], out, 9, True)
    assert np.array_equal(samples(out), samples(text / "train"))
    assert {p.name for p in out.glob("*") if p.read_bytes() == b"mine"} == {"notes.partial", "shard-of-mine.tar"}


def test_shards_of_no_known_work_are_not_taken_over(text, tmp_path):
    rewrite([str(text / "validation")], tmp_path, 9, False)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="already holds data"):
        rewrite([str(text / "train")], tmp_path, 9, False)
    rewrite([str(text / "train")], tmp_path, 9, True)
    assert np.array_equal(samples(tmp_path), samples(text / "train"))
