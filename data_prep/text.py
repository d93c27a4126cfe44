"""Text to token shards.

    python -m data_prep.text --input 'corpus/**/*.jsonl.zst' --tokenizer tokenizer.json --output data/text
    python -m data_prep.text --input books/ --train-bpe 8192 --sequence-length 256 --output data/books
    mpirun -n 64 python -m data_prep.text --input s3://bucket/corpus/ --tokenizer tokenizer.json --output data/text

Writes OUTPUT/train and OUTPUT/validation, each with WebDataset tars, an index beside each tar, a
manifest and the tokenizer. The same input, tokenizer and seed give the same bytes, however many
processes do the work and however often they are killed (go on with --resume).

Three passes over the input, each restartable (data_prep/job.py): hash every document, to drop
duplicates and choose the split; tokenize those that are kept; cut the streams into shards.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ebt_megatron.cli import guarded
from ebt_megatron.data.shards import (
    DataError,
    Manifest,
    index_name,
    read_manifest,
    sha256_of,
    shard_infos,
    shard_name,
    write_shard,
)

from . import options
from .documents import SUFFIXES, Part, read_part, split_files
from .files import InputFile, find_files
from .job import Job

END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS = 4 << 20  # encoded at once by tokenizers' own threads
_BPE_CHARACTERS = 1 << 30  # a tokenizer is trained on no more than this
_WAVE = 16  # units hashed between looks at --max-bytes


def train_bpe(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose entry 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@functools.cache
def load_tokenizer(given: str | Path) -> Tokenizer:
    """A tokenizer with an end-of-text entry.

    Args:
        given: a tokenizer.json, or its name on the Hugging Face hub ("EleutherAI/gpt-neox-20b").

    Raises:
        DataError: if it cannot be read or fetched, or has no end of text.
    """
    name, is_file = str(given), Path(given).is_file()
    try:
        tokenizer = Tokenizer.from_file(name) if is_file else Tokenizer.from_pretrained(name)
    except Exception as error:  # both raise whatever the libraries beneath them do
        reason = " ".join(str(error).split())
        if is_file:
            raise DataError(f"--tokenizer {name}: not a tokenizer.json ({reason})") from None
        raise DataError(f"--tokenizer {name} is no file here, and not to be had from the Hugging Face hub ({reason}): "
                        "give a tokenizer.json") from None  # fmt: skip
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"--tokenizer {name}: has no {END_OF_TEXT} entry to separate documents")
    return tokenizer


@dataclass(frozen=True)
class TextSettings:
    """What the shards depend on besides the input.

    Attributes:
        tokenizer: a tokenizer.json or its name on the hub, or None to train one.
        train_bpe: entries of the tokenizer to train.
        sequence_length: tokens predicted per sample.
        samples_per_shard: in every tar but the last.
        validation_fraction: share of documents held out; 0: no validation folder.
        text_key: of JSONL and Parquet.
        max_bytes: text after this many bytes is left out; 0: none is.
        seed: of the split.
    """

    tokenizer: str | Path | None = None
    train_bpe: int = 0
    sequence_length: int = 256
    samples_per_shard: int = 8192
    validation_fraction: float = 0.02
    text_key: str = "text"
    max_bytes: int = 0
    seed: int = 0

    @property
    def splits(self) -> list[str]:
        """Folders to make."""
        return ["train", "validation"] if self.validation_fraction else ["train"]


@dataclass(frozen=True)
class Unit:
    """A piece of work: consecutive parts of the input."""

    number: int
    parts: list[Part]


@dataclass(frozen=True)
class Passes:
    """What every process does to a unit or a shard; files go to `work`.

    Per unit: documents-N.npy, a row (key [2 x u8], bytes) for each document; kept-N.npy, the split of
    each (-1: dropped); lengths-N.npy and tokens-N.npy, of those kept, each ended by the end of text.
    """

    settings: TextSettings
    output: Path

    def file(self, what: str, number: int) -> Path:
        """An intermediate file of a unit."""
        return self.output / ".work" / f"{what}-{number:06d}.npy"

    def shard_index(self, item: tuple[str, int]) -> Path:
        """The file that shows shard (split, number) is finished."""
        return self.output / item[0] / index_name(shard_name(item[1]))

    def _save(self, what: str, number: int, array: np.ndarray) -> None:
        path = self.file(what, number)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.save(stream, array)
        os.replace(partial, path)

    def documents(self, unit: Unit) -> Iterator[str]:
        """The unit's documents, in order."""
        return (d for part in unit.parts for d in read_part(part, self.settings.text_key))

    def hash(self, unit: Unit) -> None:
        """First pass: each document's key and size; empty ones have size 0."""
        salt, rows = self.settings.seed.to_bytes(16, "little"), []
        for document in self.documents(unit):
            data = document.encode("utf-8", "surrogatepass")
            key = hashlib.blake2b(data, digest_size=16, salt=salt).digest()
            rows.append((*np.frombuffer(key, dtype="<u8"), len(data) if document.strip() else 0))
        self._save("documents", unit.number, np.array(rows, dtype="<u8").reshape(-1, 3))

    def kept(self, unit: Unit) -> Iterator[tuple[int, str]]:
        """(split, document) of the unit's documents that are kept."""
        splits = np.load(self.file("kept", unit.number))
        return ((s, d) for s, d in zip(splits.tolist(), self.documents(unit), strict=True) if s >= 0)

    def tokenize(self, unit: Unit) -> None:
        """Second pass: the tokens of the documents that are kept."""
        tokenizer = load_tokenizer(self.output / ".work/tokenizer.json")
        end = tokenizer.token_to_id(END_OF_TEXT)
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.uint32
        streams, lengths = [np.zeros(0, dtype)], []

        def encode(batch: list[str]) -> None:
            for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                streams.append(np.array([*e.ids, end], dtype))
                lengths.append(len(e.ids) + 1)

        batch, characters = [], 0
        for _, document in self.kept(unit):
            batch.append(document)
            characters += len(document)
            if characters > _BATCH_CHARACTERS:
                encode(batch)
                batch, characters = [], 0
        encode(batch)
        self._save("lengths", unit.number, np.array(lengths, dtype=np.int64))
        self._save("tokens", unit.number, np.concatenate(streams))

    def write(self, item: tuple[str, int]) -> None:
        """Third pass: one shard, cut from its split's stream.

        The stream is described by stream-SPLIT.npy: (unit, offset in its tokens, position in the stream) of
        each document, and a last row that ends it.
        """
        split, number = item
        stream = np.load(self.output / ".work" / f"stream-{split}.npy", mmap_mode="r")
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
                open_unit, tokens = unit, np.load(self.file("tokens", unit), mmap_mode="r")
            pieces.append(tokens[offset + max(0, begin - position) :][: end - max(begin, position)])
            first += 1
            pieces[-1] = pieces[-1][: int(stream[first, 2]) - max(begin, position)]
        flat = np.concatenate(pieces)
        rows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
        write_shard(self.output / split, number, "text", rows)

    # --- between the passes, on the first rank -----------------------------------------------------

    def choose(self, units: list[Unit]) -> None:
        """The split of every document; duplicates, empty ones and those after max_bytes are dropped."""
        arrays = [np.load(self.file("documents", u.number)) for u in units]
        table = np.concatenate(arrays) if arrays else np.zeros((0, 3), "<u8")
        size = table[:, 2].astype(np.int64)
        keep = size > 0
        if self.settings.max_bytes:
            keep &= np.cumsum(size) - size < self.settings.max_bytes
        order = np.lexsort((table[:, 1], table[:, 0]))  # stable: of equal documents the first stays first
        unique = np.ones(len(table), dtype=bool)
        unique[order[1:]] = (table[order[1:], :2] != table[order[:-1], :2]).any(axis=1)
        held_out = table[:, 0].astype(np.float64) < self.settings.validation_fraction * 2.0**64
        splits = np.where(keep & unique, held_out.astype(np.int8), np.int8(-1))
        if not (splits == 0).any():
            raise DataError("the input holds no text: every document is empty; check --input and --text-key")
        for unit, part in zip(units, np.split(splits, np.cumsum([len(a) for a in arrays])[:-1]), strict=True):
            self._save("kept", unit.number, part)

    def make_tokenizer(self, units: list[Unit]) -> None:
        """The tokenizer, given or trained, at work/tokenizer.json."""
        path = self.output / ".work/tokenizer.json"
        if path.exists():
            return

        def some() -> Iterator[str]:
            characters = 0
            for split, document in (kept for unit in units for kept in self.kept(unit)):
                if split == 0:
                    yield document
                    characters += len(document)
                    if characters > _BPE_CHARACTERS:
                        return

        given = self.settings.tokenizer
        tokenizer = load_tokenizer(given) if given else train_bpe(some(), self.settings.train_bpe)
        partial = path.with_suffix(".partial")
        tokenizer.save(str(partial))
        os.replace(partial, path)

    def streams(self, units: list[Unit]) -> list[tuple[str, int]]:
        """Describe each split's stream; returns the shards to write."""
        shards = []
        for split, name in enumerate(self.settings.splits):
            rows, position = [np.zeros((0, 3), np.int64)], 0
            for unit in units:
                splits = np.load(self.file("kept", unit.number))
                lengths = np.load(self.file("lengths", unit.number))
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
            stream = np.concatenate([*rows, [[-1, 0, position]]])
            np.save(self.output / ".work" / f"stream-{name}.npy", stream)
            shards += [(name, k) for k in range(-(-samples // self.settings.samples_per_shard))]
        return shards

    def publish(self, units: list[Unit], shards: list[tuple[str, int]], source: str) -> dict[str, Manifest]:
        """Write tokenizers and manifests."""
        kept = np.concatenate([np.load(self.file("kept", u.number)) for u in units])
        size = np.concatenate([np.load(self.file("documents", u.number))[:, 2] for u in units])
        tokenizer = load_tokenizer(self.output / ".work/tokenizer.json")
        vocab_size = tokenizer.get_vocab_size()
        manifests = {}
        for split, name in enumerate(self.settings.splits):
            folder = self.output / name
            tokenizer.save(str(folder / "tokenizer.json"))
            stream = np.load(self.output / ".work" / f"stream-{name}.npy", mmap_mode="r")
            tokens, bytes_ = int(stream[-1, 2]), int(size[kept == split].sum())
            infos = shard_infos(folder, sum(s == name for s, _ in shards))
            manifests[name] = Manifest(
                kind="text", shape=[self.settings.sequence_length + 1],
                dtype="uint16" if vocab_size <= 65536 else "uint32",
                samples=sum(i.samples for i in infos), shards=infos,
                tokenizer={
                    "file": "tokenizer.json", "sha256": sha256_of(folder / "tokenizer.json"),
                    "end_of_text": tokenizer.token_to_id(END_OF_TEXT), "vocab_size": vocab_size,
                    "bytes_per_token": bytes_ / tokens,
                },
                provenance={"source": source, "documents": int((kept == split).sum()), "tokens": tokens,
                            "bytes": bytes_, "seed": self.settings.seed},
            )  # fmt: skip
        for name, manifest in manifests.items():
            manifest.write(self.output / name)
        return manifests


def prepare_text(
    output: Path, units: list[list[Part]], settings: TextSettings, source: str, *,
    fingerprint: Sequence[InputFile] = (), workers: int = 1, resume: bool = False, overwrite: bool = False,
) -> dict[str, Manifest]:  # fmt: skip
    """Tokenize, pack and write every split.

    Args:
        output: folder for train/ and validation/.
        units: the input, in order, in pieces of work.
        settings: what to make.
        source: what the input is, for the manifest.
        fingerprint: of the input; a job is only resumed with the same.
        workers, resume, overwrite: see Job.

    Raises:
        DataError: input that cannot be read; no text, or too little for one sample of a split.
    """
    pieces, passes = [Unit(i, parts) for i, parts in enumerate(units)], Passes(settings, output)
    given = settings.tokenizer
    content = given and hashlib.sha256(load_tokenizer(given).to_str().encode()).hexdigest()
    record = {"settings": {k: str(v) for k, v in vars(settings).items()}, "input": fingerprint,
              "tokenizer": content, "units": len(units)}  # fmt: skip
    with Job(output, record, workers, resume, overwrite) as job:
        if job.complete:
            return {name: read_manifest(str(output / name)) for name in settings.splits}
        count = 0
        for first in range(0, len(pieces), _WAVE):
            wave = pieces[first : first + _WAVE]
            job.each("reading", passes.hash, wave, lambda u: passes.file("documents", u.number))
            count += sum(int(np.load(passes.file("documents", u.number))[:, 2].sum()) for u in wave)
            if settings.max_bytes and count >= settings.max_bytes:
                pieces = pieces[: first + len(wave)]
                break
        job.once(lambda: passes.choose(pieces))
        job.once(lambda: passes.make_tokenizer(pieces))
        job.each("tokenizing", passes.tokenize, pieces, lambda u: passes.file("tokens", u.number))
        shards = job.once(lambda: passes.streams(pieces))
        job.each("writing shards", passes.write, shards, passes.shard_index)
        manifests = job.once(lambda: passes.publish(pieces, shards, source))
        job.finish()
        for name, manifest in manifests.items():
            made = manifest.provenance
            job.console.print(
                f"{name}: {made['documents']:,} documents, {made['tokens']:,} tokens, {manifest.samples:,} samples in "
                f"{len(manifest.shards)} shards, {manifest.tokenizer['bytes_per_token']:.2f} bytes a token",
                soft_wrap=True,
            )
    return manifests


def main(
    output: Path = options.OUTPUT,
    input: list[str] = typer.Option(..., help=f"Globs, folders or URLs of {', '.join(SUFFIXES)}; also .gz and .zst."),
    tokenizer: str | None = typer.Option(None, help="A tokenizer.json, or its hub name: EleutherAI/gpt-neox-20b."),
    train_bpe_size: int = typer.Option(0, "--train-bpe", help="Train a byte-level BPE of this many entries instead."),
    sequence_length: int = typer.Option(256, min=1, help="Tokens predicted per sample."),
    validation_fraction: float = options.VALIDATION_FRACTION,
    text_key: str = typer.Option("text", help="Key or column of the text in JSONL and Parquet."),
    max_bytes: int = typer.Option(0, help="Stop after this many bytes of text (0: all)."),
    samples_per_shard: int = typer.Option(8192, min=1, help="Samples in each tar."),
    unit_megabytes: float = typer.Option(16, help="Input that makes one piece of work; changes nothing but speed."),
    seed: int = options.SEED,
    workers: int = options.WORKERS,
    resume: bool = options.RESUME,
    overwrite: bool = options.OVERWRITE,
    dry_run: bool = options.DRY_RUN,
) -> None:
    """Turn text into token shards for training."""

    def work() -> None:
        if bool(tokenizer) == bool(train_bpe_size):
            raise DataError("give either --tokenizer FILE or --train-bpe SIZE")
        settings = TextSettings(tokenizer, train_bpe_size, sequence_length, samples_per_shard, validation_fraction,
                                text_key, max_bytes, seed)  # fmt: skip
        files = find_files(input, SUFFIXES)
        source = f"{len(files)} files, {sum(f.bytes for f in files) / 1e6:,.1f} MB"
        units = split_files(files, max(1, int(unit_megabytes * 1e6)))
        if options.announce(output, source, settings.splits, f"sequences of {sequence_length} tokens", dry_run):
            prepare_text(output, units, settings, source, fingerprint=files, workers=workers, resume=resume,
                         overwrite=overwrite)  # fmt: skip

    guarded(work, quiet=not options.first_rank())


if __name__ == "__main__":
    typer.run(main)
