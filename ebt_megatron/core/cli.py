"""What the command lines share: lines on the terminal, and one line for a user's mistake on however many ranks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ebt_megatron.core.errors import DataError, PeerError, RecipeError
from ebt_megatron.core.files import said_of
from ebt_megatron.core.launch import Launch, detect_launch

# what reading or writing an open file may raise, which no longer knows its name
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EPIPE)
_PATIENCE = 10.0  # seconds that ranks with nothing new to say leave torchrun to end them


def quiet_libraries() -> None:
    """Silence warnings of libraries about optional accelerators that this program does not need."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA toolkit without a GPU


def say(text: str, style: str = "", head: str = "") -> None:
    """Print a line to stderr as it is (brackets are no markup); a full disk under a log loses the line, not the run.

    Args:
        text: the line.
        style: rich's, e.g. "red", of the head, or of everything if there is none.
        head: put before the text.
    """
    line = Text.assemble((head, style), " ", text) if head else Text(text, style)
    with contextlib.suppress(OSError, ValueError):
        Console(stderr=True, highlight=False, soft_wrap=True).print(line)


def write_any_text() -> None:
    """Let stdout and stderr write "?" for what their encoding lacks (LANG=C, names that are no UTF-8)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def user_path(value: str) -> Path:
    """A path as a shell would read it, also where quotes or `--option=` kept the shell from it."""
    return Path(value).expanduser()


def guarded(work: Callable[[], Any], quiet: bool = False, stopped: Callable[[], str] | None = None) -> None:
    """Run a command; an error ends all its ranks, and is printed once, by the rank that had it first.

    Bad input (RecipeError, DataError, a file that cannot be read or written) is one line and exit code 2.
    Of other errors, ranks print the first one's traceback and exit with 1; a process alone raises them.

    Args:
        work: the command.
        quiet: another process says what is wrong.
        stopped: says after Ctrl-C what is kept, and how to go on.
    """
    write_any_text()
    try:
        work()
    except KeyboardInterrupt:
        if stopped is not None and _launch().rank == 0:
            say(stopped(), "yellow", "stopped:")
        sys.exit(130)
    except Exception as error:
        mistake = isinstance(error, RecipeError | DataError) or _of_a_file(error)
        launch = _launch()
        if isinstance(error, PeerError):
            _wait_for_the_end()  # which comes once the rank with the error has said it
            sys.exit(2)
        if launch.world_size == 1 and not mistake:
            raise
        message = _one_line(error)
        first, new = _place_in_line(launch, message if mistake else None)
        if new and not quiet:
            rank = f" (rank {launch.rank} on {socket.gethostname()})" if launch.world_size > 1 else ""
            say(message if mistake else f"{type(error).__name__}: {message}", "red", f"error{rank}:")
            if not mistake:
                traceback.print_exception(error)
        if not first and launch.launcher == "torchrun":  # which reports every rank that ends by itself
            _wait_for_the_end()
        sys.exit(2 if mistake else 1)


def _wait_for_the_end() -> None:
    """Leave it to the launcher to end this rank."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_PATIENCE)


def _of_a_file(error: Exception) -> bool:
    """Whether a file cannot be read or written: one with a name, or one that was open (a full disk)."""
    return isinstance(error, OSError) and (bool(error.filename) or error.errno in _DISK)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and _of_a_file(error):
        return f"{error.filename or 'a file'} cannot be read or written ({said_of(error)})"
    return " ".join(str(error).splitlines())


def _launch() -> Launch:
    try:
        return detect_launch()
    except RecipeError:
        return Launch("single", 0, 1, 0, "")


def _place_in_line(launch: Launch, mistake: str | None) -> tuple[bool, bool]:
    """Whether no other rank has failed before, and whether the error is to be printed.

    torchrun starts ranks again after a mistake, too: in a later attempt it is not said again.
    """
    if launch.world_size == 1:
        return True, True
    import torch.distributed as dist  # here: preparing data needs no torch

    try:
        agent = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            agent = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_PATIENCE))
        if dist.is_initialized():
            first = dist.distributed_c10d._get_default_store().add("failed", 1) == 1
        elif agent is not None:
            first = agent.add(f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
        else:  # the ranks have not met: every machine's first one speaks
            first = launch.local_rank == 0
        if first and mistake is not None and agent is not None:
            return True, agent.add(f"said/{hashlib.sha256(mistake.encode()).hexdigest()}", 1) == 1
        return first, first
    except (RuntimeError, OSError):  # whoever served the store is gone: better twice than never
        return True, True
