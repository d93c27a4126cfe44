"""Captions of pictures: read or generated, as tokens or as CLIP's vectors; and how another one is put the same way."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import models

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.captions import open_captions
from ebt_megatron.data.description import Description
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.loader import Loader
from ebt_megatron.data_prep import captions
from ebt_megatron.tools.rewrite import rewrite
from ebt_megatron.tools.shards import shard_problems
from tests.data.test_loader import recipe_for
from tests.data_prep.media import prepare_pictures, said
from tests.data_prep.test_images import pictures, save
from tests.data_prep.test_trouble import small_tokenizer

COLOURS = ("a red square", "a blue square on a blue ground", "nothing")


def prepare(source, output, *more):
    return prepare_pictures(source, output, "--pictures-per-shard", 20, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty pictures of an array, with labels and a file of captions."""
    out = tmp_path_factory.mktemp("captions")
    np.savez(out / "a.npz", images=pictures(60), labels=np.arange(60) % 3)
    (out / "captions.txt").write_text("".join(f"{COLOURS[i % 3]} number {i}\n" for i in range(60)))
    done = prepare(out / "a.npz", out / "shards", "--captions", out / "captions.txt")
    assert done.exit_code == 0, done.output
    return out


def texts(shards):
    """The captions of a folder, decoded; with the label of each."""
    tokenizer = open_captions(shards).tokenizer
    rows = shards.gather_beside("captions", np.arange(len(shards)))
    return [tokenizer.decode([t for t in row if t >= 0]) for row in rows.tolist()]


def test_captions_of_a_file_stay_beside_their_pictures(folder):
    found = {}
    for split in ("train", "validation"):
        shards = ShardFolder(str(folder / "shards" / split))
        m = shards.manifest
        assert m.captions["kind"] == "tokens" and m.captions["origin"] == str(folder / "captions.txt")
        assert not [p for s in m.shards for p in shard_problems(folder / "shards" / split, s, m)]
        found |= {text: shards.gather_beside("labels", np.array([i]))[0] for i, text in enumerate(texts(shards))}
    assert found == {f"{COLOURS[i % 3]} number {i}": i % 3 for i in range(60)}


def test_the_loader_gives_them_and_rewriting_keeps_them(folder, tmp_path):
    shards = ShardFolder(str(folder / "shards/train"))
    batch = next(
        iter(Loader(recipe_for(folder / "shards", "data.modality=images", "data.shuffle=false"), "train", 0, 1))
    )
    assert torch.equal(batch.beside["captions"], torch.from_numpy(shards.gather_beside("captions", np.arange(2))))
    assert torch.equal(batch.part(1, 2).beside["captions"], batch.beside["captions"][1:])
    rewrite([str(folder / "shards/train")], tmp_path / "again", 7, overwrite=False)
    assert texts(ShardFolder(str(tmp_path / "again"))) == texts(shards)


def test_another_text_is_put_as_the_captions_were(folder):
    """Also by what a run keeps of its data; the longest caption sets the length."""
    shards = ShardFolder(str(folder / "shards/train"))
    shards.copy_to(folder / "kept")
    encoder = open_captions(Description(str(folder / "kept")))
    first = texts(shards)[0]
    assert (encoder.encode([first])[0] == shards.gather_beside("captions", np.arange(1))[0]).all()
    length = shards.manifest.captions["shape"][0]
    assert encoder.encode(["red " * 99]).shape == (1, length) and (encoder.encode(["red " * 99]) >= 0).all()
    with pytest.raises(DataError, match="has no token"):
        encoder.encode([""])
    with pytest.raises(DataError, match=r"captions.json does not match the manifest"):
        (folder / "kept/captions.json").write_text("{}")
        open_captions(Description(str(folder / "kept")))


def test_captions_are_generated_from_labels_and_named_so(folder, tmp_path):
    done = prepare(folder / "a.npz", tmp_path / "out", "--captions-from-labels", "--class-names", ", ".join(COLOURS))
    assert done.exit_code == 0, done.output
    shards = ShardFolder(str(tmp_path / "out/train"))
    assert shards.manifest.captions["origin"] == "generated from labels"
    assert shards.manifest.classes == list(COLOURS)
    found = texts(shards)
    assert all(
        COLOURS[shards.gather_beside("labels", np.array([i]))[0]] in text for i, text in enumerate(found)
    ) and len(set(found)) > len(COLOURS)


def test_captions_of_picture_files_go_by_name(tmp_path):
    for i, picture in enumerate(pictures(30)):
        save(tmp_path / "raw", f"{i}.png", picture)
    lines = [f"{i}.png\tpicture number {i}\n{i}.png\tand another\n" for i in reversed(range(30))]
    (tmp_path / "captions.tsv").write_text("".join(lines))
    assert prepare(tmp_path / "raw", tmp_path / "out", "--captions", tmp_path / "captions.tsv").exit_code == 0
    found = [t for s in ("train", "validation") for t in texts(ShardFolder(str(tmp_path / "out" / s)))]
    assert sorted(found) == sorted(f"picture number {i}" for i in range(30))


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (["one"] * 59, (), "has 60 pictures, and the captions are 59: give one line for each"),
        (["one"] * 61, (), "has 60 pictures, and the captions are 61"),
        (["one"] * 30 + [""] * 30, (), "line 31 of .* has no caption: every line is a caption"),
        (["one"] * 60, ("--captions-from-labels",), "give either --captions or --captions-from-labels"),
        (
            ["one"] * 60,
            ("--caption-encoder", "bert"),
            "--caption-encoder bert: choose tokens, tokens:TOKENIZER or clip:",
        ),
        (["one"] * 60, ("--caption-encoder", "clip:nowhere"), "no CLIP model at 'nowhere'"),
        (None, ("--captions-from-labels",), "--captions-from-labels needs names: give --class-names"),
        (
            None,
            ("--captions-from-labels", "--class-names", "a,b"),
            "has label 2, and captions are generated from the na",
        ),
        (None, ("--class-names", "a,b"), "the input has label 2, and --class-names has 2: name all labels"),
    ],
)
def test_what_does_not_fit_is_one_line(lines, more, message, folder, tmp_path):
    path = tmp_path / "captions.txt"
    given = ("--captions", path) if lines is not None else ()
    path.write_text("".join(f"{line}\n" for line in lines or []))
    done = prepare(folder / "a.npz", tmp_path / "out", *given, *more)
    assert done.exit_code == 2 and not (tmp_path / "out/train/manifest.json").exists()
    assert re.search(message, said(done)), done.output


def test_files_without_captions_and_captions_without_files(tmp_path):
    for i, picture in enumerate(pictures(3)):
        save(tmp_path / "raw", f"{i}.png", picture)
    missing, more = "no caption for 1 of the pictures, 2.png", "2 captions of files that are not among the pictures"
    for names, message in (("01", missing), ("01234", more)):
        (tmp_path / "c.tsv").write_text("".join(f"{i}.png\ttext\n" for i in names))
        done = prepare(tmp_path / "raw", tmp_path / "out", "--captions", tmp_path / "c.tsv")
        assert done.exit_code == 2 and message in said(done)


def test_sources_with_other_captions_are_refused(folder, tmp_path):
    assert prepare(folder / "a.npz", tmp_path / "out", "--encoder", folder / "shards/train/encoder.npz").exit_code == 0
    recipe = recipe_for(
        folder / "shards", "data.modality=images", f"data.train=[{folder}/shards/train,{tmp_path}/out/train]"
    )
    with pytest.raises(DataError, match="captions of another encoder or length than"):
        Loader(recipe, "train", 0, 1)


def clip_model(folder):
    """A tiny CLIPTextModel of random weights, saved as transformers does."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "a", "red", "blue", "square", "nothing", "number", "on", "ground", "[unk]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="[unk]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_captions_as_the_pooled_output_of_a_clip_on_disk(folder, tmp_path):
    model, tokenizer = clip_model(tmp_path / "clip")
    done = prepare(
        folder / "a.npz",
        tmp_path / "out",
        "--captions",
        folder / "captions.txt",
        "--caption-encoder",
        f"clip:{tmp_path / 'clip'}",
    )
    assert done.exit_code == 0, done.output
    shards, tokens = ShardFolder(str(tmp_path / "out/train")), ShardFolder(str(folder / "shards/train"))
    assert shards.manifest.captions["shape"] == [16] and shards.manifest.captions["kind"] == "clip"
    told = texts(tokens)[:4]  # the same pictures in the same order
    given = tokenizer(told, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = model(**given).pooler_output.numpy()
    np.testing.assert_allclose(shards.gather_beside("captions", np.arange(4)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(open_captions(shards).encode(told), expected, rtol=1e-5, atol=1e-6)
    config = tmp_path / "clip/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    with pytest.raises(DataError, match="is not the one the captions were made with"):
        open_captions(shards)


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_a_line_of_captions_ends_at_a_line_feed_alone(tmp_path, odd):
    (tmp_path / "a.txt").write_bytes(f'\ufeffone{odd}two\r\n"three"\n'.encode())
    assert list(captions.read_captions(str(tmp_path / "a.txt"), []).given.values()) == [f"one{odd}two", "three"]
    (tmp_path / "b.tsv").write_bytes(f"\ufeffa.png\tone{odd}two\n".encode())
    assert captions.read_captions(str(tmp_path / "b.tsv"), ["a.png"]).given == {"a.png": f"one{odd}two"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('one\n"two",\n', "line 2 of .*begins like JSON and is none .a comma at its end"),
        ('["one", "two"]\n', "line 1 of .*has no caption: every line is a caption"),
        ('one\n{"caption": "two"}\n', "line 2 of .*has no caption"),
    ],
)
def test_captions_that_are_json_are_named(tmp_path, text, line):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=line):
        captions.read_captions(str(tmp_path / "a.txt"), [])
    with pytest.raises(DataError, match=r"FILE<TAB>CAPTION|is none"):
        captions.read_captions(str(tmp_path / "a.txt"), ["a.png"])


@pytest.mark.parametrize("unknown", [True, False])
def test_captions_that_their_tokenizer_does_not_know_are_refused_and_counted_where_it_is_allowed(tmp_path, unknown):
    """Three words and [UNK]; or letters, of which those that are none are left out without a word."""
    model = models.WordLevel({"a": 0, "red": 1, "[UNK]": 2}, unk_token="[UNK]")
    if not unknown:
        model = models.BPE({c: i for i, c in enumerate("ared")}, [])
    path = small_tokenizer(tmp_path / "words.json", model)
    np.savez(tmp_path / "a.npz", images=pictures(4))
    (tmp_path / "a.txt").write_text("a red box\n" * 3 + f"a {'red ' * 80}\n")
    given = (tmp_path / "a.npz", tmp_path / "out", "--captions", tmp_path / "a.txt", "--validation-fraction", 0)
    given = (*given, "--caption-encoder", f"tokens:{path}")
    result = prepare(*given, "--most-unknown", 0.01)
    assert result.exit_code == 2 and "no token for" in said(result) and "of the captions" in said(result)
    result = prepare(*given, "--most-unknown", 0.4)
    assert result.exit_code == 0, result.output
    count = 3 if unknown else 3 * len("box")
    assert f"of captions: {count} unknown, 1 cut" in said(result)
    folder = ShardFolder(str(tmp_path / "out/train"))
    assert (folder.manifest.captions["unknown"], folder.manifest.captions["cut"]) == (count, 1)
    assert open_captions(folder).lacking(["a red box", "a red red"]) == count // 3
    (tmp_path / "bare.json").write_text(path.read_text().replace('"unk_token": "[UNK]"', '"unk_token": "no"'))
    if unknown:
        result = prepare(*given[:-1], f"tokens:{tmp_path / 'bare.json'}", "--overwrite")
        assert result.exit_code == 2 and "cannot encode the captions" in said(result)
