"""Preparation of pictures: files, arrays and idx files, with their labels; splits by picture."""

import gzip
import struct

import numpy as np
import pytest

from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data_prep import images
from ebt_megatron.data_prep.encoders import load_encoder, patches_of
from tests.data_prep.media import contents, invoke, prepare_pictures, psnr, said

PIL = pytest.importorskip("PIL.Image")


def pictures(count, height=16, width=16, seed=0):
    """uint8 [count, height, width, 3], smooth and all different."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 8
    phase, speed = generator.uniform(0, 6, (2, count, 3, 1, 1)), generator.uniform(0.2, 1, (count, 3, 1, 1))
    waves = np.sin(phase[0] + speed * y) + np.cos(phase[1] + x)
    return (127.5 + 60 * waves).astype(np.uint8).transpose(0, 2, 3, 1)


def save(folder, name, picture):
    folder.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(picture).save(folder / name)


def write_idx(path, array):
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def decoded(output):
    """{bytes of a picture: its label or None} of both splits, and how many samples each has."""
    found, counts = {}, []
    for split in ("train", "validation"):
        shards = ShardFolder(str(output / split))
        encoder = load_encoder(shards.sidecar())
        for i in range(len(shards)):
            picture = encoder.to_frames(shards.row(i)[None])[0]
            label = shards.gather_beside("labels", np.array([i]))[0] if shards.beside else None
            found[picture.tobytes()] = label
        counts.append(len(shards))
    return found, counts


def test_pictures_of_an_array_come_back_exactly_with_their_labels(tmp_path):
    array, labels = pictures(300), np.arange(300) % 7
    np.savez(tmp_path / "a.npz", images=array, labels=labels)
    assert prepare_pictures(tmp_path, tmp_path / "out", "--pictures-per-shard", 100).exit_code == 0
    found, counts = decoded(tmp_path / "out")
    assert found == {p.tobytes(): label for p, label in zip(array, labels.tolist(), strict=True)}
    assert sum(counts) == 300 and 60 < counts[1] < 120
    manifest = read_manifest(str(tmp_path / "out/train"))
    assert manifest.kind == "images" and manifest.shape == [4, 192] and manifest.classes == list("0123456")
    assert manifest.provenance["pictures"] == manifest.samples == counts[0] and len(manifest.shards) == 3


def test_latents_are_multiplied_by_a_scale_instead_of_normalised(tmp_path):
    array = pictures(40)
    np.save(tmp_path / "a.npy", array)
    assert prepare_pictures(tmp_path, tmp_path / "out", "--scale", 0.25).exit_code == 0
    shards = ShardFolder(str(tmp_path / "out/train"))
    expected = {patches_of(p[None], 8).tobytes() for p in array}
    found = {np.rint((4 * row.astype(np.float32) + 1) * 127.5).astype(np.uint8).tobytes() for row in shards.rows()}
    assert found < expected and shards.manifest.encoder["std"] == [4.0] * 192
    done = prepare_pictures(
        tmp_path, tmp_path / "again", "--scale", 0.25, "--encoder", tmp_path / "out/train/encoder.npz"
    )
    assert "has a normalisation of its own: leave it out" in said(done)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
def test_idx_files_have_their_labels_beside_them(tmp_path, name):
    gray, labels = pictures(80)[..., 0], (np.arange(80) % 3).astype(np.uint8)
    write_idx(tmp_path / name, gray)
    write_idx(tmp_path / name.replace("images", "labels").replace("idx3", "idx1"), labels)
    assert prepare_pictures(tmp_path, tmp_path / "out").exit_code == 0
    colored = np.repeat(gray[..., None], 3, -1)
    assert decoded(tmp_path / "out")[0] == {p.tobytes(): n for p, n in zip(colored, labels.tolist(), strict=True)}


def test_folders_are_classes(tmp_path):
    array = pictures(40)
    for i, picture in enumerate(array):
        save(tmp_path / "raw" / ("cats" if i % 2 else "dogs"), f"{i}.png", picture)
    done = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--classes", "folders")
    assert done.exit_code == 0 and "; 2 classes: cats, dogs" in " ".join(done.output.split())
    assert decoded(tmp_path / "out")[0] == {p.tobytes(): (i + 1) % 2 for i, p in enumerate(array)}
    assert read_manifest(str(tmp_path / "out/validation")).classes == ["cats", "dogs"]


def test_without_classes_there_are_no_labels(tmp_path):
    for i, picture in enumerate(pictures(20)):
        save(tmp_path / "raw", f"{i}.webp", picture)
    assert prepare_pictures(tmp_path / "raw", tmp_path / "out").exit_code == 0
    assert read_manifest(str(tmp_path / "out/train")).classes == []
    assert "labels" not in (tmp_path / "out/train/shard-000000.index.json").read_text()


def test_a_picture_is_made_smaller_and_cropped_to_its_centre(tmp_path):
    for i, picture in enumerate(pictures(8, 64, 128)):
        save(tmp_path / "raw", f"{i}.png", picture)
    assert prepare_pictures(tmp_path / "raw", tmp_path / "out").exit_code == 0
    expected = {i: p[:, 32:96].reshape(16, 4, 16, 4, 3).mean((1, 3)) for i, p in enumerate(pictures(8, 64, 128))}
    for found in decoded(tmp_path / "out")[0]:
        picture = np.frombuffer(found, np.uint8).reshape(16, 16, 3)
        assert max(psnr(e, picture) for e in expected.values()) > 35


def test_tiles_cover_a_picture_once_and_stay_in_one_split(tmp_path):
    big = pictures(12, 36, 50)
    for i, picture in enumerate(big):
        save(tmp_path / "raw", f"{i}.png", picture)
    assert prepare_pictures(tmp_path / "raw", tmp_path / "out", "--tile").exit_code == 0
    cut = [[p[2 + y : 18 + y, 1 + x : 17 + x].tobytes() for y in (0, 16) for x in (0, 16, 32)] for p in big]
    found, counts = decoded(tmp_path / "out")
    assert set(found) == {t for tiles in cut for t in tiles} and counts[0] % 6 == counts[1] % 6 == 0
    assert read_manifest(str(tmp_path / "out/train")).provenance["pictures"] == counts[0] // 6
    train = ShardFolder(str(tmp_path / "out/train"))
    kept = load_encoder(train.sidecar()).to_frames(np.stack(list(train.rows())))
    assert all(sum(t in {p.tobytes() for p in kept} for t in tiles) in (0, 6) for tiles in cut)


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_UNIT", 16)
    np.save(tmp_path / "array.npy", pictures(50))
    for i, picture in enumerate(pictures(40, seed=1)):
        save(tmp_path / "files", f"{i}.jpg", picture)
    for workers in (1, 2):
        result = invoke(
            images.main,
            "--input",
            tmp_path / "*.npy",
            "--input",
            tmp_path / "files",
            "--height",
            16,
            "--width",
            16,
            "--workers",
            workers,
            "--output",
            tmp_path / f"out{workers}",
        )
        assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_stock_webdataset_reads_the_shards(tmp_path):
    import webdataset

    np.savez(tmp_path / "a.npz", x=pictures(200), y=np.arange(200))
    assert prepare_pictures(tmp_path, tmp_path / "out", "--array-key", "x", "--labels-key", "y").exit_code == 0
    urls = [str(p) for p in sorted((tmp_path / "out/train").glob("*.tar"))]
    blocks = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    shards = ShardFolder(str(tmp_path / "out/train"))
    assert (np.concatenate([b["latents.npy"] for b in blocks]) == np.stack(list(shards.rows()))).all()
    labels = shards.gather_beside("labels", np.arange(len(shards)))
    assert (np.concatenate([b["labels.npy"] for b in blocks]) == labels).all()
    assert len(blocks[0]["latents.npy"]) == 64


def test_a_broken_picture_is_named_or_left_out(tmp_path):
    for i, picture in enumerate(pictures(20)):
        save(tmp_path / "raw", f"{i}.png", picture)
    (tmp_path / "raw/bad.png").write_bytes((tmp_path / "raw/0.png").read_bytes()[:200])
    (tmp_path / "raw/text.jpg").write_text("not a picture")
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out")
    assert result.exit_code == 2 and "bad.png cannot be decoded" in said(result) and "Traceback" not in result.output
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert prepare_pictures(tmp_path / "raw", tmp_path / "out", "--skip-broken", "--resume").exit_code == 0
    assert sum(decoded(tmp_path / "out")[1]) == 20
    lines = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert ["bad.png" in lines[0], "text.jpg cannot be decoded (no format" in lines[1]] == [True, True]


def bad_array(folder, kind):
    array = pictures(10)
    if kind == "floats":
        np.save(folder / "a.npy", array / 255)
    elif kind == "key":
        np.savez(folder / "a.npz", pictures=array)
    elif kind == "labels":
        np.savez(folder / "a.npz", images=array, labels=np.arange(9))
    elif kind == "idx":
        write_idx(folder / "images-idx3-ubyte", array[..., 0])
        (folder / "images-idx3-ubyte").write_bytes((folder / "images-idx3-ubyte").read_bytes()[:-1])
    elif kind == "gz":
        write_idx(folder / "images-idx3-ubyte.gz", array[..., 0])
        (folder / "images-idx3-ubyte.gz").write_bytes((folder / "images-idx3-ubyte.gz").read_bytes()[:-100])
    elif kind == "some labels":
        np.savez(folder / "a.npz", images=array, labels=np.arange(10))
        np.save(folder / "b.npy", pictures(10, seed=1))
    elif kind == "a million":
        np.savez(folder / "a.npz", images=array, labels=np.full(10, 1_000_000))
    elif kind == "small":
        np.save(folder / "a.npy", array[:, :8])


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("floats", "a.npy holds float64 [10, 16, 16, 3]; pictures are uint8"),
        ("key", "it holds pictures, not images: name the pictures with --array-key"),
        ("labels", "the labels of"),
        ("idx", "truncated, or no idx file"),
        ("gz", "images-idx3-ubyte.gz cannot be read"),
        ("some labels", "some pictures of the input have labels and some have none"),
        ("a million", "the input has label 1000000 and 10 samples"),
        ("small", "smaller than a tile of 16 x 16"),
    ],
)
def test_an_array_that_is_not_pictures_is_named(tmp_path, kind, line):
    bad_array(tmp_path, kind)
    result = prepare_pictures(tmp_path, tmp_path / "out", "--tile")
    assert result.exit_code == 2 and line in said(result) and "Traceback" not in result.output
