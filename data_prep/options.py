"""Options that every preparation has."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ebt_megatron.core import cli
from ebt_megatron.core.cli import user_path as path

from .files import Input, counted


def name(value: str) -> str:
    """What may be a path, as a shell would read it."""
    return os.path.expanduser(value)


OUTPUT: Path = typer.Option(..., parser=path, help="Folder for train/ and validation/.")
VALIDATION_FRACTION: float = typer.Option(0.02, min=0.0, max=0.5, help="Share held out; 0: no validation folder.")
SEED: int = typer.Option(0, min=0, help="Of the split and of what is fitted.")
WORKERS: int = typer.Option(1, min=1, help="Processes (under mpirun: of each rank).")
RESUME: bool = typer.Option(False, help="Go on with an interrupted preparation of the same input and options.")
OVERWRITE: bool = typer.Option(False, help="Replace what OUTPUT holds.")
DRY_RUN: bool = typer.Option(False, help="Say what would be read and written, and stop.")

ENCODER: str = typer.Option("pca", parser=name, help="pixels, pca, vae, dinov2, or the encoder.npz of other shards.")
MODEL: str | None = typer.Option(
    None, parser=name, help="Folder of a diffusers AutoencoderKL or a transformers Dinov2Model."
)
PATCH: int | None = typer.Option(None, min=1, help="Side of a patch in pixels [default: 8, or the model's].")
CHANNELS: int | None = typer.Option(None, min=1, help="Principal components kept of a patch [default: 16].")
SCALE: float | None = typer.Option(
    None, min=1e-6, help="Latents are multiplied by this, instead of normalised by the train split's statistics."
)
SKIP_BROKEN: bool = typer.Option(False, help="Leave out what cannot be read or decoded; OUTPUT/skipped.txt names it.")


def first_rank() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")) == "0"


def announce(
    output: Path, found: Input, suffixes: tuple[str, ...], splits: list[str], what: str, dry_run: bool
) -> bool:
    """Say what is read, what folders have besides, and what is written; whether to go on."""
    console = Console(stderr=True, quiet=not first_rank(), soft_wrap=True, highlight=False, markup=False)
    console.print(f"reading {found}")
    if found.left_out:
        console.print(f"not read are {counted(found.left_out)}: folders are searched for {', '.join(suffixes)}",
                      style="yellow")  # fmt: skip
    if dry_run:
        console.print(f"would write {' and '.join(str(output / s) for s in splits)}, {what}")
    return not dry_run


def command(work: Callable[[], Any]) -> None:
    """Run a preparation; the first rank says in one line what was wrong."""
    cli.guarded(work, quiet=not first_rank())
