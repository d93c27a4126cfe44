"""What the commands of every preparation share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ebt_megatron.core import cli
from ebt_megatron.core.cli import user_path as path
from ebt_megatron.core.errors import DataError
from ebt_megatron.core.options import option
from ebt_megatron.data_prep.files import Input, counted, without_secrets


def path_or_name(value: str) -> str:
    """What may be a path, as a shell would read it."""
    return os.path.expanduser(value)


def most_unknown(of: str) -> Any:
    """A setting: how much of a text a tokenizer may have no token for."""
    told = f"Share of {of} that the tokenizer may have no token for (it becomes its unknown one)."
    return option(0.05, min=0.0, max=1.0, help=told)


def check_known(share: float, most: float, of: str, choose: str) -> None:
    """Raise DataError where a tokenizer lacks more than `most` of a text.

    Args:
        share: that it lacks.
        most: as `--most-unknown`.
        of: what text, in words.
        choose: the option that chooses another tokenizer.
    """
    if share > most:
        raise DataError(
            f"the tokenizer has no token for {share:.1%} of {of}: choose another {choose}, or allow it with "
            f"--most-unknown {math.ceil(100 * share) / 100:g}"
        )


OUTPUT: Path = typer.Option(..., parser=path, help="Folder for train/ and validation/.")
DRY_RUN: bool = typer.Option(False, help="Say what would be read and written, and stop.")


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
        console.print(
            f"not read are {counted(found.left_out)}: folders are searched for {', '.join(suffixes)}", style="yellow"
        )
    if dry_run:
        console.print(f"would write {' and '.join(str(output / s) for s in splits)}, {what}")
    return not dry_run


def command(work: Callable[[], Any]) -> None:
    """Run a preparation; the first rank says in one line what was wrong."""

    def told() -> None:
        try:
            work()
        except DataError as error:
            raise DataError(without_secrets(str(error))) from None

    cli.guarded(told, quiet=not first_rank())
