"""Pictures and films become what a viewer shows: on a ground, of the right shape, each clip of one recording."""

import struct
import zlib
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data_prep import images, video
from ebt_megatron.data_prep.files import find_files
from tests.data_prep.media import moving_square, prepare_pictures, psnr, said
from tests.data_prep.test_images import pictures, save
from tests.data_prep.test_video import decoded, prepare

av = pytest.importorskip("av")
PIL = pytest.importorskip("PIL.Image")
exif_transpose = pytest.importorskip("PIL.ImageOps").exif_transpose
PLAIN = ("--encoder", "pixels", "--validation-fraction", 0)


# --- pictures -----------------------------------------------------------------------------------------


def one(path, **options):
    """The only sample of a picture file, uint8 [16, 16, 3], and what was counted."""
    (piece,) = images.PictureSource(16, 16, **options).read(find_files([str(path)], ()).files)
    ((sample, _),) = piece.samples
    return sample[0], dict(piece.counts)


def hole(path, mode):
    """A red picture whose upper half is seen through; below alpha 0 lies green (of grey: 100 and 30)."""
    grey = mode in ("LA", "L", "I;16")
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[8:], picture[:8] = (100,) * 3 + (255,) if grey else (200, 0, 0, 255), (30,) * 3 + (0,) if grey else (
        0, 200, 0, 0
    )  # fmt: skip
    rgba = PIL.fromarray(picture)
    if mode == "RGBA":
        rgba.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    elif mode == "LA":
        rgba.convert("LA").save(path)
    elif mode == "P":
        indexed = PIL.fromarray((np.arange(256).reshape(16, 16) >= 128).astype(np.uint8), "P")
        indexed.putpalette([0, 200, 0, 200, 0, 0])
        indexed.save(path, transparency=0)
    elif mode == "I;16":
        PIL.fromarray(picture[..., 0].astype(np.uint16) * 257).save(path)
        data = path.read_bytes()
        chunk = b"tRNS" + struct.pack(">H", 30 * 257)
        at = data.index(b"IDAT") - 4
        path.write_bytes(data[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:])
    else:
        rgba.convert(mode).save(path, transparency=30 if mode == "L" else (0, 200, 0))
    return (100,) * 3 if grey else (200, 0, 0)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGBA"),
        ("a.png", "LA"),
        ("a.png", "P"),
        ("a.png", "L"),
        ("a.png", "RGB"),
        ("a.png", "I;16"),
        ("a.gif", "P"),
        ("a.webp", "RGBA"),
        ("a.tif", "RGBA"),
    ],
)
@pytest.mark.parametrize(("ground", "seen"), [("white", 255), ("black", 0), ("00ff7f", (0, 255, 127))])
def test_what_is_seen_through_is_the_ground_and_counted(tmp_path, name, mode, ground, seen):
    colour = hole(tmp_path / name, mode)
    picture, counts = one(tmp_path / name, ground=images.colour(ground))
    assert (picture[1:7] == seen).all(), picture[1, 1]
    assert np.abs(picture[9:15].astype(int) - colour).max() <= 2
    assert counts == {"transparent": 1}


def test_half_transparent_pixels_are_mixed_and_opaque_ones_stay(tmp_path):
    rgba = np.dstack([pictures(1)[0], np.full((16, 16), 255, np.uint8)])
    PIL.fromarray(rgba).save(tmp_path / "a.png")
    picture, counts = one(tmp_path / "a.png")
    assert (picture == rgba[..., :3]).all() and not counts.get("transparent")
    rgba[..., 3] = np.arange(256).reshape(16, 16)
    PIL.fromarray(rgba).save(tmp_path / "a.png")
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    assert np.abs(one(tmp_path / "a.png")[0] - expected).max() <= 0.5


def test_the_manifest_counts_what_was_transparent_and_the_ground_is_an_option(tmp_path):
    (tmp_path / "raw").mkdir()
    for mode in ("RGBA", "LA", "P"):
        hole(tmp_path / f"raw/{mode}.png", mode)
    save(tmp_path / "raw", "b.png", pictures(1)[0])
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--validation-fraction", 0)
    assert result.exit_code == 0 and "3 transparent" in said(result)
    assert read_manifest(str(tmp_path / "out/train")).provenance["transparent"] == 3
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--validation-fraction", 0, "--ground", "blue-ish")
    assert result.exit_code == 2 and "blue-ish is no colour" in said(result)
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--ground", "black", "--resume")
    assert result.exit_code == 2 and "made with other options" in said(result)


def exif(kind):
    """EXIF that asks for a quarter turn; or with a tag beside that cannot be written again; or that is none."""
    if kind == "none":
        return b"Exif\0\0II*\0"  # ends before it says where its tags are
    entries = [(0x0112, 3, 1, 6), *([(0x9286, 200, 99, 7)] if kind == "odd" else [])]
    body = b"".join(struct.pack("<HHIHH", *entry, 0) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"


@pytest.mark.parametrize("kind", ["whole", "odd"])
def test_a_picture_is_turned_as_its_orientation_says_whatever_else_is_in_its_exif(tmp_path, kind):
    smooth = pictures(1)[0]
    PIL.fromarray(smooth).save(tmp_path / "a.jpg", exif=exif(kind), quality=98)
    assert psnr(one(tmp_path / "a.jpg")[0], np.rot90(smooth, -1)) > 30


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_as_pillow_turns_it(tmp_path, turn):
    image = PIL.fromarray(pictures(1)[0])
    tags = image.getexif()
    tags[0x0112] = turn
    image.save(tmp_path / "a.png", exif=tags)
    with PIL.open(tmp_path / "a.png") as opened:
        expected = np.asarray(exif_transpose(opened))
    assert (one(tmp_path / "a.png")[0] == expected).all()


def test_exif_that_cannot_be_parsed_costs_that_picture_alone(tmp_path):
    for i, picture in enumerate(pictures(8)):
        save(tmp_path / "raw", f"{i}.png", picture)
    PIL.fromarray(pictures(1)[0]).save(tmp_path / "raw/bad.png", exif=exif("none"))
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out")
    assert result.exit_code == 2 and "bad.png cannot be decoded" in said(result) and "Traceback" not in result.output
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--skip-broken", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "bad.png" in (tmp_path / "out/skipped.txt").read_text()
    assert sum(read_manifest(str(tmp_path / "out" / s)).samples for s in ("train", "validation")) == 8


def test_a_picture_may_be_larger_than_pillow_thinks_safe(tmp_path, monkeypatch):
    """Its limit is 179 million pixels; here of a smaller one, which Pillow would refuse."""
    images._pillow()
    assert PIL.MAX_IMAGE_PIXELS is None
    save(tmp_path / "raw", "a.png", pictures(1, 32, 32)[0])
    PIL.MAX_IMAGE_PIXELS = 100
    (piece,) = images.PictureSource(16, 16, tile=True).read(find_files([str(tmp_path / "raw")], (".png",)).files)
    assert len(list(piece.samples)) == 4
    monkeypatch.setattr(images, "_PIXELS", 1000)
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--tile", "--validation-fraction", 0)
    assert result.exit_code == 2 and "a.png cannot be decoded (it has 1,024 pixels, more than 1,000" in said(result)


# --- films --------------------------------------------------------------------------------------------


def film(path, frames, times=None, codec="mpeg4", pix_fmt="yuv420p", aspect=None, light=None, format="rgb24"):
    """Frames uint8 [N, H, W, 3 or 4] shown at some times (in 25ths of a second)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if light:
            stream.codec_context.color_trc = light
        for time, pixels in zip(times or range(len(frames)), frames, strict=False):
            frame = av.VideoFrame.from_ndarray(pixels, format=format)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            if light:
                frame.color_trc = light
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clips(path, **options):
    (piece,) = video.VideoSource(**{"frames": 4, "height": 32, "width": 32, **options}).read(
        find_files([str(path)], ()).files
    )
    return [clip for clip, _ in piece.samples], dict(piece.counts)


def test_films_of_pixels_that_are_no_squares_are_shown_in_their_shape(tmp_path):
    """A film 64 wide and 48 high, stored with every other column; with it, the square stays one."""
    whole = np.repeat(moving_square(12), 2, 1).repeat(2, 2)  # 96 x 128
    film(tmp_path / "narrow.mkv", np.ascontiguousarray(whole[:, :, ::2]), aspect=Fraction(2))
    film(tmp_path / "wide.mkv", whole)
    for options in ({}, {"tiles": 2}):
        (narrow, _), (wide, _) = clips(tmp_path / "narrow.mkv", **options), clips(tmp_path / "wide.mkv", **options)
        assert len(narrow) == len(wide) and min(psnr(a, b) for a, b in zip(narrow, wide, strict=True)) > 26


@pytest.mark.parametrize(
    ("times", "gaps"),
    [
        ([*range(15), 180_000, 180_001, 180_002, 180_003], 1),  # two hours
        ([*range(15), 0, 1, 2, 3], 1),  # a clock that started again
        ([*range(0, 30, 2), 30, 31, 90, 91], 1),
        ([*range(15), 60, 61, 62, 63], 0),  # less than two seconds
        ([100 * i for i in range(19)], 0),  # a slow film
    ],
)
def test_time_that_jumps_ends_a_clip(times, gaps):
    frames = [SimpleNamespace(pts=p, time_base=Fraction(1, 25)) for p in times]
    counts = Counter()
    own = 25 / 100 if times[1] == 100 else 25
    parts = [[f.pts for f in part] for part in video.without_gaps(iter(frames), max(2.0, 3 / own), counts)]
    assert [p for part in parts for p in part] == times and counts["gaps"] == gaps == len(parts) - 1
    assert not gaps or len(parts[0]) in (15, 17)


def test_a_film_with_a_jump_has_the_clips_of_its_parts(tmp_path):
    """The last two frames are two hours later; at eight a second, that was thousands of clips that stood still."""
    (tmp_path / "raw").mkdir()
    film(tmp_path / "raw/a.mkv", moving_square(60), [*range(58), 180_000, 180_001])
    result = prepare(tmp_path / "raw", tmp_path / "out", *PLAIN, "--frame-rate", 8)
    assert result.exit_code == 0 and "1 gaps" in said(result)
    manifest = read_manifest(str(tmp_path / "out/train"))
    assert manifest.samples == 3 and manifest.provenance["gaps"] == 1
    moved = np.abs(np.diff(decoded(tmp_path / "out/train").astype(int), axis=1)).mean((2, 3, 4))
    assert (moved > 0.5).all()
    found, counts = clips(tmp_path / "raw/a.mkv", frames=15, stride=4)
    assert len(found) == 1 and counts == {"gaps": 1}


def test_a_film_that_is_all_gaps_is_named(tmp_path):
    film(tmp_path / "a.mkv", moving_square(6), [0, 1, 180_000, 180_001, 360_000, 360_001])
    result = prepare(tmp_path / "a.mkv", tmp_path / "out", *PLAIN, "--pause", 1)
    assert result.exit_code == 2 and "has no clip" in said(result)


@pytest.mark.parametrize(("light", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_films_are_refused_or_left_out(tmp_path, light, name):
    (tmp_path / "raw").mkdir()
    film(tmp_path / "raw/hdr.mkv", moving_square(12), codec="libx264", light=light)
    film(tmp_path / "raw/sdr.mkv", moving_square(12), codec="libx264", light=1)
    result = prepare(tmp_path / "raw", tmp_path / "out", *PLAIN)
    assert result.exit_code == 2 and f"hdr.mkv is an HDR film ({name})" in said(result)
    assert prepare(tmp_path / "raw", tmp_path / "out", *PLAIN, "--skip-broken", "--overwrite").exit_code == 0
    assert read_manifest(str(tmp_path / "out/train")).provenance["skipped"] == 1


@pytest.mark.parametrize(("codec", "pix_fmt", "name"), [("qtrle", "argb", "a.mov"), ("ffv1", "bgra", "a.mkv")])
def test_frames_one_sees_through_are_on_the_ground(tmp_path, codec, pix_fmt, name):
    frames = np.zeros((8, 32, 32, 4), np.uint8)
    frames[:, :, :16], frames[:, :, 16:] = (0, 200, 0, 0), (200, 0, 0, 255)
    film(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt, format="rgba")
    found, counts = clips(tmp_path / name)
    assert len(found) == 2 and counts == {"transparent": 1}
    assert (found[0][:, :, 1:15] == 255).all() and np.abs(found[0][:, :, 17:31].astype(int) - (200, 0, 0)).max() <= 2


def test_a_pyav_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(video.DataError, match=r"needs PyAV 17 or newer, here is 16\.1\.0"):
        video._av()
