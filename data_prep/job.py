"""Preparation spread over processes and MPI ranks, restartable, with output that no layout changes.

A preparation is a few passes over lists of items; each item makes one file, which is renamed into
place when complete. So a job that was killed, or stopped by a file it could not read, goes on by making
the files that are missing, and the number of processes changes nothing but the time:

    with Job(output, settings, files, Execution(workers=4, resume=True)) as job:
        job.each("encoding", encode, units, target=file_of_unit)
        shards = job.once(plan)
        job.each("writing", write, shards, target=file_of_shard)
        job.once(publish)
        job.finish()

Under `mpirun -n N` every rank runs the same program; items are dealt over ranks, then over each
rank's own processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import said_of, write_whole
from ebt_megatron.core.options import option
from ebt_megatron.data.shards import OutputLock, clear_partial, made_in
from ebt_megatron.data_prep.files import recorded_names

T = TypeVar("T")
_WORK = re.compile(
    r"([a-z]+-)?[0-9a-f]{16}(\.(npy|npz|json))?|.+\.partial"
)  # names that passes.py gives in OUTPUT/.work
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


def _communicator() -> Any:
    """MPI's world, or None when not started by mpirun."""
    if not any(name in os.environ for name in _MPI_VARIABLES):
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DataError(f"started by mpirun, but mpi4py cannot be imported ({error}): pip install mpi4py") from None
    return MPI.COMM_WORLD


def _follow(parent: int) -> None:
    """End this process when its parent is gone, so that a killed job leaves nothing running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started meanwhile do not hear of Ctrl-C; this one does, a little later."""
    resource_tracker.ensure_running()  # with the first process it would let signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def naming_shared_memory() -> Iterator[None]:
    """While processes are made, whose locks are files of shared memory: raises DataError where there is none."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"no worker processes: /dev/shm cannot be written ({said_of(error)}); pass --workers 1, or mend it"
        ) from None


def _content(record: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        return {}  # no job's


@dataclass(frozen=True)
class Execution:
    """How a preparation is run, which changes nothing of what it makes.

    Attributes:
        workers: processes (of each MPI rank); 1: this one.
        resume: go on with an interrupted job.
        overwrite: replace what OUTPUT holds. Shards stay until there are others to write (see WorkFolder.clear).
    """

    workers: int = option(1, min=1, help="Processes (under mpirun: of each rank).")
    resume: bool = option(False, help="Go on with an interrupted preparation of the same input and options.")
    overwrite: bool = option(False, help="Replace what OUTPUT holds.")


class Job:
    """One preparation, in this process, in `workers` processes, or in those of every MPI rank.

    Args:
        output: folder to make; OUTPUT/.work holds intermediate files until the end, OUTPUT/job.json the settings.
        settings: everything but the input that the result depends on, as JSON; a job is only resumed with the same.
        input: the files, each with what tells it from another at its path; a job is resumed with the same
            paths, and once complete only with the same files.
        execution: how to run.

    Raises:
        DataError: OUTPUT holds finished data, or an interrupted job that was not asked to go on, or one
            with other settings, or shards of no known job; another process writes it; the input is in it.
    """

    def __init__(self, output: Path, settings: dict[str, Any], input: Sequence[Any], execution: Execution):
        self.output, self.work = output, output / ".work"
        self.workers = execution.workers
        self.world = _communicator()
        self.rank = self.world.rank if self.world else 0
        self.ranks = self.world.size if self.world else 1
        self.console = Console(stderr=True, quiet=self.rank > 0, soft_wrap=True, highlight=False, markup=False)
        self._pool: ProcessPoolExecutor | None = None
        self._lock = OutputLock(output)
        try:
            self.once(lambda: self._start(settings, input, execution))
        except DataError:
            self._lock.release()
            raise

    @property
    def _splits(self) -> list[Path]:
        return [self.output / split for split in ("train", "validation", "harder")]

    @property
    def complete(self) -> bool:
        """Whether this very job was finished before."""
        return not self.work.exists()

    def _start(self, settings: dict[str, Any], input: Sequence[Any], execution: Execution) -> None:
        self._lock.acquire()
        ours = [*self._splits, self.work]
        for path in {str(file[0]) for file in input}:
            if "://" not in path and any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in ours):
                raise DataError(f"the input {path} is in a folder that is written: choose another --output")
        record = self.output / "job.json"
        names = recorded_names([file[0] for file in input])
        kept = [[names[path], *rest] for path, *rest in input]
        now = json.loads(json.dumps({"settings": settings, "input": kept}))
        if foreign := [p for p in self.work.glob("*") if not _WORK.fullmatch(p.name)]:
            raise DataError(f"{foreign[0]} is not of a preparation, which would remove it with {self.work}: move it")
        if execution.overwrite:
            record.unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)
        elif record.exists():
            self._compare(_content(record), now, execution.resume)
        elif found := [p for folder in self._splits for p in made_in(folder)] or [*self.work.glob("*")]:
            raise DataError(
                f"{self.output} holds {found[0].relative_to(self.output)}, of a preparation that is not "
                "known: choose another --output, or pass --overwrite to replace it"
            )
        if not record.exists() or not self.complete:
            self.work.mkdir(exist_ok=True)
            write_whole(record, json.dumps(now, indent=1) + "\n")

    def _compare(self, before: dict[str, Any], now: dict[str, Any], resume: bool) -> None:
        """Whether the job that OUTPUT holds is this one."""
        what = "prepared data" if self.complete else "an interrupted preparation"
        if not resume:
            raise DataError(
                f"{self.output} already holds {what}: choose another --output, or pass --resume to "
                "complete it or --overwrite to start again"
            )
        other = before.get("settings") != now["settings"]
        old, new = before.get("input", []), now["input"]
        if other or [f[0] for f in old] != [f[0] for f in new] or (self.complete and old != new):
            raise DataError(
                f"{self.output} holds {what} of other input or made with other options: repeat those "
                "to resume it, or pass --overwrite to start again"
            )
        changed = [f[0] for f in new if f not in old]
        if changed:
            self.console.print(f"{len(changed)} input files have changed ({changed[0]}): they are read again")

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(error, DataError) and self.rank == 0 and not any(self.work.rglob("*.np[yz]")):
            shutil.rmtree(self.work, ignore_errors=True)  # nothing is finished: the next try need not resume
            (self.output / "job.json").unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt) and self.rank == 0:
            self.console.print(
                f"stopped: what is finished is kept in {self.output}; the same command with --resume goes on"
            )
        self._lock.release()

    def _agree(self, error: Exception | None) -> None:
        """Raise on every rank what went wrong on any; a file that cannot be written is a DataError."""
        if isinstance(error, OSError):  # one of the input would be a DataError
            error = DataError(
                f"{error.filename or self.output} cannot be written ({said_of(error)}); what is "
                "finished is kept for --resume"
            )
        errors = self.world.allgather(error) if self.world else [error]
        for found in errors:
            if found is not None:
                raise found

    def once(self, function: Callable[[], T]) -> T:
        """The result of a function that only the first rank runs."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error = raised
        self._agree(error)
        return self.world.bcast(result) if self.world else result  # type: ignore[return-value]

    def each(self, title: str, function: Callable[[T], None], items: Sequence[T], target: Callable[[T], Path]) -> None:
        """Run function(item), which makes target(item), for every item whose file is not there yet.

        Args:
            title: of the progress bar.
            function: of a module's top level (or a functools.partial of one), for other processes to import.
            items: the same on every rank.
            target: the file that shows an item is done; other files it makes come before.
        """
        mine = [item for item in items[self.rank :: self.ranks] if not target(item).exists()]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        error: Exception | None = None
        with Progress(*columns, console=self.console) as bar:
            total = len(items[self.rank :: self.ranks])
            task = bar.add_task(title, total=total, completed=total - len(mine))
            try:
                if self.workers == 1:
                    for item in mine:
                        function(item)
                        bar.advance(task)
                else:
                    self._in_processes(function, mine, lambda: bar.advance(task))
            except Exception as raised:
                error = raised
            self._agree(error)

    def _in_processes(self, function: Callable[[T], None], items: list[T], advance: Callable[[], None]) -> None:
        if self._pool is None:
            # spawned: a fork would inherit the locks of MPI's and the libraries' threads
            spawn = multiprocessing.get_context("spawn")
            with naming_shared_memory():
                self._pool = ProcessPoolExecutor(self.workers, spawn, _follow, (os.getpid(),))
        pending: set[Future[None]] = set()
        rest = iter(items)
        try:
            while True:
                while len(pending) < 2 * self.workers and (item := next(rest, None)) is not None:
                    with _without_ctrl_c():  # workers that this starts finish their piece, and say nothing
                        pending.add(self._pool.submit(function, item))
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    advance()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed (out of memory?): go on with --resume and fewer --workers"
            ) from None

    def finish(self) -> None:
        """Remove the intermediate files, once the manifests are published."""

        def remove() -> None:
            for folder in (self.output, *self._splits):
                clear_partial(folder)
            shutil.rmtree(self.work, ignore_errors=True)
            self.console.print(f"complete: {self.output}")

        self.once(remove)
