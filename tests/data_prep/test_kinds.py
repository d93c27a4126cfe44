"""The same documents in any kind of file are the same documents, or one line names the file; nothing is lost."""

import gzip
import io
import itertools
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data_prep.documents import SUFFIXES, Part, Tally, check_kinds, read_part, split_files, strip_html
from ebt_megatron.data_prep.files import find_files
from tests.data_prep.media import prepare_text, said

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
DOCUMENTS = [f"document {i}: " + "some words and others, " * (i % 5 + 3) for i in range(40)]


def lines(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()


def parquet(documents):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), buffer)
    return buffer.getvalue()


CONTENT = {".jsonl": lines, ".ndjson": lines, ".json": lines, ".parquet": parquet, ".txt": lambda d: d[0].encode()}
PACK = {".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}


@st.composite
def files(draw):
    """A kind of file, how it is packed and spelled, and what happened to it: (suffix, packing, bytes of documents)."""
    suffix, packing = draw(st.sampled_from(sorted(CONTENT))), draw(st.sampled_from(sorted(PACK)))
    damage = draw(st.sampled_from(["none", "none", "cut", "trailing"])) if packing else "none"
    cuts = sorted(draw(st.lists(st.floats(0, 1), max_size=3)))
    name = "".join(draw(st.sampled_from([c.lower(), c.upper()])) for c in suffix + packing)

    def content(documents):
        data = CONTENT[suffix](documents)
        ends = [0, *(int(c * len(data)) for c in cuts), len(data)]
        frames = [PACK[packing](data[b:e]) for b, e in itertools.pairwise(ends)]
        packed = b"".join(frames)
        lost = min(1 + len(packed) // 9, len(frames[-1]) - 1)  # not a whole frame: that nobody could notice
        return {"none": packed, "cut": packed[: len(packed) - lost], "trailing": packed + b"junk"}[damage]

    return name, content, damage == "none"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files(), st.sampled_from([50, 700, 10**6]))
def test_any_kind_of_file_gives_its_documents_or_is_named(tmp_path_factory, kind, unit_bytes):
    name, content, whole = kind
    documents = DOCUMENTS[:1] if name.lower().startswith(".txt") else DOCUMENTS
    path = tmp_path_factory.mktemp("kind") / f"a{name}"
    path.write_bytes(content(documents))
    units = split_files(find_files([str(path)], SUFFIXES).files, unit_bytes)
    try:
        assert [d for unit in units for part in unit for d in read_part(part)] == documents and whole
    except DataError as error:
        assert not whole and str(path) in str(error) and "\n" not in str(error)


def tokens(folder):
    rows = [row.tolist() for split in ("train", "validation") for row in ShardFolder(str(folder / split)).rows()]
    return rows, [read_manifest(str(folder / s)).provenance["documents"] for s in ("train", "validation")]


def prepare(source, output, *more):
    return prepare_text(source, output, "--unit-megabytes", 0.001, *more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "a.jsonl").write_bytes(lines(DOCUMENTS))
    assert prepare(folder / "a.jsonl", folder / "out").exit_code == 0
    return tokens(folder / "out")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(files(), min_size=1, max_size=3))
def test_any_kinds_of_files_together_give_the_same_tokens(tmp_path_factory, plain, kinds):
    check_tokens(tmp_path_factory.mktemp("kinds"), plain, kinds, 1)


EVERY = [
    (suffix + packing, lambda d, s=suffix, p=packing: PACK[p](CONTENT[s](d)), True)
    for suffix, packing in zip(sorted(CONTENT), [".gz", "", ".zst", ".gz", ".zst"], strict=True)
]
CUT = (".jsonl.zst", lambda d: zstandard.compress(lines(d))[:-9], False)


@pytest.mark.parametrize(("workers", "kinds"), [pytest.param(4, EVERY, marks=pytest.mark.slow), (2, [*EVERY, CUT])])
def test_and_so_they_do_with_workers(tmp_path, plain, workers, kinds):
    check_tokens(tmp_path, plain, kinds, workers)


def check_tokens(folder, plain, kinds, workers):
    """The documents dealt over files of these kinds, in order: those of text hold one each."""
    rest, damaged = list(DOCUMENTS), []
    (folder / "raw").mkdir()
    for number, (name, content, whole) in enumerate([*kinds, (".jsonl", lines, True)]):
        count = len(rest) if number == len(kinds) else 1 if name.lower().startswith(".txt") else 5
        path = folder / "raw" / f"{number}{name}"
        path.write_bytes(content(rest[:count]))
        damaged += [] if whole else [str(path)]
        del rest[:count]
    result = prepare(folder / "raw" / "*", folder / "out", "--workers", workers)
    if damaged:
        assert result.exit_code == 2 and any(path in said(result) for path in damaged), result.output
        assert "Traceback" not in result.output and not (folder / "out/train/manifest.json").exists()
    else:
        assert result.exit_code == 0, result.output
        assert tokens(folder / "out") == plain


@pytest.mark.parametrize("suffix", [".json.gz", ".JSONL.ZST", ".NdJson", ".PARQUET", ".TXT"])
def test_folders_are_searched_for_suffixes_in_any_letters(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    (tmp_path / "tokenizer.json").write_text("{}")  # what lies beside data
    assert [f.path for f in find_files([str(tmp_path)], SUFFIXES).files] == [str(tmp_path / f"a{suffix}")]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(b"text " * 99, mtime=0),
        b"PK\3\4\x14\0\0\0\x08\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        "UTF-16".encode("utf-16"),
    ],
)
def test_what_is_no_text_is_refused_before_work_starts(tmp_path, content):
    (tmp_path / "a.txt").write_text("some text " * 9)
    (tmp_path / "b.bin").write_bytes(content)
    result = prepare(tmp_path / "*", tmp_path / "out")
    assert result.exit_code == 2 and f"{tmp_path}/b.bin is no text in UTF-8" in said(result)
    assert "reading" not in result.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl.gz", "b.html.zst", "b.ndjson"])
def test_text_in_another_encoding_is_refused_before_work_starts(tmp_path, name, encoding):
    (tmp_path / "a.txt").write_text("some text " * 9)
    pack = PACK.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack('{"text": "some text"}\n'.encode(encoding)))
    result = prepare(tmp_path, tmp_path / "out")
    assert result.exit_code == 2 and f"{tmp_path}/{name} is no text in UTF-8" in said(result)
    assert "reading" not in result.output and not (tmp_path / "out").exists()


def test_the_mark_of_utf_16_is_enough(tmp_path):
    (tmp_path / "b.txt").write_bytes("数据".encode("utf-16"))  # no zero byte in it
    with pytest.raises(DataError, match="is no text in UTF-8"):
        check_kinds(find_files([str(tmp_path)], SUFFIXES).files)


def test_what_is_no_parquet_is_refused_before_work_starts(tmp_path):
    (tmp_path / "b.parquet").write_bytes(lines(DOCUMENTS))
    with pytest.raises(DataError, match=r"b.parquet is no Parquet file"):
        check_kinds(find_files([str(tmp_path)], SUFFIXES).files)


def test_files_of_folders_that_are_not_read_are_counted_by_suffix(tmp_path):
    for name in ("a.txt", "b.csv", "c.CSV", "deep/d.jsonl.xz", "deep/e.csv.gz", "README", "mine.csv"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_text(f"{name} has some words of text " * 20)
    (tmp_path / "raw/f.txt").symlink_to("nowhere")
    result = prepare(tmp_path / "raw", tmp_path / "out", "--input", tmp_path / "raw/mine.csv")
    assert result.exit_code == 0, result.output
    assert "reading 2 files" in said(result)
    left_out = "not read are 2 .csv, 1 .csv.gz, 1 .xz, 1 broken links, 1 without a suffix: folders are searched for"
    assert said(result).count(left_out) == 1
    (tmp_path / "raw/a.txt").unlink()
    assert "matches no file (there are 3 .csv," in said(prepare(tmp_path / "raw", tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()


def test_text_of_an_unknown_suffix_is_read(tmp_path):
    (tmp_path / "README").write_text("straße\f\tnaïve")
    (tmp_path / "a.log.gz").write_bytes(gzip.compress(b"plain"))
    assert [d for p in ("README", "a.log.gz") for d in read_part(Part(str(tmp_path / p)))] == [
        "straße\f\tnaïve",
        "plain",
    ]


VALUES = {"str": "x", "null": None, "list": ["a"], "number": 5, "object": {"a": 1}, "true": True}


@pytest.mark.parametrize("kind", VALUES)
def test_what_is_no_string_is_dropped_or_refused_with_its_place(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": v}) + "\n" for v in ("first", VALUES[kind], "last")))
    (begin,) = [len(path.read_text().splitlines(True)[0])]
    parts = [Part(str(path), 0, begin), Part(str(path), begin, path.stat().st_size)]
    tally = Tally()
    if kind in ("str", "null"):
        assert [d for part in parts for d in read_part(part, tally=tally)] == [
            "first",
            *["x"] * (kind == "str"),
            "last",
        ]
        assert tally.nulls == (kind == "null")
    else:
        with pytest.raises(DataError, match=r"a.jsonl, line 2: the text is of type \w+, no string"):
            [d for part in parts for d in read_part(part)]
        skipping = Tally(skip=True)
        assert [d for part in parts for d in read_part(part, tally=skipping)] == ["first", "last"]
        assert skipping.skipped == 1 and "line 2" in skipping.named[0]


def test_values_of_parquet(tmp_path):
    def read(values, kind):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), path)
        return list(read_part(Part(str(path)), tally=tally)), tally

    tally = Tally()
    binary, dictionary = pyarrow.binary(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())
    assert read(["a", None, "b"], pyarrow.string()) == (["a", "b"], tally) and tally.nulls == 1
    assert read([b"caf\xc3\xa9", b"\xff!"], binary) == (["café", "\ufffd!"], tally) and tally.replaced == 1
    assert read(["a", "b", "a"], dictionary)[0] == ["a", "b", "a"]
    with pytest.raises(DataError, match=r"a.parquet, row 1: the text is of type list"):
        read([["a"]], pyarrow.list_(pyarrow.string()))


def test_surrogates_and_bytes_that_are_no_utf8_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "lone \\ud800 pair \\ud83d\\ude00"}\n{"text": "byte \xff"}\n'
    )
    (tmp_path / "b.txt").write_bytes("its own \ufffd and ".encode() + b"\xe9\xff")
    tally = Tally()
    found = [d for name in ("a.jsonl", "b.txt") for d in read_part(Part(str(tmp_path / name)), tally=tally)]
    assert found == ["lone \ufffd pair \U0001f600", "byte \ufffd", "its own \ufffd and \ufffd\ufffd"]
    assert tally.replaced == 4
    (tmp_path / "c.txt").write_text("more text " * 30)
    result = prepare(tmp_path, tmp_path / "out")
    assert result.exit_code == 0 and "4 characters became U+FFFD" in said(result)


def test_broken_lines_and_files_are_left_out_and_counted_if_asked(tmp_path, plain):
    good = lines(DOCUMENTS).splitlines(True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*good[:9], b'{"text": \n', b"[1, 2]\n", b'{"other": 1}\n', *good[9:]]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"cut text")[:-9])
    (tmp_path / "c.zip").write_bytes(b"PK\3\4\0\0")
    assert prepare(tmp_path / "*", tmp_path / "out", "--skip-broken").exit_code == 0
    assert tokens(tmp_path / "out") == plain
    assert read_manifest(str(tmp_path / "out/train")).provenance["skipped"] == 5
    named = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert [f"line {n}:" in line for n, line in zip((10, 11, 12), named, strict=False)] == [True] * 3
    assert "b.txt.gz" in named[3] and "c.zip" in named[4]


def test_linked_folders_are_read_and_loops_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("b")
    (tmp_path / "raw/[2] odd").mkdir(parents=True)
    (tmp_path / "raw/[2] odd/a.txt").write_text("a")
    (tmp_path / "raw/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/[2] odd/up").symlink_to("..")
    found = [str(f.path)[len(str(tmp_path)) :] for f in find_files([str(tmp_path / "raw")], SUFFIXES).files]
    assert found == ["/raw/[2] odd/a.txt", "/raw/linked/b.txt"]
    (tmp_path / "raw/[2] odd/up").unlink()
    assert len(find_files([str(tmp_path / "raw/[2] odd")], SUFFIXES).files) == 1  # brackets of a name, no pattern


def test_home_is_found_in_quoted_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS))
    assert prepare("~/*.jsonl", "~/out").exit_code == 0
    assert (tmp_path / "out/train/manifest.json").exists()


@pytest.mark.parametrize(
    ("page", "visible"),
    [
        ("<p>one</p></script><p>two</p>", "one\ntwo"),
        ("one</style></script>two<script>no</script>three", "onetwothree"),
        ("<b>research at AT&T", "research at AT&T"),
        ("<script>no</script><p>a &amp; b", "a & b"),
    ],
)
def test_a_stray_end_of_a_script_hides_nothing(page, visible):
    assert strip_html(page) == visible
