"""Text to token shards.

    python -m data_prep.text --input 'corpus/**/*.jsonl.zst' --tokenizer tokenizer.json --output data/text
    python -m data_prep.text --input books/ --train-bpe 8192 --sequence-length 256 --output data/books
    mpirun -n 64 python -m data_prep.text --input s3://bucket/corpus/ --tokenizer tokenizer.json --output data/text

Writes OUTPUT/train and OUTPUT/validation, each with WebDataset tars, an index beside each tar, a
manifest and the tokenizer. The same input, tokenizer and seed give the same bytes, however many
processes do the work and however often they are killed or stopped (go on with --resume).

Three passes over the input, each restartable (data_prep/job.py): hash every document, to drop
duplicates and choose the split; tokenize those that are kept; cut the streams into shards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing
from ebt_megatron.data.shards import Manifest, read_manifest, sha256_of, shard_infos, write_shard

from . import options
from .documents import SUFFIXES, Part, Tally, check_kinds, holds_one_document, read_part, split_files
from .files import find_files
from .job import Job
from .passes import Passes, Settings, Unit, key_of, threshold, units_of, write_skipped
from .tokens import END_OF_TEXT, dtype_of, encode, entries, load_tokenizer, train_bpe

_BPE_CHARACTERS = 1 << 30  # a tokenizer is trained on no more than this
_WAVE = 16  # units hashed between looks at --max-bytes


@dataclass(frozen=True)
class TextSettings(Settings):
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
        skip_broken: leave out lines and files that cannot be read; else they end the preparation.
    """

    tokenizer: str | Path | None = None
    train_bpe: int = 0
    sequence_length: int = 256
    samples_per_shard: int = 8192
    validation_fraction: float = 0.02
    text_key: str = "text"
    max_bytes: int = 0
    seed: int = 0
    skip_broken: bool = False


@dataclass(frozen=True)
class TextPasses(Passes):
    """What every process does to a unit or a shard.

    Per unit: documents-KEY.npy, a row (key [2 x u8], bytes) for each document, and tally-KEY.json, what was
    not taken as it stood. Of the whole input: kept-N.npy, the split of each document of unit N (-1:
    dropped); lengths-N.npy and tokens-N.npy, of those kept, each ended by the end of text.
    """

    settings: TextSettings

    def of(self, what: str, number: int) -> Path:
        """A file of a unit that depends on the others."""
        return self.whole(f"{what}-{number:06d}.npy")

    def hashes(self, unit: Unit) -> np.ndarray:
        """The rows of documents-KEY.npy."""
        return np.load(self.file("documents", unit.key))

    def documents(self, unit: Unit, tally: Tally | None = None) -> Iterator[str]:
        """The unit's documents, in order."""
        tally = tally or Tally(self.settings.skip_broken)
        return (d for part in unit.parts for d in read_part(part, self.settings.text_key, tally))

    def hash(self, unit: Unit) -> None:
        """First pass: each document's key and size; empty ones have size 0."""
        salt, rows, tally = self.settings.seed.to_bytes(16, "little"), [], Tally(self.settings.skip_broken)
        for document in self.documents(unit, tally):
            data = document.encode()
            key = hashlib.blake2b(data, digest_size=16, salt=salt).digest()
            rows.append((*np.frombuffer(key, dtype="<u8"), len(data) if document.strip() else 0))
        self.file("tally", unit.key, "json").write_text(json.dumps(tally.counts()))
        self.save(self.file("documents", unit.key), np.array(rows, dtype="<u8").reshape(-1, 3))

    def kept(self, unit: Unit) -> Iterator[tuple[int, str]]:
        """(split, document) of the unit's documents that are kept."""
        splits = np.load(self.of("kept", unit.number)).tolist()
        for split, document in itertools.zip_longest(splits, self.documents(unit)):
            if split is None or document is None:
                raise DataError(f"{unit.parts[0].path}, or a file after it, changed while it was read: pass --resume")
            if split >= 0:
                yield split, document

    def tokenize(self, unit: Unit) -> None:
        """Second pass: the tokens of the documents that are kept."""
        tokenizer = load_tokenizer(self.whole("tokenizer.json"))
        streams, lengths = [np.zeros(0, dtype_of(entries(tokenizer)))], []
        for tokens in encode(tokenizer, (document for _, document in self.kept(unit))):
            streams.append(tokens)
            lengths.append(len(tokens))
        self.save(self.of("lengths", unit.number), np.array(lengths, dtype=np.int64))
        self.save(self.of("tokens", unit.number), np.concatenate(streams))

    def write(self, item: tuple[str, int]) -> None:
        """Third pass: one shard, cut from its split's stream.

        The stream is described by stream-SPLIT.npy: (unit, offset in its tokens, position in the stream) of
        each document, and a last row that ends it.
        """
        split, number = item
        stream = np.load(self.whole(f"stream-{split}.npy"), mmap_mode="r")
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
                open_unit, tokens = unit, np.load(self.of("tokens", unit), mmap_mode="r")
            pieces.append(tokens[offset + max(0, begin - position) :][: end - max(begin, position)])
            first += 1
            pieces[-1] = pieces[-1][: int(stream[first, 2]) - max(begin, position)]
        flat = np.concatenate(pieces)
        rows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
        write_shard(self.output / split, number, "text", rows)

    # --- between the passes, on the first rank -----------------------------------------------------

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
            self.save(self.of("kept", unit.number), part)

    def make_tokenizer(self, units: list[Unit]) -> None:
        """The tokenizer, given or trained, at work/tokenizer.json."""
        path = self.whole("tokenizer.json")
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
        with replacing(path) as partial:
            tokenizer.save(str(partial))

    def streams(self, units: list[Unit]) -> list[tuple[str, int]]:
        """Describe each split's stream; returns the shards to write."""
        shards = []
        for split, name in enumerate(self.settings.splits):
            rows, position = [np.zeros((0, 3), np.int64)], 0
            for unit in units:
                splits = np.load(self.of("kept", unit.number))
                lengths = np.load(self.of("lengths", unit.number))
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
            self.save(self.whole(f"stream-{name}.npy"), stream)
            shards += [(name, k) for k in range(-(-samples // self.settings.samples_per_shard))]
        return shards

    def publish(self, units: list[Unit], shards: list[tuple[str, int]], source: str) -> dict[str, Manifest]:
        """Write tokenizers and manifests."""
        kept = np.concatenate([np.load(self.of("kept", u.number)) for u in units])
        size = np.concatenate([self.hashes(u)[:, 2] for u in units])
        tokenizer = load_tokenizer(self.whole("tokenizer.json"))
        vocab_size = entries(tokenizer)
        manifests = {}
        for split, name in enumerate(self.settings.splits):
            folder = self.output / name
            with replacing(folder / "tokenizer.json") as partial:
                tokenizer.save(str(partial))
            stream = np.load(self.whole(f"stream-{name}.npy"), mmap_mode="r")
            tokens, bytes_ = int(stream[-1, 2]), int(size[kept == split].sum())
            infos = shard_infos(folder, sum(s == name for s, _ in shards))
            manifests[name] = Manifest(
                kind="text", shape=[self.settings.sequence_length + 1],
                dtype=dtype_of(vocab_size),
                samples=sum(i.samples for i in infos), shards=infos,
                tokenizer={
                    "file": "tokenizer.json", "sha256": sha256_of(folder / "tokenizer.json"),
                    "end_of_text": tokenizer.token_to_id(END_OF_TEXT), "vocab_size": vocab_size,
                    "bytes_per_token": bytes_ / tokens,
                },
                provenance={"source": source, "documents": int((kept == split).sum()), "tokens": tokens,
                            "bytes": bytes_, "seed": self.settings.seed, **self.left_out(units)},
            )  # fmt: skip
        for name, manifest in manifests.items():
            manifest.write(self.output / name)
        return manifests

    def left_out(self, units: list[Unit]) -> dict[str, int]:
        """What was not taken as it stood: lines and files skipped (which skipped.txt names), nulls, characters."""
        tallies = [json.loads(self.file("tally", u.key, "json").read_text()) for u in units]
        write_skipped(self.output, [line for t in tallies for line in t["named"]])
        return {key: sum(t[key] for t in tallies) for key in ("skipped", "nulls", "replaced")}


def prepare_text(
    output: Path, units: list[list[Part]], settings: TextSettings, source: str, *, workers: int = 1,
    resume: bool = False, overwrite: bool = False,
) -> dict[str, Manifest]:  # fmt: skip
    """Tokenize, pack and write every split.

    Args:
        output: folder for train/ and validation/.
        units: the input, in order, in pieces of work.
        settings: what to make.
        source: what the input is, for the manifest.
        workers, resume, overwrite: see Job.

    Raises:
        DataError: input that cannot be read or split; no text, or too little for one sample of a split.
    """
    pieces = units_of(units)
    passes = TextPasses(output, settings, input=key_of(*(u.key for u in pieces)))
    files = list(dict.fromkeys((part.path, part.version) for unit in units for part in unit))
    if settings.validation_fraction and len(files) == 1 and holds_one_document(files[0][0]):
        threshold(np.zeros(1), settings.validation_fraction, "document")
    given = settings.tokenizer
    record = {k: str(v) for k, v in vars(settings).items() if k != "skip_broken"}  # it changes nothing that was made
    record["content"] = hashlib.sha256(load_tokenizer(given).to_str().encode()).hexdigest() if given else ""
    with Job(output, record, files, workers, resume, overwrite) as job:
        if job.complete:
            return {name: read_manifest(str(output / name)) for name in settings.splits}
        count = 0
        for first in range(0, len(pieces), _WAVE):
            wave = pieces[first : first + _WAVE]
            job.each("reading", passes.hash, wave, lambda u: passes.file("documents", u.key))
            count += sum(int(passes.hashes(u)[:, 2].sum()) for u in wave)
            if settings.max_bytes and count >= settings.max_bytes:
                pieces = pieces[: first + len(wave)]
                break
        job.once(lambda: passes.choose(pieces))
        job.once(lambda: passes.make_tokenizer(pieces))
        job.each("tokenizing", passes.tokenize, pieces, lambda u: passes.of("tokens", u.number))
        shards = job.once(lambda: passes.streams(pieces))
        job.once(passes.clear)
        job.each("writing shards", passes.write, shards, passes.shard_index)
        manifests = job.once(lambda: passes.publish(pieces, shards, source))
        job.finish()
        for name, manifest in manifests.items():
            made = manifest.provenance
            job.console.print(
                f"{name}: {made['documents']:,} documents, {made['tokens']:,} tokens, {manifest.samples:,} samples in "
                f"{len(manifest.shards)} shards, {manifest.tokenizer['bytes_per_token']:.2f} bytes a token"
            )
        made = manifests["train"].provenance
        if made["skipped"] or made["nulls"] or made["replaced"]:
            job.console.print(
                f"left out: {made['skipped']:,} lines or files that cannot be read (skipped.txt names them) and "
                f"{made['nulls']:,} nulls; {made['replaced']:,} characters became U+FFFD"
            )
    return manifests


def main(
    output: Path = options.OUTPUT,
    input: list[str] = typer.Option(..., help=f"Globs, folders or URLs of {', '.join(SUFFIXES)}; also .gz and .zst."),
    tokenizer: str | None = typer.Option(
        None, parser=options.name, help="A tokenizer.json, or its hub name: EleutherAI/gpt-neox-20b."
    ),
    train_bpe_size: int = typer.Option(0, "--train-bpe", min=0, help="Train a byte-level BPE of this size instead."),
    sequence_length: int = typer.Option(256, min=1, help="Tokens predicted per sample."),
    validation_fraction: float = options.VALIDATION_FRACTION,
    text_key: str = typer.Option("text", help="Key or column of the text in JSONL and Parquet."),
    max_bytes: int = typer.Option(0, min=0, help="Stop after this many bytes of text (0: all)."),
    samples_per_shard: int = typer.Option(8192, min=1, help="Samples in each tar."),
    unit_megabytes: float = typer.Option(16, help="Input that makes one piece of work; changes nothing but speed."),
    skip_broken: bool = options.SKIP_BROKEN,
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
                                text_key, max_bytes, seed, skip_broken)  # fmt: skip
        if tokenizer:
            load_tokenizer(tokenizer)
        found = find_files(input, SUFFIXES)
        if not skip_broken:
            check_kinds(found.files)
        units, what = (
            split_files(found.files, max(1, int(unit_megabytes * 1e6))),
            f"sequences of {sequence_length} tokens",
        )
        if options.announce(output, found, SUFFIXES, settings.splits, what, dry_run):
            prepare_text(output, units, settings, str(found), workers=workers, resume=resume, overwrite=overwrite)

    options.command(work)


if __name__ == "__main__":
    typer.run(main)
