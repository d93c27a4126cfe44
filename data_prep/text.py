"""Text to token shards.

    ebt-prepare text --input 'corpus/**/*.jsonl.zst' --tokenizer tokenizer.json --output data/text
    ebt-prepare text --input books/ --train-bpe 8192 --sequence-length 256 --output data/books
    mpirun -n 64 ebt-prepare text --input s3://bucket/corpus/ --tokenizer tokenizer.json --output data/text

Writes OUTPUT/train and OUTPUT/validation, each with WebDataset tars, an index beside each tar, a
manifest and the tokenizer. The same input, tokenizer and seed give the same bytes, however many
processes do the work and however often they are killed or stopped (go on with --resume).

Three passes over the input (data_prep/text_passes.py), each restartable (data_prep/job.py): hash every
document, to drop duplicates and choose the split; tokenize those that are kept; cut the streams into shards.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import typer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.options import dataclass_options
from ebt_megatron.data.manifest import Manifest, read_manifest
from ebt_megatron.data_prep import options
from ebt_megatron.data_prep.documents import (
    SUFFIXES,
    Part,
    check_kinds,
    holds_one_document,
    split_files,
    unit_bytes_for,
)
from ebt_megatron.data_prep.files import find_files
from ebt_megatron.data_prep.job import Execution, Job
from ebt_megatron.data_prep.passes import WorkFolder, finish, threshold, units_of
from ebt_megatron.data_prep.text_passes import Documents, TextSettings, TokenShards
from ebt_megatron.data_prep.tokens import load_tokenizer

_WAVE = 16  # units hashed between looks at --max-bytes


def prepare_text(
    output: Path, units: list[list[Part]], settings: TextSettings, source: str, execution: Execution = Execution()
) -> dict[str, Manifest]:
    """Tokenize, pack and write every split.

    Args:
        output: folder for train/ and validation/.
        units: the input, in order, in pieces of work.
        settings: what to make.
        source: what the input is, for the manifest.
        execution: how to run.

    Raises:
        DataError: input that cannot be read or split; no text, or too little for one sample of a split.
    """
    parts = units_of(units)
    work = WorkFolder.of(output, parts)
    files = list(dict.fromkeys((part.path, part.version) for unit in units for part in unit))
    if settings.validation_fraction and len(files) == 1 and holds_one_document(files[0][0]):
        threshold(np.zeros(1), settings.validation_fraction, "document")
    given = settings.tokenizer
    record = {k: str(v) for k, v in vars(settings).items() if k not in ("skip_broken", "most_unknown")}
    if not settings.answers_after:
        del record["answers_after"]  # preparations of before had none
    record["content"] = hashlib.sha256(load_tokenizer(given).to_str().encode()).hexdigest() if given else ""
    with Job(output, record, files, execution) as job:
        if job.complete:
            return {name: read_manifest(str(output / name)) for name in settings.splits}
        documents, count = Documents(work, settings), 0
        for first in range(0, len(parts), _WAVE):
            wave = parts[first : first + _WAVE]
            job.each("reading", documents.hash, wave, documents.file)
            count += sum(int(documents.hashes(u)[:, 2].sum()) for u in wave)
            if settings.max_bytes and count >= settings.max_bytes:
                parts = parts[: first + len(wave)]
                break
        job.once(lambda: documents.choose(parts))
        shards = TokenShards(work, documents)
        job.once(lambda: shards.make_tokenizer(parts))
        job.each("tokenizing", shards.tokenize, parts, shards.tokens)
        manifests = finish(job, shards, parts, job.once(lambda: shards.plan(parts)), source)
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
        if settings.answers_after:
            answers = sum(m.provenance["answers"] for m in manifests.values())
            job.console.print(f"answers: {answers:,} tokens")
        if unknown := sum(m.provenance.get("unknown", 0) for m in manifests.values()):
            tokens = sum(m.provenance["tokens"] for m in manifests.values())
            job.console.print(f"unknown to the tokenizer: {unknown:,} times, beside {tokens:,} tokens")
    return manifests


@dataclass_options
def main(
    *,
    output: Path = options.OUTPUT,
    input: list[str] = typer.Option(..., help=f"Globs, folders or URLs of {', '.join(SUFFIXES)}; also .gz and .zst."),
    settings: TextSettings,
    unit_megabytes: float | None = typer.Option(
        None,
        help="Input that makes one piece of work; changes nothing but speed [default: a 64th of it, at most 16].",
    ),
    execution: Execution,
    dry_run: bool = options.DRY_RUN,
) -> None:
    """Turn text into token shards for training."""

    def work() -> None:
        if bool(settings.tokenizer) == bool(settings.train_bpe):
            raise DataError("give either --tokenizer FILE or --train-bpe SIZE")
        if settings.tokenizer:
            load_tokenizer(settings.tokenizer)
        found = find_files(input, SUFFIXES)
        if not settings.skip_broken:
            check_kinds(found.files)
        size = unit_bytes_for(found.files) if unit_megabytes is None else max(1, int(unit_megabytes * 1e6))
        units = split_files(found.files, size)
        what = f"sequences of {settings.sequence_length} tokens"
        if options.announce(output, found, SUFFIXES, settings.splits, what, dry_run):
            prepare_text(output, units, settings, str(found), execution)

    options.command(work)


if __name__ == "__main__":
    typer.run(main)
