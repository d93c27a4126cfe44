"""Video preparation: every frame in its place, splits by file, and clear about files that cannot be used."""

import json
from fractions import Fraction
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data_prep import video
from ebt_megatron.data_prep.encoders import load_encoder
from ebt_megatron.data_prep.files import InputFile
from tests.data_prep.media import contents, invoke, moving_square, psnr, said, write_video, write_videos

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("raw"))


def prepare(source, output, *more):
    return invoke(
        video.main,
        "--input",
        source,
        "--output",
        output,
        "--height",
        32,
        "--width",
        32,
        "--frames",
        6,
        "--clips-per-shard",
        10,
        "--validation-fraction",
        0.4,
        *more,
    )


@pytest.fixture(scope="module")
def shards(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "out"
    result = prepare(videos, output)
    assert result.exit_code == 0, result.output
    return output


def decoded(folder):
    """uint8 [clips, frames, height, width, 3] of a shard folder."""
    shards = ShardFolder(str(folder))
    encoder = load_encoder(shards.sidecar())
    return np.stack([encoder.to_frames(row) for row in shards.rows()])


def cropped(frames):
    """What 48 x 64 frames are at 32 x 32: made smaller by a third, the centre taken."""
    import PIL.Image

    small = [np.asarray(PIL.Image.fromarray(f).resize((43, 32), PIL.Image.Resampling.BICUBIC)) for f in frames]
    return np.stack(small)[:, :, 5:37]


def test_the_number_of_workers_changes_no_byte(videos, shards, tmp_path):
    assert prepare(videos, tmp_path / "out", "--workers", 2).exit_code == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_what_the_manifest_says(shards):
    train, validation = read_manifest(str(shards / "train")), read_manifest(str(shards / "validation"))
    assert train.kind == "video" and train.shape == [6, 16, 16] and train.dtype == "float16"
    assert train.provenance["files"] + validation.provenance["files"] == 8
    assert train.samples == 6 * train.provenance["files"]  # 40 frames are six clips of six
    assert train.provenance["frames"] == 6 * train.samples
    assert train.provenance["seconds"] == pytest.approx(train.provenance["frames"] / 25)
    assert train.encoder["kind"] == "pca" and len(train.encoder["std"]) == 16


def test_latents_of_the_train_split_are_normalised(shards):
    latents = np.stack(list(ShardFolder(str(shards / "train")).rows())).reshape(-1, 16).astype(np.float64)
    assert np.abs(latents.mean(0)).max() < 2e-3 and np.abs(latents.std(0) - 1).max() < 2e-3


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_frames_are_the_right_way_up(degrees, tmp_path):
    """A phone that was held sideways stores its frames lying and notes the turn."""
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    upright = moving_square(12, height=64, width=48) if degrees != 180 else moving_square(12)
    stored = np.rot90(upright, -degrees // 90, (1, 2))
    write_video(tmp_path / "a.mp4", np.ascontiguousarray(stored), rotation=degrees)
    height, width = upright.shape[1:3]
    source = video.VideoSource(frames=12, height=height, width=width)
    (piece,) = source.read([InputFile(str(tmp_path / "a.mp4"), 0, 0)])
    ((clip, _),) = piece.samples
    assert clip.shape == upright.shape and psnr(clip, upright) > 28
    assert psnr(np.rot90(clip, 2, (1, 2)), upright) < 20


def test_clips_follow_each_other_and_do_not_overlap(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(40))
    result = prepare(tmp_path, tmp_path / "out", "--encoder", "pixels", "--validation-fraction", 0)
    assert result.exit_code == 0, result.output
    clips = decoded(tmp_path / "out/train")
    assert clips.shape == (6, 6, 32, 32, 3)
    assert psnr(clips.reshape(36, 32, 32, 3), cropped(moving_square(40)[:36])) > 28  # the codec loses a little
    shifted = cropped(moving_square(40)[1:37])
    assert psnr(clips.reshape(36, 32, 32, 3), shifted) < 26


@pytest.mark.parametrize(("option", "taken"), [(("--stride", 3), 3), (("--frame-rate", 5), 5)])
def test_frames_are_taken_by_stride_or_by_time(tmp_path, option, taken):
    write_video(tmp_path / "a.mp4", moving_square(40))
    result = prepare(tmp_path, tmp_path / "out", "--encoder", "pixels", "--validation-fraction", 0, *option)
    assert result.exit_code == 0, result.output
    manifest, expected = read_manifest(str(tmp_path / "out/train")), cropped(moving_square(40)[::taken])
    assert psnr(decoded(tmp_path / "out/train")[0], expected[:6]) > 28
    assert manifest.provenance["seconds"] == pytest.approx(manifest.samples * 6 * taken / 25)


@pytest.mark.parametrize("hop", [1, 3, 4, 6, 12, 13, 40])
def test_clips_may_overlap_and_be_mirrored(tmp_path, hop):
    """A clip begins at every hop-th frame of the film; what is in it does not depend on the others."""
    write_video(tmp_path / "a.mp4", moving_square(40))
    output, exact = tmp_path / "out", ("--encoder", "pixels", "--validation-fraction", 0)
    result = prepare(tmp_path, output, *exact, "--stride", 2, "--hop", hop, "--mirror")
    assert result.exit_code == 0, result.output
    pictures = cropped(moving_square(40))
    starts = range(0, 40 - 10, hop)  # a clip covers 11 frames
    clips = decoded(output / "train")
    assert len(clips) == 2 * len(starts)
    for start, clip, mirrored in zip(starts, clips[::2], clips[1::2], strict=True):
        assert psnr(clip, pictures[start : start + 12 : 2]) > 28
        assert np.array_equal(mirrored, clip[:, :, ::-1])
        assert start == 0 or psnr(clip, pictures[start - 1 : start + 11 : 2]) < 27


def test_what_does_not_move_may_be_left_out(tmp_path):
    """Of three tiles side by side one moves; a film in which nothing does is no fault."""
    film = np.full((24, 96, 288, 3), 100, np.uint8)
    (tmp_path / "raw").mkdir()
    film[:, :, 96:192] = np.random.default_rng(0).integers(0, 255, (24, 1, 1, 1))
    write_video(tmp_path / "raw/a.mp4", film)
    write_video(tmp_path / "raw/b.mp4", np.full((24, 96, 96, 3), 7, np.uint8))
    options = ("--encoder", "pixels", "--validation-fraction", 0, "--height", 96, "--width", 96, "--tiles", 1)
    result = prepare(
        tmp_path / "raw", tmp_path / "out", *options, "--tiles", 3, "--height", 32, "--width", 32, "--least-motion", 5
    )
    assert result.exit_code == 0, result.output
    manifest, clips = read_manifest(str(tmp_path / "out/train")), decoded(tmp_path / "out/train")
    every, moving = 4 * (27 + 9), 4 * 9
    assert len(clips) == manifest.samples == moving and manifest.provenance["still"] == every - moving
    assert (np.abs(np.diff(clips.astype(int), axis=1)).mean((1, 2, 3, 4)) >= 4).all() and "still" in said(result)
    for encoder, message in (("pixels", "8 samples move less than --least-motion"), ("pca", "nothing in it moves")):
        result = prepare(
            tmp_path / "raw", tmp_path / "none", *options, "--encoder", encoder, "--overwrite", "--least-motion", 255
        )
        assert result.exit_code == 2 and message in said(result)


def test_a_preparation_of_before_there_were_views_goes_on(videos, shards):
    """Its record names none of them."""
    record = json.loads((shards / "job.json").read_text())
    assert not {"hop", "mirror", "least_motion"} & set(str(record).replace("'", " ").split())


def test_frames_at_a_rate_are_those_shown_at_its_times():
    frames = [SimpleNamespace(pts=p, time_base=Fraction(1, 10)) for p in (5, 6, 8, 11, 12)]
    times = lambda rate: [f.pts for f in video.at_rate(iter(frames), Fraction(rate))]  # noqa: E731
    assert times(10) == [5, 6, 6, 8, 8, 8, 11, 12]
    assert times(5) == [5, 6, 8, 11]
    assert list(video.at_rate(iter([]), Fraction(5))) == []


def test_the_split_is_by_file_and_independent_of_its_path(videos, shards, tmp_path):
    (tmp_path / "raw").mkdir()
    for i, path in enumerate(sorted(videos.iterdir(), reverse=True)):
        (tmp_path / f"raw/renamed-{i}.mp4").write_bytes(path.read_bytes())
    assert prepare(tmp_path / "raw", tmp_path / "out", "--encoder", shards / "train/encoder.npz").exit_code == 0
    for split in ("train", "validation"):
        clips = [{r.tobytes() for r in ShardFolder(str(f / split)).rows()} for f in (shards, tmp_path / "out")]
        assert clips[0] == clips[1] and len(clips[0]) % 6 == 0  # all six of a file


def test_urls_are_read(videos, shards, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in videos.iterdir():
        memory.pipe(f"/videos/{path.name}", path.read_bytes())
    assert prepare("memory://videos", tmp_path / "out").exit_code == 0
    for split in ("train", "validation"):
        mine, theirs = contents(tmp_path / "out" / split), contents(shards / split)
        assert mine["shard-000000.tar"] == theirs["shard-000000.tar"]


def test_stock_webdataset_reads_the_shards(shards):
    import webdataset

    urls = [str(p) for p in sorted((shards / "train").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    clips = np.concatenate([sample["latents.npy"] for sample in dataset])
    assert (clips == np.stack(list(ShardFolder(str(shards / "train")).rows()))).all()


def test_other_video_can_be_prepared_with_the_same_encoder(shards, tmp_path):
    other = write_videos(tmp_path / "raw", count=2)
    result = prepare(other, tmp_path / "out", "--encoder", shards / "train/encoder.npz", "--validation-fraction", 0)
    assert result.exit_code == 0, result.output
    ours, theirs = read_manifest(str(tmp_path / "out/train")), read_manifest(str(shards / "train"))
    assert ours.encoder == theirs.encoder


def truncated(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def damage(kind, folder):
    """A broken file in the folder; returns its name."""
    name = f"zz-{kind}.mkv" if kind == "end missing" else f"zz-{kind}.mp4"
    frames = 4 if kind == "short" else 200
    write_video(folder / name, moving_square(frames), **({"movflags": "faststart"} if kind == "tail missing" else {}))
    if "missing" in kind:
        truncated(folder / name)
    if kind == "not video":
        (folder / name).write_bytes(b"not a video at all")
    return name


@pytest.mark.parametrize("kind", ["index missing", "tail missing", "end missing", "short", "not video"])
def test_a_broken_file_is_named_or_left_out(kind, videos, shards, tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).symlink_to(path)
    name = damage(kind, folder)
    result = prepare(folder, tmp_path / "out", "--workers", 1)
    assert result.exit_code == 2 and f"{folder / name}" in said(result) and "Traceback" not in result.output
    assert result.output.count("error:") == 1
    assert not list((tmp_path / "out").rglob("manifest.json")) and not list((tmp_path / "out").rglob("*.tar"))
    result = prepare(
        folder, tmp_path / "out", "--skip-broken", "--overwrite", "--encoder", shards / "train/encoder.npz"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/skipped.txt").read_text().count("\n") == 1
    for split in ("train", "validation"):
        assert read_manifest(str(tmp_path / "out" / split)).provenance["skipped"] == 1
        ours, theirs = ShardFolder(str(tmp_path / "out" / split)), ShardFolder(str(shards / split))
        assert (np.stack(list(ours.rows())) == np.stack(list(theirs.rows()))).all()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--stride", 2, "--frame-rate", 5), "give either --stride or --frame-rate"),
        (("--patch", 7), "cannot be cut into patches of 7 x 7"),
        (("--frames", 41), "has no clip: one of 41 frames needs 41 frames"),
    ],
)
def test_bad_options_give_one_line(videos, tmp_path, more, line):
    result = prepare(videos, tmp_path / "out", *more)
    assert result.exit_code == 2 and line in said(result)


def test_a_dry_run_writes_nothing(videos, tmp_path):
    assert prepare(videos, tmp_path / "out", "--dry-run").exit_code == 0
    assert not (tmp_path / "out").exists()


def test_frames_are_cut_into_tiles_row_by_row(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(4, 48, 64))
    file = InputFile(str(tmp_path / "a.mp4"), (tmp_path / "a.mp4").stat().st_size, 0)

    def samples(**options):
        (piece,) = video.VideoSource(4, 16, 16, **options).read([file])
        return [clip for clip, _ in piece.samples]

    tiles = samples(tiles=3)
    assert len(tiles) == 3 * 4  # of 48 x 64 pixels, none made smaller
    (whole,) = video.VideoSource(4, 48, 64).read([file])
    clip, _ = next(whole.samples)
    rows = [np.concatenate(tiles[i : i + 4], 2) for i in range(0, 12, 4)]
    assert np.array_equal(np.concatenate(rows, 1), clip)
    assert len(samples()) == 1
