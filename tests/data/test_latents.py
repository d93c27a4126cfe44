"""The loader on video and pictures: latents and labels in one global order, whatever the layout."""

import itertools

import numpy as np
import pytest
import torch

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.loader import VALIDATION_IDS, Loader
from ebt_megatron.data.order import Blend
from ebt_megatron.data_prep.images import PictureSource
from ebt_megatron.data_prep.latent_passes import LatentSettings
from ebt_megatron.data_prep.latents import prepare_latents
from ebt_megatron.data_prep.video import VideoSource
from tests.data.test_loader import recipe_for
from tests.data_prep.media import moving_square, write_videos


def recipe(folder, *overrides):
    return recipe_for(folder, "data.modality=video", "data.sequence_length=5", *overrides)


def prepare(raw, output, source, **settings):
    from ebt_megatron.data_prep.files import find_files

    files = [[file] for file in find_files([str(raw)], (".mp4", ".npz")).files]
    prepare_latents(output, files, source, LatentSettings(**{"validation_fraction": 0.4} | settings), "a test")
    return output


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    pytest.importorskip("av")
    return write_videos(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def videos(raw, tmp_path_factory):
    source = VideoSource(frames=6, height=16, width=16)
    return prepare(raw, tmp_path_factory.mktemp("video") / "out", source, samples_per_shard=8)


def pictures(folder, labels, **settings):
    folder.mkdir()
    np.savez(folder / "a.npz", images=moving_square(60, 16, 16), **labels)
    return prepare(folder, folder / "out", PictureSource(16, 16), **settings)


def global_batches(folder, size, batches, start=0):
    """(sample ids, latents) of whole global batches in global order, as `size` ranks see them."""
    per_rank = 8 // (2 * size)
    ranks = []
    for rank in range(size):
        loader = Loader(recipe(folder), "train", rank, size)
        loader.consumed = start
        ranks.append(list(itertools.islice(iter(loader), batches * per_rank)))
    ordered = [rank[m] for m in range(batches * per_rank) for rank in ranks]
    return torch.cat([b.sample_ids for b in ordered]).tolist(), torch.cat([b.samples for b in ordered])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_count_sees_the_same_clips_in_the_same_order(videos, size):
    shards = ShardFolder(f"{videos}/train")
    blend = Blend([shards.sizes], [], recipe(videos).training.seed, True)
    ids, latents = global_batches(videos, size, 9)  # more than an epoch
    expected = np.stack([shards.row(blend.locate(g)[1]) for g in range(72)]).astype(np.float32)
    assert ids == list(range(72)) and len(shards) < 72
    assert latents.dtype == torch.float32 and (latents.numpy() == expected).all()


def test_a_run_goes_on_with_another_number_of_ranks(videos):
    whole = global_batches(videos, 1, 6)
    parts = [global_batches(videos, 4, 2), global_batches(videos, 2, 3, start=16), global_batches(videos, 1, 1, 40)]
    assert [i for ids, _ in parts for i in ids] == whole[0]
    assert torch.equal(torch.cat([latents for _, latents in parts]), whole[1])


def test_video_has_latents_and_no_tokens(videos):
    batch = next(iter(Loader(recipe(videos), "validation", 0, 1)))
    assert batch.samples.shape == (2, 6, 4, 16) and batch.sample_ids.tolist() == [VALIDATION_IDS, VALIDATION_IDS + 1]
    assert not batch.beside and batch.documents is None


@pytest.mark.parametrize("labels", [{}, {"labels": np.arange(60) % 5}])
def test_pictures_have_the_labels_of_their_rows(tmp_path, labels):
    folder = pictures(tmp_path / "raw", labels)
    shards = ShardFolder(f"{folder}/train")
    batch = next(iter(Loader(recipe_for(folder, "data.modality=images", "data.shuffle=false"), "train", 0, 1)))
    assert batch.samples.shape == (2, 4, 16)
    assert (batch.samples.numpy() == np.stack([shards.row(0), shards.row(1)]).astype(np.float32)).all()
    if labels:
        numbers = batch.beside["labels"]
        assert numbers.dtype == torch.int64 and (numbers.numpy() == shards.gather_beside("labels", np.arange(2))).all()
    else:
        assert not batch.beside


def refusal(*folders, **overrides):
    settings = [f"data.train=[{','.join(f'{f}/train' for f in folders)}]", *(f"{k}={v}" for k, v in overrides.items())]
    with pytest.raises(DataError) as error:
        Loader(recipe(folders[0], *settings), "train", 0, 1)
    return str(error.value)


def test_sources_that_do_not_fit_are_refused(raw, videos, tmp_path):
    encoder = str(videos / "train/encoder.npz")
    other_encoder = prepare(raw, tmp_path / "a", VideoSource(frames=6, height=16, width=16), channels=8)
    longer = prepare(raw, tmp_path / "b", VideoSource(frames=8, height=16, width=16), encoder=encoder)
    few = pictures(tmp_path / "few", {"labels": np.arange(60) % 3}, encoder=encoder)
    many = pictures(tmp_path / "many", {"labels": np.arange(60) % 5}, encoder=encoder)
    assert "has sequences of 5 frames, data.sequence_length is 4" in refusal(videos, **{"data.sequence_length": 4})
    assert "another encoder than" in refusal(videos, other_encoder)
    assert "has sequences of 7 frames" in refusal(videos, longer)
    assert f"{few}/train holds images, {videos}/train video: give one kind" in refusal(videos, few)
    images = {"data.modality": "images"}
    assert "5 classes" in refusal(few, many, **images) and "of [4, 16] and 3" in refusal(few, many, **images)


def test_video_of_the_same_encoder_is_blended(raw, videos, tmp_path):
    source = VideoSource(frames=6, height=16, width=16, stride=2)
    slower = prepare(raw, tmp_path / "out", source, encoder=str(videos / "train/encoder.npz"))
    folders = f"data.train=[{videos}/train,{slower}/train]"
    loader = Loader(recipe(videos, folders), "train", 0, 1)
    assert len(loader.blend) == sum(len(ShardFolder(f"{f}/train")) for f in (videos, slower))
    assert next(iter(loader)).samples.shape == (2, 6, 4, 16)


def test_a_changed_encoder_is_refused(videos, tmp_path):
    import shutil

    shutil.copytree(videos, tmp_path / "out")
    path = tmp_path / "out/train/encoder.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "does not match the manifest beside it" in refusal(tmp_path / "out")
