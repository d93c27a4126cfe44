"""What the command lines share: recipes with overrides, and one line for a user's mistake."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ebt_megatron.config import RecipeError
from ebt_megatron.data.shards import DataError


def quiet_libraries() -> None:
    """Silence warnings of libraries about optional accelerators that this program does not need."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning)


def user_path(value: str) -> Path:
    """A path as a shell would read it, also where quotes or `--option=` kept the shell from it."""
    return Path(value).expanduser()


def command(work: Callable[[], Any], quiet: bool = False) -> None:
    """Run a command on files; those that cannot be read or written are a user's mistake too."""

    def one_line() -> None:
        try:
            work()
        except OSError as error:
            where = error.filename or "a file"
            raise DataError(f"{where} cannot be read or written ({error.strerror or error})") from None

    guarded(one_line, quiet)


def guarded(work: Callable[[], Any], quiet: bool = False) -> None:
    """Run a command; bad input ends it with one line on rank 0 (unless another process says it) and exit code 2."""
    try:
        work()
    except (RecipeError, DataError) as error:
        import torch.distributed as dist  # here: preparing data needs no torch

        if not quiet and (not dist.is_initialized() or dist.get_rank() == 0):
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
