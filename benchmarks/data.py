"""Benchmark the loader against plain webdataset and energon on the same shards, and preparation by workers.

Everything delivers the same thing: shuffled micro-batches of tokens, int64 [micro_batch, S + 1].

    python -m benchmarks.data                # the table of docs/performance.md
    python -m benchmarks.data --quick
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ebt_megatron.core.files import sha256_of, write_whole
from ebt_megatron.core.machine import machine
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.data.shards import shard_infos, write_shard

if TYPE_CHECKING:
    from torch import Tensor

_PER_SHARD = 1000
_GROUP = 4


def make_shards(folder: Path, samples: int, length: int) -> None:
    """Shards of random uint16 tokens, samples of length + 1."""
    generator = np.random.default_rng(0)
    count = -(-samples // _PER_SHARD)
    for k in track(range(count), description="making shards", console=Console(stderr=True)):
        size = min(_PER_SHARD, samples - k * _PER_SHARD)
        write_shard(folder, k, "text", generator.integers(0, 50000, (size, length + 1), np.uint16))
    (folder / "tokenizer.json").write_text("{}")
    Manifest(
        kind="text",
        shape=[length + 1],
        dtype="uint16",
        samples=samples,
        shards=shard_infos(folder, count),
        provenance={"source": "random tokens"},
        tokenizer={
            "file": "tokenizer.json",
            "sha256": sha256_of(folder / "tokenizer.json"),
            "end_of_text": 0,
            "vocab_size": 50000,
            "bytes_per_token": 4.0,
        },
    ).write(folder)


def gathered(folder: Path, micro_batch: int) -> Iterator[Tensor]:
    """All rows in one array in memory; numpy gathers a micro-batch of them in random order."""
    import torch

    rows = np.stack(list(ShardFolder(str(folder)).rows()))
    order = np.random.default_rng(0).permutation(len(rows))
    for i in itertools.cycle(range(0, len(order) - micro_batch + 1, micro_batch)):
        yield torch.from_numpy(rows[order[i : i + micro_batch]].astype(np.int64))


def converted(folder: Path, micro_batch: int) -> Iterator[Tensor]:
    """The limit: neighbouring rows read once, in order, and written once as int64 to memory that is there."""
    import torch

    rows = torch.from_numpy(np.stack(list(ShardFolder(str(folder)).rows())))
    out = torch.empty(micro_batch, rows.shape[1], dtype=torch.int64)
    for i in itertools.cycle(range(0, len(rows) - micro_batch + 1, micro_batch)):
        yield out.copy_(rows[i : i + micro_batch])


def ours(folder: Path | str, micro_batch: int, thread: bool, together: int = 0) -> Iterator[Tensor]:
    """This project's loader, read ahead in a thread or by the caller: a permutation of all samples, or by groups.

    Args:
        folder: path or URL.
        micro_batch: samples in one.
        thread: whether a thread reads ahead.
        together: shards in a group; 0: all.
    """
    from ebt_megatron.config import load_recipe
    from ebt_megatron.data.loader import Loader

    length = ShardFolder(str(folder)).manifest.sequence_length
    recipe = load_recipe(
        None,
        [
            "model.size=tiny",
            f"data.train=[{folder}]",
            f"data.sequence_length={length}",
            f"training.micro_batch_size={micro_batch}",
            f"training.global_batch_size={micro_batch}",
            f"data.shuffle_shards={together}",
        ],
    )
    loader = Loader(recipe, "train", 0, 1)
    if thread:
        return (batch.samples for batch in loader)
    together = recipe.data.prefetch // 2 * micro_batch  # as much at once as the thread reads
    chunks = (loader.read(list(range(i, i + together))).samples for i in itertools.count(0, together))
    return (part for chunk in chunks for part in chunk.split(micro_batch))


def _rows(members: Iterable[dict[str, Any]]) -> Iterator[np.ndarray]:
    for member in members:
        yield from member["tokens.npy"]


def _stack(rows: list[np.ndarray]) -> Tensor:
    import torch

    return torch.from_numpy(np.stack(rows).astype(np.int64))


def plain_webdataset(urls: list[str], micro_batch: int, workers: int) -> Iterator[Tensor]:
    """Stock webdataset: shards shuffled, members unpacked to samples, a shuffle buffer of 1,000 samples."""
    import torch
    import webdataset

    dataset = webdataset.WebDataset(urls, shardshuffle=100, resampled=False, empty_check=False)
    samples = dataset.decode().compose(_rows).shuffle(1000).batched(micro_batch, collation_fn=_stack, partial=False)
    return iter(torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers))


def energon(folder: Path, micro_batch: int, workers: int) -> Iterator[Tensor]:
    """megatron-energon over the same tars: a shuffle buffer of 16 members (1,024 samples), then micro-batches."""
    kept: list[np.ndarray] = []
    for row in _rows(energon_members(folder, shuffle=16, workers=workers)):
        kept.append(row)
        if len(kept) == micro_batch:
            yield _stack(kept)
            kept = []


def energon_members(folder: Path, shuffle: int | None = None, workers: int = 0) -> Iterator[dict[str, Any]]:
    """The tars' members as stock energon reads them, as crude samples, again and again.

    Its metadata goes to a folder of links to the tars, so that `folder` stays as it is.

    Args:
        folder: of shards.
        shuffle: members in its shuffle buffer; none leaves it out.
        workers: processes; 0 reads in this one.
    """
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.flavors import BaseWebdatasetFactory

    class Members(DefaultTaskEncoder):
        cookers = (Cooker(stateless(lambda member: member)),)

    with tempfile.TemporaryDirectory(prefix="energon-") as scratch:
        for tar in folder.resolve().glob("*.tar"):
            (Path(scratch) / tar.name).symlink_to(tar)
        tars = sorted(path.name for path in Path(scratch).iterdir())
        with contextlib.redirect_stdout(sys.stderr):
            BaseWebdatasetFactory.prepare_dataset(scratch, tars, split_parts_ratio=[("train", 1.0)], workers=1)
        (Path(scratch) / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )
        config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
        dataset = get_train_dataset(
            scratch,
            worker_config=config,
            batch_size=None,
            shuffle_buffer_size=shuffle,
            max_samples_per_sequence=None,
            task_encoder=Members(),
        )
        yield from get_loader(dataset)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder behind a URL, by Python's own server in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def rate(make: Callable[[], Iterator[Tensor]], micro_batch: int, seconds: float) -> float:
    """Samples per second over `seconds`, after ten micro-batches; a source that ends begins anew."""
    stream = make()
    for _ in range(10):
        next(stream)
    begin, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds:
        for _ in range(16):
            batch = next(stream, None)
            if batch is None:
                stream = make()
                continue
            assert batch.shape[0] == micro_batch
            count += micro_batch
    return count / passed


def preparation(folder: Path, megabytes: float, workers: int) -> float:
    """Bytes of text per second from JSONL to shards, tokenizer given."""
    from ebt_megatron.data_prep.documents import split_files
    from ebt_megatron.data_prep.files import find_files
    from ebt_megatron.data_prep.job import Execution
    from ebt_megatron.data_prep.text import prepare_text
    from ebt_megatron.data_prep.text_passes import TextSettings
    from ebt_megatron.data_prep.tokens import train_bpe

    raw, tokenizer = folder / "raw", folder / "tokenizer.json"
    if not raw.exists():
        raw.mkdir(parents=True)
        words = random.Random(0)
        vocabulary = ["".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(20000)]
        texts = [" ".join(words.choices(vocabulary, k=400)) for _ in range(int(megabytes * 1e6 / 2600))]
        (raw / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        train_bpe(iter(texts[:500]), 8192).save(str(tokenizer))
    files = find_files([str(raw)], (".jsonl",)).files
    begin = time.perf_counter()
    prepare_text(
        folder / "out",
        split_files(files, 2_000_000),
        TextSettings(str(tokenizer)),
        "a benchmark",
        Execution(workers, overwrite=True),
    )
    return sum(f.bytes for f in files) / (time.perf_counter() - begin)


def main(
    data: Path | None = typer.Option(None, help="Prepared text, e.g. data/text/train; default: random tokens."),
    samples: int = typer.Option(48_828, help="Random samples to make."),
    sequence_length: int = typer.Option(2047, help="Tokens of a sample, less one."),
    micro_batch: int = typer.Option(8, min=1, help="Samples in a micro-batch."),
    seconds: float = typer.Option(5.0, help="Time for each loader."),
    megabytes: float = typer.Option(40.0, help="Text for preparation."),
    quick: bool = typer.Option(False, "--quick", help="A tenth of everything."),
    output: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
) -> None:
    """Samples/s and MB/s of loaders on the same shards in one run, and of preparation."""
    if quick:
        samples, seconds, megabytes = samples // 10, seconds / 10, megabytes / 10
    scratch = Path(tempfile.mkdtemp(prefix="bench-data-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        folder = data or scratch / "shards"
        if not data:
            make_shards(folder, samples, sequence_length)
        names = [shard.name for shard in ShardFolder(str(folder)).manifest.shards]
        local = [str(folder / name) for name in names]
        url = stack.enter_context(served(folder))
        remote = [f"{url}/{name}" for name in names]
        loaders: dict[str, Callable[[], Iterator[Tensor]]] = {
            "limit: converted in order": lambda: converted(folder, micro_batch),
            "numpy gather from memory": lambda: gathered(folder, micro_batch),
            "ours": lambda: ours(folder, micro_batch, thread=True),
            "ours, no thread": lambda: ours(folder, micro_batch, thread=False),
            f"ours, groups of {_GROUP} shards": lambda: ours(folder, micro_batch, thread=True, together=_GROUP),
            "webdataset": lambda: plain_webdataset(local, micro_batch, 0),
            "webdataset, 2 workers": lambda: plain_webdataset(local, micro_batch, 2),
            f"ours, http, groups of {_GROUP} shards": lambda: ours(url, micro_batch, thread=True, together=_GROUP),
            "webdataset, http": lambda: plain_webdataset(remote, micro_batch, 0),
        }
        if importlib.util.find_spec("megatron.energon"):
            loaders["energon"] = lambda: energon(folder, micro_batch, 0)
            loaders["energon, 2 workers"] = lambda: energon(folder, micro_batch, 2)
        manifest = ShardFolder(str(folder)).manifest
        size = int(np.prod(manifest.shape)) * np.dtype(manifest.dtype).itemsize
        found = {
            name: rate(make, micro_batch, seconds)
            for name, make in track(loaders.items(), description="loading", console=Console(stderr=True))
        }
        prepared = {str(w): preparation(scratch / "text", megabytes, w) for w in (1, 2)}
    facts = machine()
    console = Console(width=120)
    table = Table(
        title=f"{manifest.samples:,} samples of {manifest.shape[0]:,} tokens in {len(manifest.shards)} tars; "
        f"micro-batches of {micro_batch}",
        title_justify="left",
    )
    for column in ("loader", "samples/s", "MB/s", "against webdataset"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, value in found.items():
        table.add_row(name, f"{value:,.0f}", f"{value * size / 1e6:,.0f}", f"{value / found['webdataset']:.2f}")
    console.print(facts, table)
    for workers, value in prepared.items():
        console.print(f"preparation of text, {workers} worker(s): {value / 1e6:.1f} MB/s")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        numbers = {
            "machine": facts,
            "samples": manifest.samples,
            "shape": manifest.shape,
            "micro_batch": micro_batch,
            "samples_per_second": found,
            "preparation_bytes_per_second": prepared,
        }
        write_whole(output, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
