"""The loader: every sample once an epoch, in one global order, whatever the layout; bad data refused."""

import itertools
import json
import re
import threading

import numpy as np
import pytest

from ebt_megatron.config import load_recipe
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.loader import Loader
from tests.builders import text_shards

DOCUMENTS = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(40)) for i in range(120)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS, 16, 150)


@pytest.fixture
def copied(shards, tmp_path):
    import shutil

    shutil.copytree(shards, tmp_path / "data")
    return tmp_path / "data"


def recipe_for(folder, *overrides):
    return load_recipe(
        None,
        [
            "model.size=tiny",
            f"data.train=[{folder}/train]",
            f"data.validation=[{folder}/validation]",
            "data.sequence_length=16",
            "training.global_batch_size=8",
            "training.micro_batch_size=2",
            "training.validation_samples=16",
            *overrides,
        ],
    )


def take(loader, micro_batches):
    return [(b.sample_ids.tolist(), b.samples) for b in itertools.islice(iter(loader), micro_batches)]


def global_order(folder, size, batches, start=0, **kwargs):
    """Sample ids of whole global batches, in global order, as `size` ranks see them."""
    per_rank = 8 // (2 * size)
    ranks = []
    for rank in range(size):
        loader = Loader(recipe_for(folder), "train", rank, size)
        loader.consumed = start
        ranks.append([ids for ids, _ in take(loader, batches * per_rank)])
    return [i for m in range(batches * per_rank) for rank in ranks for i in rank[m]]


def test_every_rank_count_gives_the_same_global_order(shards):
    one = global_order(shards, 1, 6)
    assert one == list(range(48))
    for size in (2, 4):
        assert global_order(shards, size, 6) == one


@pytest.mark.parametrize("together", [0, 2])
def test_three_epochs_with_stops_and_other_world_sizes_see_every_sample_once_an_epoch(shards, together):
    recipe = recipe_for(shards, f"data.shuffle_shards={together}")
    size = len(ShardFolder(f"{shards}/train"))
    seen, rows, state = [], [], None
    generator = np.random.default_rng(0)
    while len(seen) < 3 * size:
        ranks = int(generator.choice([1, 2, 4]))
        batches = int(generator.integers(1, 40))
        loaders = [Loader(recipe, "train", r, ranks) for r in range(ranks)]
        streams = []
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
            streams.append(iter(loader))
        for _ in range(batches * 8 // (2 * ranks)):
            for stream in streams:
                batch = next(stream)
                seen += batch.sample_ids.tolist()
                rows += batch.samples.tolist()
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
        for stream in streams:
            stream.close()
    assert seen == list(range(len(seen)))
    everything = sorted(row.tolist() for row in ShardFolder(f"{shards}/train").rows())
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == everything


def test_what_was_read_ahead_is_not_counted(shards):
    loader = Loader(recipe_for(shards, "data.prefetch=8"), "train", 0, 1)
    stream = iter(loader)
    for _ in range(6):  # one global batch and a half
        next(stream)
    assert loader.consumed == 8


def test_the_reading_thread_ends_with_its_iterator(shards):
    stream = iter(Loader(recipe_for(shards), "train", 0, 1))
    next(stream)
    (thread,) = (t for t in threading.enumerate() if t.name == "loader")
    stream.close()
    assert not thread.is_alive()


def test_targets_cover_every_token_once(shards):
    folder = ShardFolder(f"{shards}/train")
    rows = [folder.row(i) for i in range(len(folder))]
    for before, after in itertools.pairwise(rows):
        assert before[-1] == after[0]


def test_document_masks_start_anew_after_an_end_of_text(shards):
    loader = Loader(recipe_for(shards, "data.document_mask=true"), "train", 0, 1)
    for batch in itertools.islice(iter(loader), 20):
        for tokens, documents in zip(batch.samples, batch.documents, strict=True):
            changes = (documents[1:] - documents[:-1]).tolist()
            assert changes == (tokens[:-1] == loader.end_of_text).int().tolist()


def test_stock_webdataset_reads_the_shards(shards):
    import webdataset

    urls = [str(p) for p in sorted((shards / "train").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    rows = np.concatenate([sample["tokens.npy"] for sample in dataset])
    folder = ShardFolder(f"{shards}/train")
    assert len(rows) == len(folder)
    assert all((rows[i] == folder.row(i)).all() for i in range(len(rows)))


def test_stock_energon_reads_the_shards(shards):
    pytest.importorskip("megatron.energon", reason="pip install megatron-energon")
    from benchmarks.data import energon_members

    folder = ShardFolder(f"{shards}/train")
    rows: dict[str, np.ndarray] = {}
    for member in energon_members(shards / "train"):  # which begins anew at the end
        if member["__key__"] in rows:
            break
        rows[member["__key__"]] = np.asarray(member["tokens.npy"])
    found = np.concatenate([rows[key] for key in sorted(rows)])
    assert len(found) == len(folder)
    assert all((found[i] == folder.row(i)).all() for i in range(len(found)))


# --- bad input: one line that says what, where and what to do ---------------------------------


def refuse(folder, match, *overrides):
    with pytest.raises(DataError, match=match) as error:
        Loader(recipe_for(folder, *overrides), "train", 0, 1)
    assert "\n" not in str(error.value)


def test_no_shards(tmp_path):
    refuse(tmp_path, "manifest.json is missing; ebt-prepare makes them")


def test_a_missing_shard(copied):
    (copied / "train/shard-000001.tar").unlink()
    refuse(copied, "shard-000001.tar is missing")


def test_a_truncated_tar(copied):
    path = copied / "train/shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(copied, "shard-000000.tar is truncated")


def test_a_flipped_bit(copied):
    path = copied / "train/shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(bytes(data))
    refuse(copied, "does not match its checksum")


def test_a_manifest_whose_checksum_is_wrong(copied):
    path = copied / "train/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    refuse(copied, "manifest.json does not match its own checksum")


def test_shards_of_an_older_version(copied):
    path = copied / "train/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    refuse(copied, "schema version 1, this program reads 2; prepare the data again")


def test_a_tokenizer_that_does_not_match_the_manifest(copied):
    path = copied / "train/tokenizer.json"
    path.write_text(path.read_text().replace("word", "ward", 1))
    refuse(copied, "does not match the manifest")


def test_another_sequence_length(copied):
    refuse(copied, "sequences of 16 tokens, data.sequence_length is 32", "data.sequence_length=32")


def test_a_position_of_other_data(shards):
    loader = Loader(recipe_for(shards), "train", 0, 1)
    for key, value in {"seed": 9, "samples_per_epoch": [3], "shuffle_shards": 1, "shuffle": False}.items():
        with pytest.raises(DataError, match=f"{key}={re.escape(str(value))}, this run has"):
            loader.load_state_dict({**loader.state_dict(), key: value})


def test_sources_in_another_order_and_other_shards_of_the_same_sizes_are_other_data(shards, copied):
    both = f"data.train=[{shards}/train,{shards}/validation]"
    state = Loader(recipe_for(shards, both), "train", 0, 1).state_dict()
    turned = Loader(recipe_for(shards, f"data.train=[{shards}/validation,{shards}/train]"), "train", 0, 1)
    with pytest.raises(DataError, match=r"made with the folders of data\.train in another order"):
        turned.load_state_dict(state)
    Loader(recipe_for(copied, f"data.train=[{copied}/train,{copied}/validation]"), "train", 0, 1).load_state_dict(state)
    rewrite(copied / "train", lambda rows: rows[::-1])
    other = Loader(recipe_for(copied, f"data.train=[{copied}/train,{copied}/validation]"), "train", 0, 1)
    with pytest.raises(DataError, match=f"made with other data than {copied}/train"):
        other.load_state_dict(state)
    del state["sources"]  # as in older checkpoints
    other.load_state_dict(state)


def rewrite(folder, change):
    """The folder's rows changed, and everything that is said of them right again."""
    from ebt_megatron.data.manifest import read_manifest
    from ebt_megatron.data.shards import shard_infos, write_shard

    data = ShardFolder(str(folder))
    rows = change(np.stack(list(data.rows())))
    manifest, begin = read_manifest(str(folder)), 0
    for number, shard in enumerate(manifest.shards):
        write_shard(folder, number, "text", rows[begin : begin + shard.samples])
        begin += shard.samples
    manifest.shards = shard_infos(folder, len(manifest.shards))
    manifest.write(folder)


def test_a_token_beyond_the_vocabulary_is_found_at_start(copied, monkeypatch):
    def change(rows):
        rows[-1, 3] = 5000
        return rows

    rewrite(copied / "train", change)
    said = "holds token 5000, outside the 400 entries"
    refuse(copied, said)
    from ebt_megatron.data import folder

    monkeypatch.setattr(folder, "VERIFY_BYTES", 0)  # a large folder
    refuse(copied, said)
    monkeypatch.setattr(folder, "SAMPLES_CHECKED", 1)  # one that is not looked at is found when it is read
    stream = iter(Loader(recipe_for(copied), "train", 0, 1))
    with pytest.raises(DataError, match=said):
        for _ in range(2000):
            next(stream)
    stream.close()


def test_a_weight_that_gives_no_sample_is_refused(shards):
    refuse(
        shards,
        "gives .*/validation 1e-09, which is not one sample in an epoch",
        f"data.train=[{shards}/train,{shards}/validation]",
        "data.train_weights=[1,1e-9]",
    )


def test_some_samples_of_everywhere_are_seen_again_and_again(shards):
    train, validation = (ShardFolder(f"{shards}/{split}") for split in ("train", "validation"))
    wanted = len(train) // 6 * 2  # whole micro-batches
    loader = Loader(recipe_for(shards, f"data.unique_samples={wanted}"), "train", 0, 1)
    seen = [row.numpy().tobytes() for _, samples in take(loader, wanted) for row in samples]  # two epochs
    rows = [np.asarray(row).astype(np.int64).tobytes() for row in train.rows()]
    assert sorted(seen[:wanted]) == sorted(seen[wanted:]) and seen[:wanted] != seen[wanted:]
    assert len(loader.blend) == wanted
    kept = loader.blend.sources[0].kept
    assert sorted(seen[:wanted]) == sorted(rows[i] for i in kept) and len(set(kept.tolist())) == wanted
    assert np.abs(np.quantile(kept / len(train), [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.15
    other = Loader(recipe_for(shards, f"data.unique_samples={wanted}", "training.seed=7"), "train", 0, 1)
    assert other.blend.sources[0].kept.tolist() != kept.tolist()
    few = Loader(recipe_for(shards, f"data.unique_samples={wanted}", "data.shuffle_shards=1"), "train", 0, 1)
    streamed = [row.numpy().tobytes() for _, samples in take(few, wanted // 2) for row in samples]
    assert sorted(streamed) == sorted(seen[:wanted])
    assert loader.most_repeated(3 * wanted)[0] == pytest.approx(3)
    both = f"data.train=[{shards}/train,{shards}/validation]"
    loader = Loader(
        recipe_for(shards, both, f"data.unique_samples={(len(train) + len(validation)) // 2}"), "train", 0, 1
    )
    assert loader.unique == pytest.approx([len(train) / 2, len(validation) / 2], abs=1)
    refuse(shards, "data.unique_samples=99999, and data.train has", "data.unique_samples=99999")


def test_the_source_that_is_repeated_most_is_named(shards):
    both = f"data.train=[{shards}/train,{shards}/validation]"
    loader = Loader(recipe_for(shards, both, "data.train_weights=[1,1]"), "train", 0, 1)
    turns, source = loader.most_repeated(len(loader.blend) * 2)
    small, all_samples = len(ShardFolder(f"{shards}/validation")), len(loader.blend)
    assert source.endswith("/validation") and turns == pytest.approx(all_samples / small, rel=0.01)


def test_validation_fills_the_last_micro_batches_with_samples_that_do_not_count(shards):
    for size in (1, 2, 4):
        batches = [
            list(Loader(recipe_for(shards, "training.validation_samples=5"), "validation", r, size))
            for r in range(size)
        ]
        assert len({len(b) for b in batches}) == 1 and all(len(b.samples) == 2 for rank in batches for b in rank)
        counted = [i for rank in batches for b in rank for i in (b.sample_ids[b.counts] - (1 << 50)).tolist()]
        assert sorted(counted) == [0, 1, 2, 3, 4]


def test_an_error_in_the_reading_thread_reaches_the_loop(shards):
    loader = Loader(recipe_for(shards), "train", 0, 1)
    loader.sources[0].gather = lambda indices, out: (_ for _ in ()).throw(DataError("gone"))
    with pytest.raises(DataError, match="gone"):
        next(iter(loader))
