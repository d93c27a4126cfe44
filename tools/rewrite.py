"""Prepared folders into one of another shard size: what `ebt_megatron.tools.shards reshard` and `merge` do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import write_whole
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import Manifest, index_name
from ebt_megatron.data.shards import (
    OutputLock,
    clear_partial,
    clear_shards,
    made_in,
    shard_infos,
    shard_name,
    write_shard,
)


def _common(sources: list[ShardFolder]) -> Manifest:
    """The first manifest, which the others must fit.

    Raises:
        DataError: naming the folder that does not, and in what.
    """
    first = sources[0].manifest
    for source in sources[1:]:
        m = source.manifest
        for what, ours, theirs in (
            ("kind", m.kind, first.kind),
            ("sample shape", m.shape, first.shape),
            ("dtype", m.dtype, first.dtype),
            ("classes", m.classes, first.classes),
            ("captions' encoder or length", m.caption_key, first.caption_key),
            ("tokenizer or encoder", m.sidecar.get("sha256"), first.sidecar.get("sha256")),
            ("facts", m.facts, first.facts),
        ):
            if ours != theirs:
                raise DataError(f"{source.folder} has another {what} than {sources[0].folder}: they cannot be one")
    return first


def _pieces(sources: list[ShardFolder], begin: int, end: int) -> Iterator[tuple[ShardFolder, range]]:
    """Samples begin .. end - 1 of all sources one after the other, as ranges of each."""
    first = 0
    for source in sources:
        inside = range(max(begin - first, 0), min(end - first, len(source)))
        if inside:
            yield source, inside
        first += len(source)


def _provenance(sources: list[ShardFolder]) -> dict[str, Any]:
    """Counts added up, what is the same kept, and where it all came from."""
    parts = [s.manifest.provenance for s in sources]
    out: dict[str, Any] = {}
    for key in parts[0]:
        values = [p.get(key) for p in parts]
        if key != "seed" and all(isinstance(v, int | float) for v in values):
            out[key] = sum(values)
        elif all(v == values[0] for v in values):
            out[key] = values[0]
    return {**out, "rewritten_from": [s.folder for s in sources]}


def rewrite(folders: list[str], output: Path, samples_per_shard: int, overwrite: bool) -> Manifest:
    """Write the samples of folders, in order, as one folder; repeated after a kill it goes on.

    Args:
        folders: prepared, of one kind, shape and tokenizer or encoder.
        output: folder to make.
        samples_per_shard: in every tar but the last.
        overwrite: remove the shards that output holds.

    Raises:
        DataError: folders that cannot be one, an output that holds other data, that is one of the folders, or that
            another process writes.
    """
    sources = [ShardFolder(folder) for folder in folders]
    first = _common(sources)
    for source in sources:
        if not source.remote and Path(source.folder).resolve() == output.resolve():
            raise DataError(f"{output} is read and written: choose another --output")
    with OutputLock(output):
        return _write(sources, first, output, samples_per_shard, overwrite)


def _write(
    sources: list[ShardFolder], first: Manifest, output: Path, samples_per_shard: int, overwrite: bool
) -> Manifest:
    total = sum(len(s) for s in sources)
    made_from = [[s.folder, hashlib.sha256(Path(s.folder, "manifest.json").read_bytes()).hexdigest()] for s in sources]
    record, wanted = output / "rewrite.json", json.dumps([made_from, samples_per_shard])
    if overwrite:
        clear_shards(output)
        record.unlink(missing_ok=True)
    half_done = record.exists() and record.read_text() == wanted
    if (output / "manifest.json").exists() or (not half_done and (record.exists() or made_in(output))):
        raise DataError(f"{output} already holds data: choose another --output, or pass --overwrite")
    write_whole(record, wanted)
    count = -(-total // samples_per_shard)
    for number in track(range(count), description="writing shards", console=Console(stderr=True)):
        if (output / index_name(shard_name(number))).exists():
            continue
        begin = number * samples_per_shard
        pieces = list(_pieces(sources, begin, min(begin + samples_per_shard, total)))
        samples = np.stack([source.row(i) for source, rows in pieces for i in rows])
        beside = {
            name: np.concatenate([source.gather_beside(name, np.array(rows)) for source, rows in pieces])
            for name in sources[0].beside
        }
        write_shard(output, number, first.kind, samples, **beside)
    for recorded in first.files:
        write_whole(output / recorded["file"], sources[0].verified(recorded).read_bytes())
    tokenizer = dict(first.tokenizer)
    if tokenizer:  # by tokens; every sample has as many
        shares = [s.manifest.tokenizer["bytes_per_token"] * len(s) / total for s in sources]
        tokenizer["bytes_per_token"] = sum(shares)
    made, infos = _provenance(sources), shard_infos(output, count)
    manifest = replace(first, samples=total, shards=infos, provenance=made, tokenizer=tokenizer)
    clear_partial(output)
    manifest.write(output)
    record.unlink()
    return manifest
