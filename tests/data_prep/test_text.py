"""Text preparation: deterministic, exact, and clear about input it cannot use."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from typer.testing import CliRunner

from data_prep import text
from data_prep.documents import find_files, read_file, strip_html
from ebt_megatron.data import DataError, ShardFolder

runner = CliRunner()


def command(*arguments):
    import typer

    app = typer.Typer()
    app.command()(text.main)
    return runner.invoke(app, [str(a) for a in arguments])


def corpus(folder, count=60):
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(f"The number {i} and its square {i * i}. " * 8)
    return folder


def prepare(folder, output, *more):
    return command("--input", folder, "--output", output, "--train-bpe", 300, "--sequence-length", 8,
                   "--validation-fraction", 0.2, *more)  # fmt: skip


def test_the_same_input_and_seed_give_the_same_bytes(tmp_path):
    corpus(tmp_path)
    for name in ("a", "b"):
        assert prepare(tmp_path, tmp_path / name / "out").exit_code == 0
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_formats_and_compression(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.html").write_text("<p>Hello <b>there</b><script>no</script></p><p>again</p>")
    assert [list(read_file(p)) for p in find_files([str(tmp_path)])] == [
        ["line 0", "line 1", "line 2"], ["line 0", "line 1", "line 2"], ["line 0", "line 1", "line 2"],
        ["Hello there\nagain"],
    ]  # fmt: skip


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet", "body")) == ["one", "two"]


def test_exact_duplicates_are_dropped_and_splits_share_no_document():
    documents = [f"document {i % 50}" for i in range(200)]
    items = list(text.Corpus(lambda: iter(documents), 0.3, 0))
    assert len(items) == 50 == len({d for _, d in items})
    assert 5 < sum(split == "validation" for split, _ in items) < 25


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_round_trip_text_to_shards_to_text(tmp_path_factory, odd):
    folder = tmp_path_factory.mktemp("round")
    documents = [d for d in odd if not any("\ud800" <= c <= "\udfff" for c in d)] + ["some plain text " * 20]
    tokenizer = text.train_bpe(documents, 300)
    kept = [d for _, d in text.Corpus(lambda: iter(documents), 0.0, 0)]
    try:
        text.prepare(text.Corpus(lambda: iter(documents), 0.0, 0), tokenizer, folder, 4, 7, {})
    except DataError as error:
        assert "for validation" in str(error)  # nothing was held out, as asked
    rows = []
    for path in sorted((folder / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            rows += [r for m in tar for r in np.load(io.BytesIO(tar.extractfile(m).read()))]
    stream = [t for row in rows for t in row[:-1]] + list(rows[-1][-1:])
    texts = tokenizer.decode([int(t) for t in stream], skip_special_tokens=False)
    assert text.END_OF_TEXT.join([*kept, ""]).startswith(texts.rstrip("\ufffd"))


def test_invalid_utf8_becomes_replacement_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe text\r\nnext")
    assert list(read_file(tmp_path / "a.txt")) == ["good \ufffd\ufffd text\r\nnext"]


def test_a_given_tokenizer_is_kept_beside_the_shards(tmp_path):
    corpus(tmp_path)
    tokenizer = text.train_bpe(["The number and its square 0123456789. "], 280)
    tokenizer.save(str(tmp_path / "given.json"))
    result = command("--input", tmp_path / "*.txt", "--output", tmp_path / "out", "--tokenizer",
                     tmp_path / "given.json", "--sequence-length", 8, "--validation-fraction", 0.2)  # fmt: skip
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
        (["--train-bpe", 300], "either --input or --quickstart"),
        (["--input", "{here}", "--tokenizer", "{here}/empty.txt"], "not a tokenizer.json"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(tmp_path, arguments, said):
    (tmp_path / "empty.txt").write_text("")
    result = command(*(str(a).format(here=tmp_path) for a in arguments), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2"):
        list(read_file(tmp_path / "a.jsonl"))


def test_a_dry_run_writes_nothing(tmp_path):
    corpus(tmp_path)
    assert prepare(tmp_path, tmp_path / "out", "--dry-run").exit_code == 0
    assert not (tmp_path / "out").exists()


def test_prepared_data_is_not_overwritten_unasked(tmp_path):
    corpus(tmp_path)
    assert prepare(tmp_path, tmp_path / "out").exit_code == 0
    result = prepare(tmp_path, tmp_path / "out")
    assert result.exit_code == 2 and "already holds prepared data" in " ".join(result.output.split())


def test_html_keeps_visible_text_only():
    assert strip_html("<html><style>x</style><h1>Title</h1>one<br>two") == "Title\none\ntwo"
