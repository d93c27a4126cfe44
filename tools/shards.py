"""Look at prepared data: `python -m tools.shards inspect|verify|stats|sample FOLDER`."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from ebt_megatron.cli import guarded
from ebt_megatron.data.shards import DataError, Manifest, ShardFolder, ShardInfo, read_manifest, sha256_of

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
FOLDER = typer.Argument(..., help="A folder with manifest.json, e.g. data/text/train.")


def shard_problems(path: Path, shard: ShardInfo, manifest: Manifest) -> list[str]:
    """What is wrong with one tar: truncation, changed bytes, duplicate or missing members, wrong counts."""
    if not path.exists():
        return [f"{path}: missing"]
    problems = []
    if path.stat().st_size != shard.bytes:
        problems.append(f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
    if sha256_of(path) != shard.sha256:
        problems.append(f"{path}: checksum differs")
    if not problems:
        return []
    seen: set[str] = set()
    expected = {name: (offset, size, rows) for name, offset, size, rows in shard.members}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name in seen:
                    problems.append(f"{path}: member {member.name} is there twice")
                seen.add(member.name)
                if member.name not in expected:
                    problems.append(f"{path}: member {member.name} is not in the manifest")
                    continue
                stream = tar.extractfile(member)
                try:
                    rows = np.load(io.BytesIO(stream.read())) if stream else np.zeros((0, 0))
                    if rows.shape != (expected[member.name][2], manifest.sequence_length + 1):
                        problems.append(f"{path}: member {member.name} has shape {rows.shape}")
                    elif rows.size and int(rows.max()) >= manifest.vocab_size:
                        problems.append(f"{path}: member {member.name} has a token outside the vocabulary")
                except (ValueError, EOFError, OSError) as error:
                    problems.append(f"{path}: member {member.name} cannot be read ({error})")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        problems.append(f"{path}: not a whole tar ({error})")
    problems += [f"{path}: member {name} is missing" for name in expected if name not in seen]
    return problems


@app.command()
def inspect(folder: Path = FOLDER) -> None:
    """Show what the manifest says."""

    def work() -> None:
        m = read_manifest(str(folder))
        table = Table(show_header=False)
        for key, value in (("kind", m.kind), ("samples", f"{m.samples:,}"), ("sequence length", m.sequence_length),
                           ("vocabulary", m.vocab_size), ("stored as", m.dtype), ("shards", len(m.shards)),
                           ("bytes", f"{sum(s.bytes for s in m.shards):,}"),
                           ("bytes per token", f"{m.bytes_per_token:.3f}"), *m.provenance.items()):  # fmt: skip
            table.add_row(str(key), str(value))
        Console().print(table)

    guarded(work)


@app.command()
def verify(folder: Path = FOLDER) -> None:
    """Read everything; names shard and member of whatever is wrong, and exits 1."""

    def work() -> None:
        m, console = read_manifest(str(folder)), Console(soft_wrap=True, highlight=False)
        problems = []
        for shard in track(m.shards, description="verifying", console=Console(stderr=True)):
            problems += shard_problems(folder / shard.name, shard, m)
        tokenizer = folder / m.tokenizer["file"]
        if not tokenizer.exists() or sha256_of(tokenizer) != m.tokenizer["sha256"]:
            problems.append(f"{tokenizer}: missing, or not the one the shards were made with")
        if sum(s.samples for s in m.shards) != m.samples:
            problems.append(f"{folder}/manifest.json: {m.samples} samples, its shards have "
                            f"{sum(s.samples for s in m.shards)}")  # fmt: skip
        for problem in problems:
            console.print(problem)
        if problems:
            sys.exit(1)
        console.print(f"{m.samples:,} samples in {len(m.shards)} shards: all good")

    guarded(work)


@app.command()
def stats(folder: Path = FOLDER, top: int = typer.Option(10, help="Most frequent tokens to show.")) -> None:
    """Token statistics: unigram entropy, vocabulary used, the most frequent tokens."""

    def work() -> None:
        data = ShardFolder(str(folder))
        counts = np.zeros(data.manifest.vocab_size, dtype=np.int64)
        for i in track(range(len(data)), description="counting", console=Console(stderr=True)):
            counts += np.bincount(data.row(i)[1:], minlength=len(counts))
        p = counts[counts > 0] / counts.sum()
        tokenizer = Tokenizer.from_file(str(folder / data.manifest.tokenizer["file"]))
        console = Console(highlight=False)
        console.print(f"tokens {counts.sum():,}; unigram entropy {-(p * np.log(p)).sum():.4f} nats; "
                      f"{len(p):,} of {len(counts):,} entries used")  # fmt: skip
        for token in np.argsort(-counts)[:top]:
            console.print(f"{counts[token]:>12,}  {tokenizer.decode([int(token)], skip_special_tokens=False)!r}")

    guarded(work)


@app.command()
def sample(folder: Path = FOLDER, index: int = typer.Option(0, help="Which sample.")) -> None:
    """Print a sample as text."""

    def work() -> None:
        data = ShardFolder(str(folder))
        if not 0 <= index < len(data):
            raise DataError(f"--index {index}: {folder} has samples 0 to {len(data) - 1}")
        tokenizer = Tokenizer.from_file(str(folder / data.manifest.tokenizer["file"]))
        print(tokenizer.decode(data.row(index).tolist(), skip_special_tokens=False))

    guarded(work)


if __name__ == "__main__":
    app()
