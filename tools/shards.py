"""Look at prepared data and change its shape.

ebt-shards inspect|verify|stats|sample FOLDER
ebt-shards reshard FOLDER --output OUT --samples-per-shard 4096
ebt-shards merge FOLDER FOLDER --output OUT
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from ebt_megatron.core.cli import guarded, user_path
from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing, sha256_of
from ebt_megatron.data.agreement import manifest_problems, members_of
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.data.kinds import KINDS, Bounds, kind_of, part_name
from ebt_megatron.data.manifest import Manifest, ShardInfo, read_manifest
from ebt_megatron.data.shards import Member
from ebt_megatron.tools.rewrite import rewrite

if TYPE_CHECKING:
    from ebt_megatron.data_prep.encoders import Encoder


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


app = typer.Typer(help=__doc__, no_args_is_help=True)
FOLDER = typer.Argument(..., parser=user_path, help="A folder with manifest.json, e.g. data/text/train.")


def _encoder_of(data: ShardFolder) -> Encoder:
    """What latents were made with."""
    from ebt_megatron.data_prep.encoders import load_encoder

    return load_encoder(data.sidecar())


def _member_problem(data: bytes, member: Member, manifest: Manifest) -> str:
    """What is wrong with a member's array, or ""."""
    try:
        block = np.load(io.BytesIO(data))
    except (ValueError, EOFError, OSError) as error:
        return f"cannot be read ({error})"
    parts = kind_of(manifest.kind).parts(manifest)
    if (part := parts.get(part_name(member.name))) is None:
        return "is not what the manifest speaks of"
    if list(block.shape) != [member.samples, *(part.shape(manifest) or [])]:
        return f"has shape {list(block.shape)}"
    if part is next(iter(parts.values())) and block.dtype != manifest.dtype:
        return f"is {block.dtype}, the manifest says {manifest.dtype}"
    if not np.isfinite(block).all():
        return "has values that are not finite"
    outside = part.problem(block, manifest)
    return f"holds {outside}" if outside else ""


def _vocabulary_problems(tokenizer: Path, manifest: Manifest) -> list[str]:
    """Whether a tokenizer has ids that the manifest does not count."""
    try:
        ids = max(Tokenizer.from_file(str(tokenizer)).get_vocab().values()) + 1
    except Exception as error:  # the library raises bare exceptions
        return [f"{tokenizer}: not a tokenizer.json ({error})"]
    return (
        [f"{tokenizer}: has ids up to {ids - 1}, the manifest a vocabulary of {manifest.vocab_size}"]
        if ids > manifest.vocab_size
        else []
    )


def shard_problems(folder: Path, shard: ShardInfo, manifest: Manifest) -> list[str]:
    """What is wrong with one shard: truncation, changed bytes, duplicate or missing members, wrong counts or values."""
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
    seen: set[str] = set()
    try:
        members = members_of(index.read_text(), shard, manifest)
    except DataError as error:
        return [*problems, f"{folder}: {error}"]
    expected = {member.name: member for member in members}
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.name in seen:
                    problems.append(f"{path}: member {entry.name} is there twice")
                seen.add(entry.name)
                if entry.name not in expected:
                    problems.append(f"{path}: member {entry.name} is not in the index")
                    continue
                if (entry.offset_data, entry.size) != expected[entry.name][1:3]:
                    problems.append(f"{path}: member {entry.name} is at byte {entry.offset_data}, the index says else")
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
        for key, value in (
            ("kind", m.kind),
            ("samples", f"{m.samples:,}"),
            ("shape of a sample", m.shape),
            ("stored as", m.dtype),
            ("shards", len(m.shards)),
            ("bytes", f"{sum(s.bytes for s in m.shards):,}"),
            *m.sidecar.items(),
            *([("classes", ", ".join(m.classes))] if m.classes else []),
            *((f"captions: {key}", value) for key, value in m.captions.items()),
            *m.provenance.items(),
        ):
            table.add_row(str(key), str(value))
        _console().print(table)

    guarded(work)


@app.command()
def verify(folder: Path = FOLDER) -> None:
    """Read everything; names shard and member of whatever is wrong, and exits 1."""

    def work() -> None:
        m, console = read_manifest(str(folder)), _console()
        kind = kind_of(m.kind)
        problems = []
        if kind.sidecar and not (getattr(m, kind.sidecar, None) or m.facts.get(kind.sidecar)):
            problems.append(f"{folder}/manifest.json: says nothing of the {kind.sidecar} that {m.kind} has")
        for shard in track(m.shards, description="verifying", console=Console(stderr=True)):
            problems += shard_problems(folder, shard, m)
        for recorded in m.files:
            beside = folder / recorded["file"]
            if not beside.exists() or sha256_of(beside) != recorded["sha256"]:
                problems.append(f"{beside}: missing, or not the one the shards were made with")
            elif recorded is m.tokenizer and m.kind in KINDS:  # of a kind of one's own it may be anything
                problems += _vocabulary_problems(beside, m)
        problems += [f"{folder}/manifest.json: {problem}" for problem in manifest_problems(m)]
        for problem in problems:
            console.print(problem)
        if problems:
            sys.exit(1)
        console.print(f"{m.samples:,} samples in {len(m.shards)} shards: all good")

    guarded(work)


def _value_stats(data: ShardFolder, bounds: Bounds, top: int, console: Console) -> None:
    """How often each integer is there; of sequences, each but a sample's first, as rows of text overlap by one."""
    m, part = data.manifest, data.kind.samples
    counts = np.zeros(bounds.end - bounds.least, dtype=np.int64)
    for i in track(range(len(data)), description="counting", console=Console(stderr=True)):
        row = data.row(i)
        if problem := part.problem(row, m):
            raise DataError(f"{data.folder} holds {problem}: prepare it again")
        values = (row[1:] if data.kind.unit else row).astype(np.int64).ravel()
        counts += np.bincount(values - bounds.least, minlength=len(counts))
    p = counts[counts > 0] / counts.sum()
    console.print(
        f"{bounds.what}s {counts.sum():,}; unigram entropy {-(p * np.log(p)).sum():.4f} nats; "
        f"{len(p):,} of {len(counts):,} entries used"
    )
    tokenizer = Tokenizer.from_file(str(data.sidecar())) if data.manifest.tokenizer else None
    for value in (np.argsort(-counts)[:top] + bounds.least).tolist():
        shown = repr(tokenizer.decode([value], skip_special_tokens=False)) if tokenizer else str(value)
        console.print(f"{counts[value - bounds.least]:>12,}  {shown}")


def _channel_stats(data: ShardFolder, top: int, console: Console) -> None:
    classes = data.manifest.classes
    channels = data.manifest.shape[-1]
    total, square, labels = np.zeros(channels), np.zeros(channels), np.zeros(len(classes), np.int64)
    for i in track(range(len(data)), description="counting", console=Console(stderr=True)):
        values = data.row(i).reshape(-1, channels).astype(np.float64)
        total, square = total + values.mean(0), square + (values**2).mean(0)
        if classes:
            labels[data.gather_beside("labels", np.array([i]))] += 1
    mean = total / len(data)
    std = np.sqrt(np.maximum(square / len(data) - mean**2, 0))
    console.print(
        f"{len(data):,} samples of {data.manifest.shape}; over channels: means {mean.min():.3f} to "
        f"{mean.max():.3f}, standard deviations {std.min():.3f} to {std.max():.3f}"
    )
    for c in range(min(top, channels)):
        console.print(f"channel {c:>4}: mean {mean[c]:>8.4f}, standard deviation {std[c]:.4f}")
    for name, count in zip(classes, labels, strict=True):
        console.print(f"{count:>12,}  {name}")


@app.command()
def stats(folder: Path = FOLDER, top: int = typer.Option(10, help="Integers or channels to show.")) -> None:
    """Show unigram entropy and the most frequent integers; of other samples, means by channel and classes."""

    def work() -> None:
        data, console = ShardFolder(str(folder)), _console()
        bounds = data.kind.bounds(data.manifest)
        if bounds is None:
            _channel_stats(data, top, console)
        else:
            _value_stats(data, bounds, top, console)

    guarded(work)


@app.command()
def sample(
    folder: Path = FOLDER,
    index: int = typer.Option(0, help="Which sample (the first of those on a contact sheet)."),
    count: int = typer.Option(8, min=1, help="With an encoder: samples on the contact sheet."),
    output: Path = typer.Option(Path("sheet.png"), parser=user_path, help="With an encoder: the contact sheet."),
) -> None:
    """Print a sample as text or numbers, or draw clips (a row each) or pictures as the encoder's decoder sees them."""

    def work() -> None:
        data = ShardFolder(str(folder))
        if not 0 <= index < len(data):
            raise DataError(f"--index {index}: {folder} has samples 0 to {len(data) - 1}")
        if data.kind.text is not None:
            print(data.kind.text(data.row(index), data))
            return
        if not data.manifest.encoder:
            print(np.array2string(data.row(index), threshold=1000))
            return
        rows = np.stack([data.row(i) for i in range(index, min(index + count, len(data)))])
        if rows.ndim == 3:  # pictures: in a square of their own
            side = int(np.ceil(np.sqrt(len(rows))))
            rows = np.concatenate([rows, np.zeros((side * side - len(rows), *rows.shape[1:]), rows.dtype)])
            rows = rows.reshape(-1, side, *rows.shape[1:])
        frames = _encoder_of(data).to_frames(rows.reshape(-1, *rows.shape[2:]))
        grid = frames.reshape(*rows.shape[:2], *frames.shape[1:])
        from PIL import Image

        if (kind := Image.registered_extensions().get(output.suffix.lower())) is None:
            raise DataError(f"--output {output}: give it the suffix of a picture, e.g. .png")
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as partial:
            Image.fromarray(np.concatenate(np.concatenate(grid, 1), 1)).save(partial, kind)
        _console(stderr=True).print(f"{len(grid)} x {grid.shape[1]} frames: {output}")

    guarded(work)


OUTPUT = typer.Option(..., parser=user_path, help="Folder to make.")
OVERWRITE = typer.Option(False, help="Replace the shards that OUTPUT holds.")
DRY_RUN = typer.Option(False, help="Say what would be written, and stop.")


def _rewrite(folders: list[Path], output: Path, samples_per_shard: int, overwrite: bool, dry_run: bool) -> None:
    console = _console(stderr=True)
    if dry_run:
        total = sum(read_manifest(str(f)).samples for f in folders)
        console.print(f"would write {total:,} samples to {output}, {samples_per_shard:,} in each shard")
        return
    manifest = rewrite([str(f) for f in folders], output, samples_per_shard, overwrite)
    console.print(f"{output}: {manifest.samples:,} samples in {len(manifest.shards)} shards")


@app.command()
def reshard(
    folder: Path = FOLDER,
    output: Path = OUTPUT,
    samples_per_shard: int = typer.Option(..., min=1, help="Samples in each tar but the last."),
    overwrite: bool = OVERWRITE,
    dry_run: bool = DRY_RUN,
) -> None:
    """The same samples in the same order, in larger or smaller shards; repeat the command after a kill."""
    guarded(lambda: _rewrite([folder], output, samples_per_shard, overwrite, dry_run))


@app.command()
def merge(
    folders: list[Path] = typer.Argument(
        ..., parser=user_path, help="Prepared folders of one kind and tokenizer or encoder."
    ),
    output: Path = OUTPUT,
    samples_per_shard: int = typer.Option(8192, min=1, help="Samples in each tar but the last."),
    overwrite: bool = OVERWRITE,
    dry_run: bool = DRY_RUN,
) -> None:
    """Several folders as one, one after the other; repeat the command after a kill."""
    guarded(lambda: _rewrite(folders, output, samples_per_shard, overwrite, dry_run))


if __name__ == "__main__":
    app()
