"""Captions of pictures: from a file, or generated from their labels; and how they are told to a model.

A file has a line for each picture: of picture files FILE<TAB>CAPTION, with the file's name; of an array the caption
alone, in its order. Generated ones say the name of the picture's label in one of a few ways.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.lines import lines_of, text_of, value_of
from ebt_megatron.data.captions import LONGEST, CaptionEncoder, CaptionTokens, ClipCaptions
from ebt_megatron.data.lacking import Lacking
from ebt_megatron.data_prep.files import content_of, without_secrets
from ebt_megatron.data_prep.options import check_known
from ebt_megatron.data_prep.pieces import place_of
from ebt_megatron.data_prep.tokens import load_tokenizer, train_bpe

TEMPLATES = ("{}", "a picture of {}", "here one sees {}", "this is {}")
_ENTRIES = 1024  # of the tokenizer that is trained on the captions, at most


@dataclass(frozen=True)
class CaptionTexts:
    """Texts of pictures.

    Attributes:
        given: by name of a picture's file, or by its place in an array; empty: generated from labels.
        names: of the labels, for those that are generated.
        origin: where they come from, in words.
    """

    given: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    origin: str = "generated from labels"

    def of(self, name: str, label: int, content: bytes) -> str:
        """The caption of a picture.

        Args:
            name: of its file, or its place in an array.
            label: its own, or NO_LABEL.
            content: that chooses between ways to say a label.

        Raises:
            DataError: if it has none.
        """
        if self.given:
            if name not in self.given:
                raise DataError(f"{self.origin} has no caption for picture {name}: add it")
            return self.given[name]
        if not 0 <= label < len(self.names):
            has = "no label" if label < 0 else f"label {label}"
            raise DataError(
                f"picture {name} has {has}, and captions are generated from the names of "
                f"{len(self.names)} labels: give labels, and --class-names for all"
            )
        return TEMPLATES[int(place_of(1, content) * len(TEMPLATES))].format(self.names[label])

    def all(self) -> list[str]:
        """Every caption there can be."""
        return list(self.given.values()) or [t.format(n) for n in self.names for t in TEMPLATES]

    def digest(self) -> str:
        """Return the digest of all that is told, for the job's record."""
        return hashlib.sha256(json.dumps([self.given, self.names]).encode()).hexdigest()


def read_captions(path: str, pictures: Sequence[str]) -> CaptionTexts:
    """The captions of a file.

    Args:
        path: of the file.
        pictures: names of the picture files; empty: an array, whose captions are counted when it is read.

    Raises:
        DataError: if it cannot be read, a picture has no caption, or a caption no picture.
    """
    try:
        lines = lines_of(text_of(content_of(path), f"--captions {path}"))
    except OSError as error:
        raise DataError(f"--captions {path} cannot be read ({error})") from None
    given: dict[str, str] = {}
    for number, line in enumerate(lines):
        where = f"line {number + 1} of {path}"
        name, tab, text = line.partition("\t") if pictures else (str(number), "\t", line)
        if not pictures or not tab:
            text = value_of(line, where)
        if not tab or not isinstance(text, str) or not text.strip():
            needed = "FILE<TAB>CAPTION" if pictures else "a caption"
            raise DataError(f"{where} has no caption: every line is {needed}")
        given.setdefault(name, text.strip())  # of several captions the first
    known = set(pictures)
    if pictures and (more := [name for name in given if name not in known]):
        raise DataError(
            f"{path} has {len(more)} captions of files that are not among the pictures, {more[0]} first: leave them out"
        )
    if missing := [name for name in pictures if name not in given]:
        raise DataError(f"{path} has no caption for {len(missing)} of the pictures, {missing[0]} first: add them")
    if not given:
        raise DataError(f"--captions {path} is empty")
    return CaptionTexts(given, origin=without_secrets(path))


@dataclass(frozen=True)
class Captions:
    """Texts, and what puts them as they are told.

    Attributes:
        texts: of the pictures.
        encoder: "tokens" (a tokenizer trained on them), "tokens:TOKENIZER" or "clip:FOLDER".
        tokenizer: the text of a tokenizer.json; "": none.
        length: of the longest caption in tokens.
        losses: what is not told as it was written, by its name in a manifest: `unknown` and `cut`, where there is some.
    """

    texts: CaptionTexts
    encoder: str
    tokenizer: str = ""
    length: int = 0
    losses: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, texts: CaptionTexts, encoder: str, most_unknown: float = 1.0) -> Captions:
        """Captions with the tokenizer or model that `encoder` names.

        Raises:
            DataError: where it cannot be had, cannot encode the texts, or lacks more of them than `most_unknown`.
        """
        kind, _, given = encoder.partition(":")
        given = os.path.expanduser(given)
        if kind == "clip":
            ClipCaptions(given)
            return cls(texts, f"clip:{given}")
        if kind != "tokens":
            raise DataError(f"--caption-encoder {encoder}: choose tokens, tokens:TOKENIZER or clip:FOLDER")
        tokenizer: Tokenizer = load_tokenizer(given) if given else train_bpe(sorted(set(texts.all())), _ENTRIES)
        every, lacking = texts.all(), Lacking(tokenizer)
        try:
            found = [encoding.ids for encoding in tokenizer.encode_batch(every)]
        except Exception as error:  # the library raises bare exceptions
            raise DataError(
                f"--caption-encoder {encoder} cannot encode the captions ({error}): choose another"
            ) from None
        unknown = sum(lacking.count(text, ids) for text, ids in zip(every, found, strict=True))
        share = lacking.share(unknown, sum(map(len, found)))
        check_known(share, most_unknown, "the captions", "--caption-encoder")
        lengths = [len(ids) for ids in found]
        losses = {"unknown": unknown, "cut": sum(length > LONGEST for length in lengths)}
        return cls(
            texts,
            encoder,
            tokenizer.to_str(),
            max(1, min(max(lengths), LONGEST)),
            {name: count for name, count in losses.items() if count},
        )

    def open(self) -> CaptionEncoder:
        """What puts them."""
        if self.tokenizer:
            return CaptionTokens(self.tokenizer, self.length)
        return ClipCaptions(self.encoder.partition(":")[2])

    def save(self, folder: Path) -> dict[str, object]:
        """Write the tokenizer, if there is one, beside a manifest; returns what that says."""
        if self.tokenizer:
            write_whole(folder / "captions.json", self.tokenizer)
        return {**self.open().describe(), "origin": self.texts.origin, **self.losses}

    def record(self) -> list[object]:
        """Return what the job's record says of them."""
        return [self.encoder, self.open().describe(), self.texts.origin, self.texts.digest()]
