"""Look at prepared data: `python -m tools.shards inspect|verify|stats|sample FOLDER`."""

from __future__ import annotations

import io
import json
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
from ebt_megatron.data.shards import (
    LABELS,
    DataError,
    Manifest,
    Member,
    ShardFolder,
    ShardInfo,
    read_manifest,
    sha256_of,
)

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
FOLDER = typer.Argument(..., help="A folder with manifest.json, e.g. data/text/train.")


def _member_problem(data: bytes, member: Member, manifest: Manifest) -> str:
    """What is wrong with a member's array, or ""."""
    try:
        block = np.load(io.BytesIO(data))
    except (ValueError, EOFError, OSError) as error:
        return f"cannot be read ({error})"
    labels = member.name.endswith(f".{LABELS}.npy")
    if list(block.shape) != [member.samples, *([] if labels else manifest.shape)]:
        return f"has shape {list(block.shape)}"
    if manifest.kind == "text" and block.size and int(block.max()) >= manifest.vocab_size:
        return "has a token outside the vocabulary"
    return ""


def shard_problems(folder: Path, shard: ShardInfo, manifest: Manifest) -> list[str]:
    """What is wrong with one shard: truncation, changed bytes, duplicate or missing members, wrong counts."""
    path, index = folder / shard.name, folder / shard.index_name
    missing = [f"{p}: missing" for p in (path, index) if not p.exists()]
    if missing:
        return missing
    problems = []
    if path.stat().st_size != shard.bytes:
        problems.append(f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
    if sha256_of(path) != shard.sha256:
        problems.append(f"{path}: checksum differs")
    if sha256_of(index) != shard.index_sha256:
        return [*problems, f"{index}: checksum differs"]
    if not problems:
        return []
    seen: set[str] = set()
    expected = {m[0]: Member(*m) for m in json.loads(index.read_text())["members"]}
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.name in seen:
                    problems.append(f"{path}: member {entry.name} is there twice")
                seen.add(entry.name)
                if entry.name not in expected:
                    problems.append(f"{path}: member {entry.name} is not in the index")
                    continue
                stream = tar.extractfile(entry)
                problem = _member_problem(stream.read() if stream else b"", expected[entry.name], manifest)
                if problem:
                    problems.append(f"{path}: member {entry.name} {problem}")
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
        for key, value in (("kind", m.kind), ("samples", f"{m.samples:,}"), ("shape of a sample", m.shape),
                           ("stored as", m.dtype), ("shards", len(m.shards)),
                           ("bytes", f"{sum(s.bytes for s in m.shards):,}"), *m.sidecar.items(),
                           *([("classes", ", ".join(m.classes))] if m.classes else []),
                           *m.provenance.items()):  # fmt: skip
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
            problems += shard_problems(folder, shard, m)
        sidecar = folder / m.sidecar["file"]
        if not sidecar.exists() or sha256_of(sidecar) != m.sidecar["sha256"]:
            problems.append(f"{sidecar}: missing, or not the one the shards were made with")
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
        tokenizer = Tokenizer.from_file(str(data.sidecar()))
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
        tokenizer = Tokenizer.from_file(str(data.sidecar()))
        print(tokenizer.decode(data.row(index).tolist(), skip_special_tokens=False))

    guarded(work)


if __name__ == "__main__":
    app()
