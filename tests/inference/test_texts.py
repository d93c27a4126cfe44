"""Texts become tokens and tokens texts, by tokenizers of every kind; what one lacks is counted, not refused."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ebt_megatron.core.errors import DataError
from ebt_megatron.inference.texts import Spelling
from tests import builders
from tests.inference.models import run_of, texts_with

RUN = run_of(builders.small_recipe())


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    pieces = ["<end>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehlor."]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def words(unknown="[UNK]"):
    pieces = ["<end>", unknown, "hello", "wor", "##ld", ".", "a"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def pieces(unk_id=1):
    vocab = [("<end>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdehlorw.")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def letters():
    """Drops what it lacks; puts a token before a text, if it is let."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *"abcdehlorw "])}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 0)])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback, words, pieces, letters])
def test_tokens_are_spelled_one_by_one_as_all_together(make, tmp_path, monkeypatch):
    """Characters of several tokens come whole; U+FFFD that the text has stays; a token costs the same at any length."""
    texts = texts_with(make(), RUN, tmp_path)
    text = "hello world. a é😀\ufffd\ufffd😀h \ufffd"
    before, *tokens = texts.encode("a " + text) * 20
    spelling, decoded = Spelling(texts, before), []
    real = texts.tokenizer

    class Counting:
        def __getattr__(self, name):
            return getattr(real, name)

        def decode(self, ids):
            decoded.append(len(ids))
            return real.decode(ids)

    texts.tokenizer = Counting()
    parts = [spelling.add(token) for token in tokens]
    assert sum(decoded) < 50 * len(tokens)
    texts.tokenizer = real
    assert "".join(parts) == spelling.text == texts.decode(tokens, before)
    if make in (byte_level, byte_fallback):
        assert ("a " + text + "a " + text)[1:] in ("a " + spelling.text)[1:] and "" in parts


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_half_a_character_is_no_text_and_a_broken_one_is_one(make, tmp_path):
    texts = texts_with(make(), RUN, tmp_path)
    before, *smile = texts.encode("a😀")
    for kept in (1, 2, 3):
        spelling = Spelling(texts, before)
        assert [spelling.add(token) for token in smile[:kept]] == [""] * kept
        assert spelling.add(before).endswith("a"), "a character that nothing completes is over"
        assert spelling.text.startswith("\ufffd")


@pytest.mark.parametrize(
    ("make", "lacking", "said"),
    [
        (byte_level, {}, None),
        (byte_fallback, {}, None),
        (
            words,
            {"é": 1, "☃": 1},
            "2 characters or words that the run's tokenizer lacks were read as its unknown token: é",
        ),
        (pieces, {"é": 1, "☃": 1}, "were read as its unknown token"),
        (letters, {"é": 1, "☃": 1}, "2 characters or words that the run's tokenizer lacks were left out: é ☃"),
    ],
)
def test_what_a_tokenizer_lacks_is_counted(make, lacking, said, tmp_path):
    texts = texts_with(make(), RUN, tmp_path)
    assert texts.encode("hello é ☃ a") and dict(texts.lacking) == lacking
    assert texts.losses() == [] if said is None else said in texts.losses()[0]


def test_a_word_of_known_letters_is_lacking_as_a_whole(tmp_path):
    """A WordPiece may lack a word and have each of its letters."""
    texts = texts_with(words(), RUN, tmp_path)
    texts.encode("aaa hello")
    assert texts.lacking == {"aaa": 1}


@pytest.mark.parametrize("make", [byte_level, words])
def test_surrogates_are_replaced_and_counted(make, tmp_path):
    texts = texts_with(make(), RUN, tmp_path)
    assert texts.encode("hello \udcff\ud800") == texts.encode("hello \ufffd\ufffd")
    assert texts.losses()[0] == "2 bytes or surrogates that are no UTF-8 were read as U+FFFD"


def test_an_empty_prompt_begins_a_text(tmp_path):
    texts = texts_with(letters(), RUN, tmp_path)
    assert texts.prompt("", 1) == [0] and texts.prompt("a", 1) == texts.encode("a")
    with pytest.raises(DataError, match=r"prompt 2: the run's tokenizer has no token for any of '☃'"):
        texts.prompt("☃", 2)
    texts.end = None
    with pytest.raises(DataError, match="prompt 1 is empty, and the tokenizer has no end of text"):
        texts.prompt("", 1)
