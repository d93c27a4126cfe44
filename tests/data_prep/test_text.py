"""Text preparation: deterministic, exact, and clear about input it cannot use."""

import gzip
import json
import sys

import fsspec
import numpy as np
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data_prep import text, tokens
from ebt_megatron.data_prep.documents import SUFFIXES, Part, read_part, split_files, strip_html, unit_bytes_for
from ebt_megatron.data_prep.files import InputFile, find_files
from ebt_megatron.tools.rewrite import rewrite
from ebt_megatron.tools.shards import shard_problems
from tests.builders import text_shards
from tests.data_prep.media import invoke, prepare_text


def corpus(folder, count=60):
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(f"The number {i} and its square {i * i}. " * 8)
    return folder


def test_the_same_input_and_seed_give_the_same_bytes(tmp_path):
    corpus(tmp_path)
    for name in ("a", "b"):
        assert prepare_text(tmp_path, tmp_path / name / "out").exit_code == 0
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_formats_and_compression(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.html").write_text("<p>Hello <b>there</b><script>no</script></p><p>again</p>")
    assert [list(read_part(Part(f.path))) for f in find_files([str(tmp_path)], SUFFIXES).files] == [
        ["line 0", "line 1", "line 2"],
        ["line 0", "line 1", "line 2"],
        ["line 0", "line 1", "line 2"],
        ["Hello there\nagain"],
    ]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(read_part(Part(str(tmp_path / "a.parquet")), "body")) == ["one", "two"]


def kept(folder):
    """(samples, documents) by split of prepared text."""
    manifests = {split: read_manifest(str(folder / split)) for split in ("train", "validation")}
    return {split: (m.samples, m.provenance["documents"]) for split, m in manifests.items()}


def stream(folder):
    """The packed stream of a split, as its rows give it."""
    rows = list(ShardFolder(str(folder)).rows())
    return [t for row in rows for t in row[:-1].tolist()] + rows[-1][-1:].tolist()


def test_exact_duplicates_are_dropped_and_splits_share_no_document(tmp_path):
    documents = [f"the document number {i % 50} of fifty" for i in range(200)]
    shards = text_shards(tmp_path, documents, 4, 16, vocab=300, validation_fraction=0.3)
    train, validation = kept(shards)["train"][1], kept(shards)["validation"][1]
    assert train + validation == 50 and 5 < validation < 25


def test_the_order_of_documents_is_that_of_the_input(tmp_path):
    documents = [f"document {i} " * (i % 7 + 1) for i in range(300)]
    folder = text_shards(tmp_path, documents, 8, 16, vocab=300, validation_fraction=0.0) / "train"
    decoded = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(stream(folder), skip_special_tokens=False)
    assert tokens.END_OF_TEXT.join([*documents, ""]).startswith(decoded) and len(decoded) > 5000


@pytest.mark.parametrize("cut", [40, 1000, 10**6])
def test_where_the_input_is_cut_into_units_changes_nothing(tmp_path, cut):
    lines = [json.dumps({"text": f"document {i} " * (i % 5 + 1)}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:70]))  # without a newline at its end
    (tmp_path / "b.jsonl").write_text("\r\n".join(lines[70:]) + "\r\n\n")
    units = split_files(find_files([str(tmp_path)], SUFFIXES).files, cut)
    assert [d for unit in units for part in unit for d in read_part(part)] == [json.loads(x)["text"] for x in lines]


def test_small_inputs_have_pieces_for_every_worker_and_large_ones_not_too_many():
    def pieces(*sizes):
        files = [InputFile(f"{i}.txt", size, 0) for i, size in enumerate(sizes)]
        return len(split_files(files, unit_bytes_for(files)))

    assert pieces(*[300_000] * 40) > 30 and pieces(10_000) == 1
    assert pieces(*[10**8] * 100) == 100 and 32 <= pieces(*[10**4] * 2_000) <= 130
    grown = [InputFile("a.txt", size, 0) for size in (11_600_000, 11_700_000)]
    assert unit_bytes_for(grown[:1]) == unit_bytes_for(grown[1:])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=60), max_size=12))
def test_round_trip_text_to_shards_to_text(tmp_path_factory, odd):
    documents = [*odd, "some plain text " * 20]
    folder = text_shards(tmp_path_factory.mktemp("round"), documents, 4, 7, vocab=300, validation_fraction=0.0)
    tokenizer = Tokenizer.from_file(str(folder / "train/tokenizer.json"))
    texts = tokenizer.decode(stream(folder / "train"), skip_special_tokens=False)
    distinct = [d for d in dict.fromkeys(documents) if d.strip()]
    assert tokens.END_OF_TEXT.join([*distinct, ""]).startswith(texts.rstrip("\ufffd"))
    assert len(stream(folder / "train")) > 4


def test_a_huge_document_spans_shards(tmp_path):
    document = " ".join(f"number {i}" for i in range(20_000))
    folder = text_shards(tmp_path, [document], 16, 256, vocab=300, validation_fraction=0.0) / "train"
    assert len(read_manifest(str(folder)).shards) > 10
    decoded = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(stream(folder), skip_special_tokens=False)
    assert document.startswith(decoded[: len(document) - 100])


@pytest.mark.parametrize("scheme", ["s3", "hf"])
def test_urls_are_read(scheme, tmp_path, monkeypatch):
    class StandIn(MemoryFileSystem):
        protocol, store, pseudo_dirs = scheme, {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace(f"{scheme}://", "/"))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, StandIn)
    system = fsspec.filesystem(scheme)
    for i in range(40):
        system.pipe(f"/corpus/{i:02d}.txt", f"The number {i} and its square {i * i}. ".encode() * 8)
        (tmp_path / f"{i:02d}.txt").write_text(f"The number {i} and its square {i * i}. " * 8)
    assert prepare_text(f"{scheme}://corpus/*.txt", tmp_path / "a").exit_code == 0
    assert prepare_text(tmp_path, tmp_path / "b").exit_code == 0
    assert (tmp_path / "a/train/shard-000000.tar").read_bytes() == (tmp_path / "b/train/shard-000000.tar").read_bytes()


def test_a_scheme_whose_package_is_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    done = prepare_text("s3://bucket/corpus", tmp_path / "out")
    assert done.exit_code == 2 and "[remote]" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline machine whose hub cache has the tokenizer some/model."""
    from huggingface_hub import constants

    tokenizer = tokens.train_bpe(iter(["some words of a corpus " * 9]), 300)
    model, commit = tmp_path / "hub" / "models--some--model", "0123456789" * 4
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    tokenizer.save(str(model / "snapshots" / commit / "tokenizer.json"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return model / "snapshots" / commit / "tokenizer.json"


def test_a_tokenizer_by_its_hub_name_is_that_of_its_file(hub, tmp_path):
    (tmp_path / "raw").mkdir()
    corpus(tmp_path / "raw")
    shards = []
    for name, tokenizer in (("a", "some/model"), ("b", hub)):
        done = invoke(
            text.main,
            "--input",
            tmp_path / "raw",
            "--output",
            tmp_path / name,
            "--tokenizer",
            tokenizer,
            "--sequence-length",
            8,
            "--validation-fraction",
            0,
        )
        assert done.exit_code == 0, done.output
        shards.append((tmp_path / name / "train/shard-000000.tar").read_bytes())
    assert shards[0] == shards[1]


def test_a_tokenizer_that_is_neither_a_file_nor_on_the_hub_is_one_line(hub, tmp_path):
    corpus(tmp_path)
    for name in ("other/model", "tokeniser.json", "not a name"):
        done = invoke(text.main, "--input", tmp_path, "--output", tmp_path / "out", "--tokenizer", name)
        assert done.exit_code == 2 and done.stderr.count("error:") == 1, done.output
        message = done.stderr[done.stderr.index("error:") :]
        assert f"--tokenizer {name} is no file here" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_invalid_utf8_becomes_replacement_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe text\r\nnext")
    assert list(read_part(Part(str(tmp_path / "a.txt")))) == ["good \ufffd\ufffd text\r\nnext"]


def test_a_given_tokenizer_is_kept_beside_the_shards(tmp_path):
    corpus(tmp_path)
    tokenizer = tokens.train_bpe(["The number and its square 0123456789. "], 280)
    tokenizer.save(str(tmp_path / "given.json"))
    result = invoke(
        text.main,
        "--input",
        tmp_path / "*.txt",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tmp_path / "given.json",
        "--sequence-length",
        8,
        "--validation-fraction",
        0.2,
    )
    assert result.exit_code == 0, result.output
    kept = Tokenizer.from_file(str(tmp_path / "out/train/tokenizer.json"))
    assert kept.get_vocab() == tokenizer.get_vocab()
    assert len(ShardFolder(str(tmp_path / "out/train"))) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "{here}/nothing-*", "--train-bpe", 300], "matches no file"),
        (["--input", "{here}", "--train-bpe", 300], "every document is empty"),
        (["--input", "{here}"], "either --tokenizer FILE or --train-bpe"),
        (["--input", "{here}", "--tokenizer", "{here}/empty.txt"], "not a tokenizer.json"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(tmp_path, arguments, said):
    for name in ("empty.txt", "blank.txt"):
        (tmp_path / name).write_text("")
    result = invoke(text.main, *(str(a).format(here=tmp_path) for a in arguments), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2"):
        list(read_part(Part(str(tmp_path / "a.jsonl"))))


def test_a_dry_run_writes_nothing(tmp_path):
    corpus(tmp_path)
    assert prepare_text(tmp_path, tmp_path / "out", "--dry-run").exit_code == 0
    assert not (tmp_path / "out").exists()


def test_prepared_data_is_not_overwritten_unasked(tmp_path):
    corpus(tmp_path)
    assert prepare_text(tmp_path, tmp_path / "out").exit_code == 0
    result = prepare_text(tmp_path, tmp_path / "out")
    assert result.exit_code == 2 and "already holds prepared data" in " ".join(result.output.split())
    assert prepare_text(tmp_path, tmp_path / "out", "--resume").exit_code == 0  # this very job: nothing to do
    result = prepare_text(tmp_path, tmp_path / "out", "--resume", "--seed", 3)
    assert result.exit_code == 2 and "made with other options" in " ".join(result.output.split())


def test_html_keeps_visible_text_only():
    assert strip_html("<html><style>x</style><h1>Title</h1>one<br>two") == "Title\none\ntwo"


def test_answers_are_marked_beside_the_tokens(tmp_path):
    """Of every document what follows the first mark, and its end; a document without a mark has no answer."""
    mark, documents = (
        "[[Answer]]: ",
        [f"What is {i} plus {i}? [[Answer]]: It is {2 * i}, [[Answer]]: ß." for i in range(9)],
    )
    lines = [json.dumps({"text": d}) + "\n" for d in [*documents, "No question, no answer."]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    options = ("--answers-after", mark, "--sequence-length", 7, "--samples-per-shard", 10, "--validation-fraction", 0)
    done = prepare_text(tmp_path / "a.jsonl", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    rewrite([str(tmp_path / "out/train")], tmp_path / "again", 7, overwrite=False)
    for folder in (tmp_path / "out/train", tmp_path / "again"):
        shards = ShardFolder(str(folder))
        assert not [p for s in shards.manifest.shards for p in shard_problems(folder, s, shards.manifest)]
        rows, marks = np.stack(list(shards.rows())), shards.gather_beside("answers", np.arange(len(shards)))
        flat, answers = rows[:, :-1].ravel(), marks[:, :-1].ravel().astype(bool)
        assert (rows[1:, 0] == rows[:-1, -1]).all() and (marks[1:, 0] == marks[:-1, -1]).all()
        tokenizer = Tokenizer.from_file(str(shards.sidecar()))
        said = tokenizer.decode(flat[answers].tolist(), skip_special_tokens=False).split(tokens.END_OF_TEXT)
        assert len(said) > 5
        for document, answer in zip(
            documents, said[:-1], strict=False
        ):  # a token that holds both, " It", is the answer's
            assert answer == " " + document.partition(mark)[2]
    made = read_manifest(str(tmp_path / "out/train"))
    assert made.facts == {"answers_after": mark} and f"answers: {made.provenance['answers']:,} tokens" in done.output
    done = prepare_text(tmp_path / "a.jsonl", tmp_path / "other", "--answers-after", "none such")
    assert done.exit_code == 2 and "no document holds 'none such'" in done.output
