"""Tokenizers, and documents as tokens in bounded memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.network import PATIENCE, require_hub

END_OF_TEXT = "<|endoftext|>"
_BATCH = 1 << 20  # characters encoded at once by tokenizers' own threads; each takes about 200 bytes meanwhile
_PIECE = 1 << 18  # characters of a longer document encoded at once
_AROUND = 256  # characters on each side of a cut that must have the same tokens with it and without
_CUTS = 64  # places tried
_WORD_ENDS = re.compile(r"\b")


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose entry 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def words(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    tokenizer.train_from_iterator((p for d in documents for p in _pieces(d, words)), trainer)
    return tokenizer


def _of_the_hub(name: str) -> Tokenizer:
    """The tokenizer of a repository: the one that was fetched before, or else over the network, if there is one."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "tokenizer.json", local_files_only=True)
    except Exception:  # it was not fetched before
        require_hub()
        path = hf_hub_download(name, "tokenizer.json", etag_timeout=PATIENCE)
    return Tokenizer.from_file(path)


@functools.cache
def load_tokenizer(given: str | Path) -> Tokenizer:
    """A tokenizer with an end-of-text entry.

    It cuts and pads nothing, whatever the file says, and reads its special tokens, spelled in a text, as text.

    Args:
        given: a tokenizer.json, or its name on the Hugging Face hub ("EleutherAI/gpt-neox-20b").

    Raises:
        DataError: if it cannot be read or fetched, or has no end of text.
    """
    name, is_file = str(given), Path(given).is_file()
    try:
        tokenizer = Tokenizer.from_str(Path(given).read_text()) if is_file else _of_the_hub(name)
    except Exception as error:  # both raise whatever the libraries beneath them do
        reason = " ".join(str(error).split())
        if is_file:
            raise DataError(f"--tokenizer {name}: not a tokenizer.json ({reason})") from None
        raise DataError(
            f"--tokenizer {name} is no file here, and not to be had from the Hugging Face hub ({reason}): "
            "give a tokenizer.json"
        ) from None
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise DataError(f"--tokenizer {name}: has no {END_OF_TEXT} entry to separate documents")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = tokenizer.get_added_tokens_decoder().get(end)
    if added is not None and not added.special:
        tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.encode_special_tokens = True
    return tokenizer


def written(tokenizer: Tokenizer) -> str:
    """The text of its tokenizer.json, to be written by us: its own `save` takes only names that are UTF-8."""
    return str(tokenizer.to_str(pretty=True))


def entries(tokenizer: Tokenizer) -> int:
    """What all its ids are below: more than it has tokens, where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def _cut(document: str, begin: int, split: Callable[[str], list[Any]]) -> int:
    """Return where the piece from `begin` on ends: after about _PIECE characters, where splitting does not see the cut.

    That is an end of a word around which `split` gives the same with the cut and without it. It is shown a text
    and the same without its first character, so that what goes by position is found out. A tokenizer for which
    there is no such place, because it puts something before every text or does not split words, gets all of it.
    """
    for end in range(begin + _PIECE, len(document), _PIECE):
        window = end - 16 * _AROUND
        ends = [m.start() for m in _WORD_ENDS.finditer(document, window, end) if window < m.start() < end]
        for place in reversed(ends[-_CUTS:]):
            right = document[place : place + _AROUND]
            lefts = (document[place - _AROUND : place], document[place - _AROUND + 1 : place])
            if all(split(left + right) == split(left) + split(right) for left in lefts):
                return place
    return len(document)


def _pieces(document: str, split: Callable[[str], list[Any]]) -> Iterator[str]:
    """A document in pieces (one at least) whose tokens, one after the other, are its own."""
    begin = 0
    while (end := _cut(document, begin, split)) < len(document):
        yield document[begin:end]
        begin = end
    yield document[begin:]


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of each document and the end of text, uint16 or, for more entries, uint32.

    Raises:
        DataError: a text that the tokenizer has no tokens for, or one that spells the end of text where the
            tokenizer cannot tell the two apart.
    """
    end, dtype = tokenizer.token_to_id(END_OF_TEXT), dtype_of(entries(tokenizer))
    tokens: list[np.ndarray] = []  # of the document that is not complete yet
    batch: list[tuple[str, bool]] = []
    size = 0

    def encoded() -> Iterator[np.ndarray]:
        nonlocal tokens
        try:
            found = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        except Exception as error:  # the library raises bare exceptions
            raise DataError(f"the tokenizer cannot encode the text ({error}): choose another --tokenizer") from None
        for encoding, (_, last) in zip(found, batch, strict=True):
            tokens.append(np.array(encoding.ids, dtype))
            if last:
                document = np.concatenate([*tokens, np.array([end], dtype)])
                if (document[:-1] == end).any():
                    raise DataError(
                        f"the text holds {END_OF_TEXT}, which this tokenizer cannot tell from the end of a "
                        "document: choose another --tokenizer"
                    )
                tokens = []
                yield document
        batch.clear()

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for document in documents:
        pieces = list(_pieces(document, ids))
        for number, piece in enumerate(pieces):
            batch.append((piece, number == len(pieces) - 1))
            size += len(piece)
            if size > _BATCH:
                yield from encoded()
                size = 0
    yield from encoded()


def answers_of(tokenizer: Tokenizer, document: str, tokens: np.ndarray, mark: str) -> np.ndarray:
    """Which of a document's tokens answer: those that hold something of what follows the mark, and the end of text.

    Args:
        tokenizer: that made the tokens.
        document: its text.
        tokens: with the end of text.
        mark: that comes before an answer; the first one counts.

    Returns:
        uint8, 1 or 0; all 0 where there is no mark.
    """
    out, at = np.zeros(len(tokens), np.uint8), document.find(mark)
    if at >= 0:
        ends = [end for _, end in tokenizer.encode(document, add_special_tokens=False).offsets]
        out[:-1] = np.array(ends, np.int64) > at + len(mark)
        out[-1] = 1
    return out


def dtype_of(vocab_size: int) -> str:
    """What tokens are stored as."""
    return "uint16" if vocab_size <= 65536 else "uint32"
