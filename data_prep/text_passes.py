"""Passes over text: which documents are kept and in which split, their tokens, and shards of those.

Each class knows what the passes before it found out. Every process makes the same ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of, write_whole
from ebt_megatron.core.options import option
from ebt_megatron.data.lacking import Lacking
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.shards import shard_infos, write_shard
from ebt_megatron.data_prep.documents import Tally, read_part
from ebt_megatron.data_prep.options import check_known, most_unknown, path_or_name
from ebt_megatron.data_prep.passes import Settings, Shard, Unit, WorkFolder, save, threshold, write_skipped
from ebt_megatron.data_prep.tokens import (
    END_OF_TEXT,
    answers_of,
    dtype_of,
    encode,
    entries,
    load_tokenizer,
    train_bpe,
    written,
)

_BPE_CHARACTERS = 1 << 30  # a tokenizer is trained on no more than this


@dataclass(frozen=True)
class TextSettings(Settings):
    """What the shards depend on besides the input.

    Attributes:
        tokenizer: a tokenizer.json or its name on the hub, or None to train one.
        train_bpe: entries of the tokenizer to train.
        sequence_length: tokens predicted per sample.
        samples_per_shard: in every tar but the last.
        text_key: of JSONL and Parquet.
        max_bytes: text after this many bytes is left out; 0: none is.
        answers_after: what answers follow in a document, which then are marked; "": nothing is.
        most_unknown: the share of tokens that may be the tokenizer's unknown one; it changes nothing of what is made.
    """

    tokenizer: str | None = option(
        None, parser=path_or_name, help="A tokenizer.json, or its hub name: EleutherAI/gpt-neox-20b."
    )
    train_bpe: int = option(0, min=0, help="Train a byte-level BPE of this size instead.")
    sequence_length: int = option(256, min=1, help="Tokens predicted per sample.")
    samples_per_shard: int = option(8192, min=1, help="Samples in each tar.")
    text_key: str = option("text", help="Key or column of the text in JSONL and Parquet.")
    max_bytes: int = option(0, min=0, help="Stop after this many bytes of text (0: all).")
    answers_after: str = option("", help="Mark what follows this text in a document, for data.learn_from=answers.")
    most_unknown: float = most_unknown("text")


@dataclass(frozen=True)
class Documents:
    """The input's documents, and which of them are kept.

    Per unit: documents-KEY.npy, a row (key [2 x u8], bytes) for each document, and tally-KEY.json, what was not taken
    as it stood. Of the whole input: kept-N.npy, the split of each document of unit N (-1: dropped).
    """

    work: WorkFolder
    settings: TextSettings

    def file(self, unit: Unit) -> Path:
        """The file that shows a unit is read."""
        return self.work.file("documents", unit.key)

    def hashes(self, unit: Unit) -> np.ndarray:
        """The rows of documents-KEY.npy."""
        return np.load(self.file(unit))

    def read(self, unit: Unit, tally: Tally | None = None) -> Iterator[str]:
        """The unit's documents, in order."""
        tally = tally or Tally(self.settings.skip_broken)
        return (d for part in unit.parts for d in read_part(part, self.settings.text_key, tally))

    def hash(self, unit: Unit) -> None:
        """First pass: each document's key and size; empty ones have size 0."""
        salt, rows, tally = self.settings.seed.to_bytes(16, "little"), [], Tally(self.settings.skip_broken)
        for document in self.read(unit, tally):
            data = document.encode()
            key = hashlib.blake2b(data, digest_size=16, salt=salt).digest()
            rows.append((*np.frombuffer(key, dtype="<u8"), len(data) if document.strip() else 0))
        write_whole(self.work.file("tally", unit.key, "json"), json.dumps(tally.counts()))
        save(self.file(unit), np.array(rows, dtype="<u8").reshape(-1, 3))

    def choose(self, units: list[Unit]) -> None:
        """The split of every document; duplicates, empty ones and those after max_bytes are dropped."""
        arrays = [self.hashes(u) for u in units]
        table = np.concatenate(arrays) if arrays else np.zeros((0, 3), "<u8")
        size = table[:, 2].astype(np.int64)
        keep = size > 0
        if self.settings.max_bytes:
            keep &= np.cumsum(size) - size < self.settings.max_bytes
        order = np.lexsort((table[:, 1], table[:, 0]))  # stable: of equal documents the first stays first
        unique = np.ones(len(table), dtype=bool)
        unique[order[1:]] = (table[order[1:], :2] != table[order[:-1], :2]).any(axis=1)
        keep &= unique
        if not keep.any():
            raise DataError("the input holds no text: every document is empty; check --input and --text-key")
        hashes = table[:, 0].astype(np.float64) / 2.0**64
        held_out = hashes < threshold(hashes[keep], self.settings.validation_fraction, "document")
        splits = np.where(keep, held_out.astype(np.int8), np.int8(-1))
        for unit, part in zip(units, np.split(splits, np.cumsum([len(a) for a in arrays])[:-1]), strict=True):
            save(self.work.of_whole("kept", unit.number), part)

    def splits(self, unit: Unit) -> np.ndarray:
        """The rows of kept-N.npy."""
        return np.load(self.work.of_whole("kept", unit.number))

    def kept(self, unit: Unit) -> Iterator[tuple[int, str]]:
        """(split, document) of the unit's documents that are kept."""
        for split, document in itertools.zip_longest(self.splits(unit).tolist(), self.read(unit)):
            if split is None or document is None:
                raise DataError(f"{unit.parts[0].path}, or a file after it, changed while it was read: pass --resume")
            if split >= 0:
                yield split, document

    def left_out(self, units: list[Unit]) -> dict[str, int]:
        """What was not taken as it stood: lines and files skipped (which skipped.txt names), nulls, characters."""
        tallies = [json.loads(self.work.file("tally", u.key, "json").read_text()) for u in units]
        write_skipped(self.work.output, [line for t in tallies for line in t["named"]])
        return {key: sum(t[key] for t in tallies) for key in ("skipped", "nulls", "replaced")}


@dataclass(frozen=True)
class TokenShards:
    """The tokens of documents that are kept, as shards of each split.

    Of the whole input: lengths-N.npy and tokens-N.npy, of unit N, each document ended by the end of text; and
    answers-N.npy, which of the tokens are answers, if they are marked.
    """

    work: WorkFolder
    documents: Documents

    @property
    def settings(self) -> TextSettings:
        """What to make."""
        return self.documents.settings

    def make_tokenizer(self, units: list[Unit]) -> None:
        """The tokenizer, given or trained, at work/tokenizer.json."""
        path = self.work.whole("tokenizer.json")
        if path.exists():
            return

        def some() -> Iterator[str]:
            characters = 0
            for split, document in (kept for unit in units for kept in self.documents.kept(unit)):
                if split == 0:
                    yield document
                    characters += len(document)
                    if characters > _BPE_CHARACTERS:
                        return

        given = self.settings.tokenizer
        tokenizer = load_tokenizer(given) if given else train_bpe(some(), self.settings.train_bpe)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, written(tokenizer))

    def tokens(self, unit: Unit) -> Path:
        """The file that shows a unit is tokenized."""
        return self.work.of_whole("tokens", unit.number)

    def tokenize(self, unit: Unit) -> None:
        """Second pass: the tokens of the documents that are kept."""
        tokenizer = load_tokenizer(self.work.whole("tokenizer.json"))
        streams, lengths, lacking = [np.zeros(0, dtype_of(entries(tokenizer)))], [], Lacking(tokenizer)
        unknown, waiting, mark = [], deque[str](), self.settings.answers_after
        answers = [np.zeros(0, np.uint8)]

        def documents() -> Iterator[str]:
            for _, document in self.documents.kept(unit):
                waiting.append(document)  # until its tokens come
                yield document

        for tokens in encode(tokenizer, documents()):
            streams.append(tokens)
            lengths.append(len(tokens))
            document = waiting.popleft()
            unknown.append(lacking.count(document, tokens))
            if mark:
                answers.append(answers_of(tokenizer, document, tokens, mark))
        save(self.work.of_whole("unknown", unit.number), np.array(unknown, dtype=np.int64))
        save(self.work.of_whole("lengths", unit.number), np.array(lengths, dtype=np.int64))
        if mark:
            save(self.work.of_whole("answers", unit.number), np.concatenate(answers))
        save(self.tokens(unit), np.concatenate(streams))

    def plan(self, units: list[Unit]) -> list[Shard]:
        """Describe each split's stream; returns the shards to write.

        stream-SPLIT.npy: (unit, offset in its tokens, position in the stream) of each document, and a last row that
        ends it.
        """
        self._check_unknown(units)
        if self.settings.answers_after and not any(self._answers(units, s) for s in range(len(self.settings.splits))):
            raise DataError(f"no document holds {self.settings.answers_after!r}: check --answers-after")
        shards = []
        for split, name in enumerate(self.settings.splits):
            rows, position = [np.zeros((0, 3), np.int64)], 0
            for unit in units:
                splits = self.documents.splits(unit)
                lengths = np.load(self.work.of_whole("lengths", unit.number))
                mine = splits[splits >= 0] == split
                offsets = (np.cumsum(lengths) - lengths)[mine]
                positions = position + np.cumsum(lengths[mine]) - lengths[mine]
                rows.append(np.stack([np.full(len(offsets), unit.number), offsets, positions], axis=1))
                position += int(lengths[mine].sum())
            length = self.settings.sequence_length
            samples = (position - 1) // length if position else 0
            if not samples:
                raise DataError(
                    f"only {position} tokens for {name}, fewer than one sample of {length}: give more text, a shorter "
                    "--sequence-length or a larger --validation-fraction"
                )
            save(self.work.whole(f"stream-{name}.npy"), np.concatenate([*rows, [[-1, 0, position]]]))
            shards += [(name, k) for k in range(-(-samples // self.settings.samples_per_shard))]
        return shards

    def unknown(self, units: list[Unit], split: int) -> int:
        """How often a split has something that the tokenizer has no token for."""
        total = 0
        for unit in units:
            splits = self.documents.splits(unit)
            counts = np.load(self.work.of_whole("unknown", unit.number))
            total += int(counts[splits[splits >= 0] == split].sum())
        return total

    def _answers(self, units: list[Unit], split: int) -> int:
        """How many tokens of a split are answers."""
        total = 0
        for unit in units:
            splits = self.documents.splits(unit)
            of = np.repeat(splits[splits >= 0] == split, np.load(self.work.of_whole("lengths", unit.number)))
            total += int(np.load(self.work.of_whole("answers", unit.number))[of].sum())
        return total

    def _check_unknown(self, units: list[Unit]) -> None:
        """Whether the tokenizer knows the text; raises DataError."""
        unknown = sum(self.unknown(units, split) for split in range(len(self.settings.splits)))
        tokens = sum(int(np.load(self.work.of_whole("lengths", unit.number)).sum()) for unit in units)
        share = Lacking(load_tokenizer(self.work.whole("tokenizer.json"))).share(unknown, tokens)
        check_known(share, self.settings.most_unknown, "the text", "--tokenizer")

    def write(self, item: Shard) -> None:
        """Third pass: one shard, cut from its split's stream."""
        split, number = item
        answers = self._rows("answers", item) if self.settings.answers_after else None
        write_shard(self.work.output / split, number, "text", self._rows("tokens", item), answers=answers)

    def _rows(self, what: str, item: Shard) -> np.ndarray:
        """A shard's rows of tokens, or of what there is for each of them."""
        split, number = item
        stream = np.load(self.work.whole(f"stream-{split}.npy"), mmap_mode="r")
        length, per_shard = self.settings.sequence_length, self.settings.samples_per_shard
        begin = number * per_shard * length
        samples = min(per_shard, (int(stream[-1, 2]) - 1) // length - number * per_shard)
        end = begin + samples * length + 1
        first = int(np.searchsorted(stream[:, 2], begin, side="right")) - 1
        pieces, open_unit, tokens = [], -1, np.zeros(0)
        for unit, offset, position in stream[first:-1].tolist():
            if position >= end:
                break
            if unit != open_unit:
                open_unit, tokens = unit, np.load(self.work.of_whole(what, unit), mmap_mode="r")
            pieces.append(tokens[offset + max(0, begin - position) :][: end - max(begin, position)])
            first += 1
            pieces[-1] = pieces[-1][: int(stream[first, 2]) - max(begin, position)]
        flat = np.concatenate(pieces)
        return np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]

    def publish(self, units: list[Unit], shards: list[Shard], source: str) -> dict[str, Manifest]:
        """Write tokenizers and manifests."""
        kept = np.concatenate([self.documents.splits(u) for u in units])
        size = np.concatenate([self.documents.hashes(u)[:, 2] for u in units])
        tokenizer = load_tokenizer(self.work.whole("tokenizer.json"))
        vocab_size, mark = entries(tokenizer), self.settings.answers_after
        manifests = {}
        for split, name in enumerate(self.settings.splits):
            folder = self.work.output / name
            write_whole(folder / "tokenizer.json", written(tokenizer))
            stream = np.load(self.work.whole(f"stream-{name}.npy"), mmap_mode="r")
            tokens, bytes_ = int(stream[-1, 2]), int(size[kept == split].sum())
            infos = shard_infos(folder, sum(s == name for s, _ in shards))
            manifests[name] = Manifest(
                kind="text",
                shape=[self.settings.sequence_length + 1],
                dtype=dtype_of(vocab_size),
                samples=sum(i.samples for i in infos),
                shards=infos,
                tokenizer={
                    "file": "tokenizer.json",
                    "sha256": sha256_of(folder / "tokenizer.json"),
                    "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
                    "vocab_size": vocab_size,
                    "bytes_per_token": bytes_ / tokens,
                },
                provenance={
                    "source": source,
                    "documents": int((kept == split).sum()),
                    "tokens": tokens,
                    "bytes": bytes_,
                    "seed": self.settings.seed,
                    **self.documents.left_out(units),
                    **({"unknown": unknown} if (unknown := self.unknown(units, split)) else {}),
                    **({"answers": self._answers(units, split)} if mark else {}),
                },
                facts={"answers_after": mark} if mark else {},
            )
        for name, manifest in manifests.items():
            manifest.write(self.work.output / name)
        return manifests
