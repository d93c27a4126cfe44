"""Preparations that go wrong keep what they made, delete nothing that is not theirs, and say so in one line."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data_prep import images, text, text_passes, tokens
from ebt_megatron.data_prep.passes import threshold
from tests.data_prep.media import contents, invoke, prepare_pictures, prepare_text, said
from tests.data_prep.test_images import pictures, save

PIL = pytest.importorskip("PIL.Image")


def corpus(folder, files=4, documents=8):
    folder.mkdir()
    for f in range(files):
        texts = [f"file {f} has a document {d} " * (d + 3) for d in range(documents)]
        (folder / f"{f}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def prepare(source, output, *more):
    return prepare_text(source, output, "--unit-megabytes", 0.0001, *more)


def shards(output):
    return {k: v for k, v in contents(output).items() if k != "job.json"}


def counted(monkeypatch, where, name):
    """How often a reader was called for each file, from now on."""
    calls, reader = Counter(), getattr(where, name)

    def counting(first, *more):
        calls[Path(first.path if hasattr(first, "path") else first).name] += 1
        return reader(first, *more)

    monkeypatch.setattr(where, name, counting)
    return calls


@pytest.mark.parametrize("more", [[], ["--skip-broken"]])
def test_a_bad_line_costs_only_its_own_file(tmp_path, monkeypatch, more):
    raw = corpus(tmp_path / "raw")
    assert prepare(raw, tmp_path / "good").exit_code == 0
    whole = (raw / "3.jsonl").read_text()
    (raw / "3.jsonl").write_text(whole + "{broken\n")
    result = prepare(raw, tmp_path / "out")
    assert result.exit_code == 2 and "3.jsonl, line 9" in said(result)
    assert "--resume" in said(prepare(raw, tmp_path / "out"))
    if not more:
        (raw / "3.jsonl").write_text(whole)
    read = counted(monkeypatch, text_passes, "read_part")
    assert prepare(raw, tmp_path / "out", "--resume", *more).exit_code == 0
    parts = -(-(raw / "0.jsonl").stat().st_size // 100)
    assert read["0.jsonl"] == 2 * parts  # to train the tokenizer and to encode, no more to look for duplicates
    train = [{k: v for k, v in shards(tmp_path / o).items() if k.endswith("tar")} for o in ("good", "out")]
    assert train[0] == train[1]
    if not more:  # and once complete, another file at the path is other input
        os.utime(raw / "3.jsonl", (1, 1))
        assert "of other input" in said(prepare(raw, tmp_path / "out", "--resume"))


def test_a_bad_picture_costs_only_its_own_piece_of_work(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_UNIT", 4)
    for i, picture in enumerate(pictures(16)):
        save(tmp_path / "raw", f"{i:02d}.png", picture)
    assert prepare_pictures(tmp_path / "raw", tmp_path / "good").exit_code == 0
    whole = (tmp_path / "raw/15.png").read_bytes()
    (tmp_path / "raw/15.png").write_bytes(whole[:99])
    assert prepare_pictures(tmp_path / "raw", tmp_path / "out").exit_code == 2
    (tmp_path / "raw/15.png").write_bytes(whole)
    read = counted(monkeypatch, images, "content_of")
    assert prepare_pictures(tmp_path / "raw", tmp_path / "out", "--resume").exit_code == 0
    assert read["15.png"] and not read["09.png"]  # a few of the first are looked at for the split
    assert shards(tmp_path / "out") == shards(tmp_path / "good")


def test_shards_of_no_known_job_are_not_taken_over(tmp_path):
    raw, other = corpus(tmp_path / "raw"), corpus(tmp_path / "other", files=6)
    assert prepare(other, tmp_path / "out", "--samples-per-shard", 16).exit_code == 0
    (tmp_path / "out/job.json").unlink()
    (tmp_path / "out/train/manifest.json").unlink()
    before = contents(tmp_path / "out")
    for more in ([], ["--resume"]):
        assert "not known" in said(prepare(raw, tmp_path / "out", "--samples-per-shard", 16, *more))
    assert contents(tmp_path / "out") == before
    assert prepare(raw, tmp_path / "out", "--samples-per-shard", 16, "--overwrite").exit_code == 0
    assert prepare(raw, tmp_path / "new", "--samples-per-shard", 16).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_old_shards_stay_until_there_are_new_ones_and_other_files_for_ever(tmp_path):
    raw = corpus(tmp_path / "raw")
    assert prepare(raw, tmp_path / "out").exit_code == 0
    (tmp_path / "out/train/notes.md").write_text("mine")
    before = contents(tmp_path / "out/train")
    (raw / "3.jsonl").write_text("{broken\n")
    assert prepare(raw, tmp_path / "out", "--overwrite").exit_code == 2
    assert contents(tmp_path / "out/train") == before
    (raw / "3.jsonl").unlink()
    assert prepare(raw, tmp_path / "out", "--overwrite").exit_code == 0
    assert (tmp_path / "out/train/notes.md").read_text() == "mine" and contents(tmp_path / "out/train") != before


def test_files_of_others_stay_and_what_killed_processes_left_goes(tmp_path, monkeypatch):
    def left_while_writing(passes, item):
        (passes.work.output / "train" / "shard-000009.tar.12.partial").write_text("")
        write(passes, item)

    write = text_passes.TokenShards.write
    monkeypatch.setattr(text_passes.TokenShards, "write", left_while_writing)
    raw, out = corpus(tmp_path / "raw"), tmp_path / "out"
    mine = ["train/notes.partial", "validation/shard-of-mine.tar", "train/manifest.partial", "models/weights.partial"]
    ours = [
        "train/shard-000007.tar.12.partial",
        "train/tokenizer.json.12.partial",
        "validation/manifest.json.partial",
        "job.json.12.partial",
        "skipped.txt.12.partial",
    ]
    good = (raw / "3.jsonl").read_text()
    (raw / "3.jsonl").write_text("{broken")
    assert prepare(raw, out).exit_code == 2
    (raw / "3.jsonl").write_text(good)
    for more in ("--resume", "--overwrite"):
        for name in (*mine, *ours):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(name)
        assert prepare(raw, out, more).exit_code == 0
        assert all((out / name).read_text() == name for name in mine)
        assert not any((out / name).exists() for name in (*ours, "train/shard-000009.tar.12.partial"))
    (out / ".work").mkdir()
    (out / ".work/plan.txt").write_text("mine")
    before = contents(out)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert ".work/plan.txt is not of a preparation" in said(prepare(raw, out, *more))
    assert contents(out) == before


def test_input_in_a_folder_that_is_written_is_not_removed(tmp_path):
    (tmp_path / "out").mkdir()
    raw = corpus(tmp_path / "out/train")
    before = contents(raw)
    result = prepare(raw, tmp_path / "out", "--overwrite")
    assert result.exit_code == 2 and "in a folder that is written" in said(result) and contents(raw) == before


def test_two_preparations_do_not_write_one_folder(tmp_path):
    from filelock import FileLock

    raw = corpus(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        assert "another process writes" in said(prepare(raw, tmp_path / "out"))
    assert prepare(raw, tmp_path / "out").exit_code == 0


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    raw = corpus(tmp_path / "raw")
    (tmp_path / "file").write_text("")
    result = prepare(raw, tmp_path / "file/[/odd] out")  # which markup would take for its own
    assert result.exit_code == 2 and "[/odd] out" in said(result) and "Traceback" not in result.output
    result = prepare(raw / "[/b]*.nothing", tmp_path / "out")
    assert result.exit_code == 2 and "[/b]*.nothing matches no file" in said(result)
    assert prepare(raw, tmp_path / "out", "--seed", -1).exit_code == 2


# --- splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.5])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_both_splits_get_a_picture_where_there_are_two(tmp_path, count, fraction, seed):
    for i, picture in enumerate(pictures(count)):
        save(tmp_path / "raw", f"{i}.png", picture)
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--validation-fraction", fraction, "--seed", seed)
    assert result.exit_code == 0, result.output
    samples = [len(ShardFolder(str(tmp_path / "out" / s))) for s in ("train", "validation")]
    assert sum(samples) == count and min(samples) >= 1


def test_broken_pictures_leave_something_for_both_splits(tmp_path):
    for i, picture in enumerate(pictures(4)):
        save(tmp_path / "raw", f"{i}.png", picture)
    for i in (0, 1):
        (tmp_path / f"raw/{i}.png").write_bytes((tmp_path / f"raw/{i}.png").read_bytes()[:99])
    for seed in range(6):
        result = prepare_pictures(tmp_path / "raw", tmp_path / str(seed), "--skip-broken", "--seed", seed)
        assert result.exit_code == 0, result.output
        assert [len(ShardFolder(str(tmp_path / str(seed) / s))) for s in ("train", "validation")] == [1, 1]


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_both_splits_get_a_document_where_there_are_two(tmp_path, fraction):
    raw = corpus(tmp_path / "raw", files=1, documents=2)
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        assert prepare(raw, out, "--seed", seed, "--validation-fraction", fraction).exit_code == 0
        assert [read_manifest(str(out / s)).provenance["documents"] for s in ("train", "validation")] == [1, 1]


def test_what_cannot_be_split_is_said_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_passes.Documents, "hash", None)
    (tmp_path / "a.txt").write_text("one long text " * 99)
    assert "one document, which cannot be split" in said(prepare(tmp_path / "a.txt", tmp_path / "out"))
    save(tmp_path / "raw", "a.png", pictures(1)[0])
    assert "one picture, which cannot be split" in said(prepare_pictures(tmp_path / "raw", tmp_path / "out"))
    assert threshold(np.array([0.3, 0.6]), 0.4, "") == 0.4  # as it is, where both get something


# --- tokenizers and pictures -------------------------------------------------------------------------


def tokenizer_file(folder, change):
    """A byte-level BPE; `change` does something to what its file says."""
    path = folder / "tokenizer.json"
    tokens.train_bpe(["some words and other words of a text " * 3], 290).save(str(path))
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def encoded(path, *documents):
    tokenizer = tokens.load_tokenizer(path)
    return tokenizer, [t.tolist() for t in tokens.encode(tokenizer, documents)]


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path):
    long, (plain,) = "some words and other words " * 9, encoded(tokenizer_file(tmp_path, lambda raw: None), "a text")[1]
    limits = {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    }
    (tmp_path / "limits").mkdir()
    tokenizer, found = encoded(tokenizer_file(tmp_path / "limits", lambda raw: raw.update(limits)), "a text", long)
    assert found[0] == plain and tokenizer.decode(found[1][:-1]) == long


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_spelled_in_a_text_are_text(tmp_path, special):
    path = tokenizer_file(tmp_path, lambda raw: raw["added_tokens"][0].update(special=special))
    tokenizer, (found,) = encoded(path, "a<|endoftext|>b")
    assert found.count(0) == 1 and found[-1] == 0
    assert tokenizer.decode(found[:-1], skip_special_tokens=False) == "a<|endoftext|>b"


def test_ids_beyond_the_number_of_tokens_are_counted(tmp_path):
    """A vocabulary with ids left out, one of them above 65,535: the manifest and the shards know it."""
    raw = corpus(tmp_path / "raw")
    path = tokenizer_file(tmp_path, lambda raw: raw["model"]["vocab"].update({"Ġdocument": 70_000, "Ġdoc": 69_000}))
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(" document", normalized=False)])
    tokenizer.save(str(path))
    result = invoke(
        text.main, "--input", raw, "--output", tmp_path / "out", "--tokenizer", path, "--sequence-length", 8
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(str(tmp_path / "out/train"))
    rows = np.stack(list(ShardFolder(str(tmp_path / "out/train")).rows()))
    assert manifest.dtype == "uint32" and manifest.vocab_size == max(tokenizer.get_vocab().values()) + 1 > rows.max()


def test_a_tokenizer_that_cannot_encode_is_one_line(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, tokens.END_OF_TEXT: 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match="cannot encode the text"):
        encoded(tmp_path / "words.json", "a b")


def splitters():
    byte, plain = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "byte level": (byte, None),
        "with a space": (plain, None),
        "fixed": (pre_tokenizers.FixedLength(5), None),
        "metaspace": (pre_tokenizers.Metaspace(), None),
        "prepend": (byte, normalizers.Prepend("_")),
        "strip": (byte, normalizers.Strip()),
        "none": (None, normalizers.NFC()),
    }


@pytest.mark.parametrize("kind", splitters())
def test_a_long_document_has_the_tokens_it_has_as_a_whole(monkeypatch, kind):
    monkeypatch.setattr(tokens, "_PIECE", 3000)
    generator = np.random.default_rng(0)
    words = ["a", "word", "Straße", "数据", "don't", "1234567", "--", " ", "\n\n", "   ", "e\u0301", "=" * 300]
    document = "".join(words[i] + " " * (i % 2) for i in generator.integers(0, len(words), 4000))
    tokenizer = tokens.train_bpe([document], 400)
    tokenizer.pre_tokenizer, tokenizer.normalizer = splitters()[kind]
    tokenizer.encode_special_tokens = True
    whole = [*tokenizer.encode(document, add_special_tokens=False).ids, 0]
    monkeypatch.setattr(tokens, "_BATCH", 1)
    found = next(tokens.encode(tokenizer, [document])).tolist()
    assert found == whole
    pieces = list(tokens._pieces(document, lambda t: tokenizer.encode(t, add_special_tokens=False).ids))
    assert len(pieces) > 5 if kind in ("byte level", "with a space", "metaspace") else "".join(pieces) == document


def test_a_tokenizer_is_trained_on_pieces_as_on_the_whole(monkeypatch):
    documents = [f"the number {i} and its square {i * i}, " * 40 for i in range(9)]
    whole = tokens.train_bpe(documents, 350).to_str()
    monkeypatch.setattr(tokens, "_PIECE", 700)
    assert tokens.train_bpe(documents, 350).to_str() == whole


def test_a_long_document_takes_bounded_memory(tmp_path):
    """Of 2.5 MB as a whole, tokens and their strings and places take more than 300 MB."""
    program = (
        "import resource; from data_prep import tokens\n"
        "tokenizer = tokens.train_bpe(['some words of a text '], 270)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); n = sum(map(len, tokens.encode(tokenizer, ['some words of a text ' * 120_000])))\n"
        "print(n, (peak() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd())
    count, megabytes = map(int, done.stdout.split())
    assert count > 120_000 and megabytes < 200


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_pictures_of_16_bits_are_scaled(tmp_path, name):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    (tmp_path / "raw").mkdir()
    PIL.fromarray(ramp).save(tmp_path / "raw" / name)
    source = images.PictureSource(16, 16)
    ((sample, _),) = [
        s for p in source.read(images.find_files([str(tmp_path / "raw" / name)], ()).files) for s in p.samples
    ]
    assert np.abs(sample[0, ..., 0] - ramp / 257).max() <= 0.51 and (sample[0, ..., 0] == sample[0, ..., 2]).all()


def test_pictures_of_32_bits_are_refused(tmp_path):
    save(tmp_path / "raw", "a.tif", np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    result = prepare_pictures(tmp_path / "raw", tmp_path / "out", "--validation-fraction", 0)
    assert result.exit_code == 2 and "a.tif cannot be decoded (its values have 32 bits" in said(result)


# --- what a tokenizer does not know, and characters that are no fault ----------------------------------


def small_tokenizer(path, model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tokens.END_OF_TEXT])
    tokenizer.save(str(path))
    return path


def with_tokenizer(raw, output, path, *more):
    given = ("--input", raw, "--output", output, "--tokenizer", path, "--sequence-length", 4)
    return invoke(text.main, *given, "--validation-fraction", 0, *more)


@pytest.mark.parametrize("kind", ["its unknown token", "nothing"])
def test_a_tokenizer_that_knows_next_to_nothing_is_refused_and_counted_where_it_is_allowed(tmp_path, kind):
    """Six words and [UNK]; or letters of which those that are none are left out without a word."""
    words = ["the", "a", "of", "file", "has", "document"]
    model = models.WordLevel({w: i for i, w in enumerate([*words, "[UNK]"])}, unk_token="[UNK]")
    if kind == "nothing":
        model = models.BPE({c: i for i, c in enumerate("abcdefghij0123456789")}, [])
    path = small_tokenizer(tmp_path / "words.json", model)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text("a file has words that nobody knows " * 9)
    result = with_tokenizer(tmp_path / "raw", tmp_path / "out", path)
    assert result.exit_code == 2 and "has no token for" in said(result) and "--most-unknown" in said(result)
    result = with_tokenizer(tmp_path / "raw", tmp_path / "out", path, "--most-unknown", 0.7, "--resume")
    assert result.exit_code == 0, result.output
    made = read_manifest(str(tmp_path / "out/train")).provenance
    assert made["unknown"] == 9 * (4 if kind == "its unknown token" else 17) and "unknown to the tokenizer" in said(
        result
    )


def test_one_unknown_character_is_the_unknown_token_and_counted(tmp_path):
    path = small_tokenizer(tmp_path / "a.json", models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], 0, False))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text("ab" * 40 + "\u00df" + "ba" * 40)
    result = with_tokenizer(tmp_path / "raw", tmp_path / "out", path)
    assert result.exit_code == 0, result.output
    assert read_manifest(str(tmp_path / "out/train")).provenance["unknown"] == 1


@pytest.mark.parametrize("end", [".txt", ".html", ".txt.gz"])
def test_a_byte_order_mark_is_none_of_a_document(tmp_path, end):
    import gzip

    from ebt_megatron.data_prep.documents import Part, read_part

    for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf")):
        data = mark + "one text, \ufeff and more".encode()
        (tmp_path / f"{name}{end}").write_bytes(gzip.compress(data) if end.endswith("gz") else data)
    one, other = (list(read_part(Part(str(tmp_path / f"{name}{end}")))) for name in "ab")
    assert one == other == ["one text, \ufeff and more"]


def test_a_replacement_character_that_is_in_a_file_is_no_fault(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.log").write_text("\ufffd\ufffd\ufffd a" * 40)
    done = prepare(tmp_path / "raw/a.log", tmp_path / "out", "--validation-fraction", 0)
    assert done.exit_code == 0, done.output
    assert read_manifest(str(tmp_path / "out/train")).provenance["replaced"] == 0
    (tmp_path / "raw/b.log").write_bytes(b"\xff\xfe\xfd a \x80\x81" * 40)
    assert "b.log is no text in UTF-8" in said(prepare(tmp_path / "raw/b.log", tmp_path / "other"))


# --- links, names and disks ---------------------------------------------------------------------------


def test_a_pattern_does_not_go_round_in_links(tmp_path, monkeypatch):
    """As a folder: `lp/**/*.jsonl`, with a link to itself and one to its parent, matches each file once."""
    from ebt_megatron.data_prep.files import find_files

    raw = corpus(tmp_path / "lp", files=1)
    (raw / "deep/er").mkdir(parents=True)
    (raw / "deep/er/1.jsonl").write_text("{}")
    (raw / ".hidden").mkdir()
    (raw / ".hidden/2.jsonl").write_text("{}")
    for name, to in (("self", raw), ("up", tmp_path), ("deep/loop", raw / "deep"), ("gone", tmp_path / "nowhere")):
        (raw / name).symlink_to(to)
    names = [str(raw / n) for n in ("0.jsonl", "deep/er/1.jsonl")]
    for pattern in ("**/*.jsonl", "**/**/*.jsonl", "**/?.jsonl"):
        found = {os.path.realpath(f.path) for f in find_files([str(raw / pattern)], (".jsonl",)).files}
        assert found == set(names), pattern
    assert [f.path for f in find_files([f"{raw}/**/*.jsonl"], (".jsonl",)).files] == names
    assert [f.path for f in find_files([f"{raw}/**"], (".jsonl",)).files] == names
    monkeypatch.chdir(tmp_path)
    assert [f.path for f in find_files(["lp/de*/er/[0-1].jsonl"], (".jsonl",)).files] == ["lp/deep/er/1.jsonl"]
    with pytest.raises(DataError, match="matches no file"):
        find_files([f"{raw}/**/*.hidden.jsonl"], (".jsonl",))
