"""Text to token shards.

    python -m data_prep.text --input 'corpus/**/*.jsonl.zst' --tokenizer tokenizer.json --output data/text
    python -m data_prep.text --input books/ --train-bpe 8192 --sequence-length 256 --output data/books

Writes OUTPUT/train and OUTPUT/validation, each with WebDataset tars, an index, a manifest
and the tokenizer. The same input, tokenizer and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.documents import find_files, quickstart_documents, read_file
from ebt_megatron.data.shards import DataError, Manifest, ShardWriter, sha256_of

END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS = 4 << 20  # encoded at once by tokenizers' own threads


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
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


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json with an end-of-text entry.

    Raises:
        DataError: if it cannot be read or has no end of text.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"--tokenizer {path}: not a tokenizer.json ({error})") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"--tokenizer {path}: has no {END_OF_TEXT} entry to separate documents")
    return tokenizer


def _key(document: str, seed: int) -> bytes:
    return hashlib.blake2b(
        document.encode("utf-8", "surrogatepass"), digest_size=16, salt=seed.to_bytes(16, "little")
    ).digest()


@dataclass
class Corpus:
    """Documents without exact duplicates, split by hash.

    Attributes:
        source: yields documents, and can be iterated several times.
        validation_fraction: share of documents held out.
        seed: of the split.
    """

    source: Any
    validation_fraction: float
    seed: int

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(split, document) of each distinct document that has any text."""
        seen = set()
        for document in self.source():
            if not document.strip():
                continue
            key = _key(document, self.seed)
            if key in seen:
                continue
            seen.add(key)
            held_out = int.from_bytes(key[:8], "little") < self.validation_fraction * 2**64
            yield ("validation" if held_out else "train"), document


class Packer:
    """Packs one split's token stream into overlapping rows and writes them."""

    def __init__(self, folder: Path, sequence_length: int, dtype: Any, end_of_text: int, samples_per_shard: int):
        self.writer = ShardWriter(folder, samples_per_shard)
        self.length, self.dtype, self.end_of_text = sequence_length, dtype, end_of_text
        self.pending = np.zeros(0, dtype=dtype)
        self.documents = self.tokens = self.bytes = self.samples = 0

    def add(self, ids: list[int], size: int) -> None:
        """Take one document's tokens; `size` is its length in bytes."""
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + len(ids) + 1, self.bytes + size
        stream = np.concatenate([self.pending, np.asarray([*ids, self.end_of_text], dtype=self.dtype)])
        begin = 0
        while len(stream) - begin > self.length:
            self.writer.add(stream[begin : begin + self.length + 1])
            begin += self.length
            self.samples += 1
        self.pending = stream[begin:]


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, output: Path, sequence_length: int, samples_per_shard: int, provenance: dict,
    progress: Any = None,
) -> dict[str, Manifest]:  # fmt: skip
    """Tokenize, pack and write both splits.

    Raises:
        DataError: if there is no text, or too little for one sample of each split.
    """
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.uint16 if vocab_size <= 65536 else np.uint32
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    packers = {
        split: Packer(output / split, sequence_length, dtype, end_of_text, samples_per_shard)
        for split in ("train", "validation")
    }

    def encode(batch: list[tuple[str, str]]) -> None:
        encoded = tokenizer.encode_batch_fast([d for _, d in batch], add_special_tokens=False)
        for (split, document), e in zip(batch, encoded, strict=True):
            packers[split].add(e.ids, len(document.encode("utf-8", "replace")))
            if progress:
                progress(len(document))

    batch, characters = [], 0
    for item in corpus:
        batch.append(item)
        characters += len(item[1])
        if characters > _BATCH_CHARACTERS:
            encode(batch)
            batch, characters = [], 0
    encode(batch)

    manifests = {}
    for split, packer in packers.items():
        if not packer.documents and split == "train":
            raise DataError("the input holds no text: every document is empty; check --input and --text-key")
        if not packer.samples:
            raise DataError(
                f"only {packer.tokens} tokens for {split}, fewer than one sample of {sequence_length}: give more "
                "text, a shorter --sequence-length or a larger --validation-fraction"
            )
        packer.writer.flush()
        folder = output / split
        tokenizer.save(str(folder / "tokenizer.json"))
        manifests[split] = Manifest(
            kind="text", sequence_length=sequence_length, dtype=np.dtype(dtype).name, vocab_size=vocab_size,
            tokenizer={"file": "tokenizer.json", "sha256": sha256_of(folder / "tokenizer.json"),
                       "end_of_text": end_of_text},
            samples=packer.samples, bytes_per_token=packer.bytes / packer.tokens, shards=packer.writer.shards,
            provenance={**provenance, "documents": packer.documents, "tokens": packer.tokens,
                        "bytes": packer.bytes, "seed": corpus.seed},
        )  # fmt: skip
    for split, manifest in manifests.items():
        manifest.write(output / split)
    return manifests


def main(
    output: Path = typer.Option(..., help="Folder for train/ and validation/."),
    input: list[str] = typer.Option([], help="Globs or folders: .txt .md .rst .html .jsonl .parquet, also .gz .zst."),
    quickstart: bool = typer.Option(False, help="Use English text this machine already has instead of --input."),
    tokenizer: Path | None = typer.Option(None, help="A tokenizer.json (e.g. GPT-NeoX-20B's)."),
    train_bpe_size: int = typer.Option(0, "--train-bpe", help="Train a byte-level BPE of this many entries instead."),
    sequence_length: int = typer.Option(256, help="Tokens predicted per sample."),
    validation_fraction: float = typer.Option(0.02, min=0.0, max=0.5, help="Share of documents held out."),
    text_key: str = typer.Option("text", help="Key or column of the text in JSONL and Parquet."),
    max_bytes: int = typer.Option(0, help="Stop after this many bytes of text (0: all)."),
    samples_per_shard: int = typer.Option(8192, help="Samples in each tar."),
    seed: int = typer.Option(0, help="Of the split."),
    overwrite: bool = typer.Option(False, help="Replace what OUTPUT holds."),
    dry_run: bool = typer.Option(False, help="Say what would be read and written, and stop."),
) -> None:
    """Turn text into token shards for training."""
    console = Console(stderr=True)
    try:
        if bool(tokenizer) == bool(train_bpe_size):
            raise DataError("give either --tokenizer FILE or --train-bpe SIZE")
        if bool(input) == quickstart:
            raise DataError("give either --input or --quickstart")
        if (output / "train" / "manifest.json").exists() and not overwrite:
            raise DataError(f"{output} already holds prepared data: choose another --output, or pass --overwrite")
        if quickstart:
            what = quickstart_documents()[0]
            raw = lambda: (d for _, d in quickstart_documents()[1])  # noqa: E731
        else:
            files = find_files(input)
            what = f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB"
            raw = lambda: (d for f in files for d in read_file(f, text_key))  # noqa: E731

        def limited() -> Iterator[str]:
            size = 0
            for document in raw():
                if max_bytes and size >= max_bytes:
                    return
                size += len(document)
                yield document

        console.print(f"reading {what}")
        if dry_run:
            console.print(f"would write {output}/train and {output}/validation, sequences of {sequence_length} tokens")
            return
        corpus = Corpus(limited, validation_fraction, seed)
        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,.0f} MB"), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            if tokenizer:
                loaded = load_tokenizer(tokenizer)
            else:
                task = bar.add_task("training the tokenizer", total=None)
                loaded = train_bpe((d for split, d in corpus if split == "train"), train_bpe_size)
                bar.remove_task(task)
            task = bar.add_task("tokenizing", total=None)
            shutil.rmtree(output / "train", ignore_errors=True)
            shutil.rmtree(output / "validation", ignore_errors=True)
            manifests = prepare(corpus, loaded, output, sequence_length, samples_per_shard, {"source": what},
                                lambda n: bar.advance(task, n / 1e6))  # fmt: skip
    except DataError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
    for split, m in manifests.items():
        made = m.provenance
        console.print(
            f"{split}: {made['documents']:,} documents, {made['tokens']:,} tokens, {m.samples:,} samples in "
            f"{len(m.shards)} shards, {m.bytes_per_token:.2f} bytes a token",
            soft_wrap=True,
        )


if __name__ == "__main__":
    typer.run(main)
