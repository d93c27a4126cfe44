"""Preparation spread over processes and MPI ranks, restartable, with output that no layout changes.

A preparation is a few passes over lists of items; each item makes one file, which is renamed into
place when complete. So a killed job goes on by making the files that are missing, and the number
of processes changes nothing but the time:

    with Job(output, settings, workers=4, resume=True, overwrite=False) as job:
        job.each("encoding", encode, units, target=file_of_unit)
        shards = job.once(plan)
        job.each("writing", write, shards, target=file_of_shard)
        job.once(publish)
        job.finish()

Under `mpirun -n N` every rank runs the same program; items are dealt over ranks, then over each
rank's own processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ebt_megatron.data.shards import DataError

T = TypeVar("T")
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class WorkerKilled(DataError):
    """A process died; what is finished is good."""


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


class Job:
    """One preparation, in this process, in `workers` processes, or in those of every MPI rank.

    Args:
        output: folder to make; OUTPUT/.work holds intermediate files until the end, OUTPUT/job.json the settings.
        settings: everything the result depends on (options, input files and their sizes), as JSON; a job
            is only resumed with the same.
        workers: processes (of each MPI rank); 1: this one.
        resume: go on with an interrupted job.
        overwrite: remove what OUTPUT holds.

    Raises:
        DataError: OUTPUT holds finished data, or an interrupted job that was not asked to go on, or one
            with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], workers: int, resume: bool, overwrite: bool):
        self.output, self.work = output, output / ".work"
        self.workers = workers
        self.world = _communicator()
        self.rank = self.world.rank if self.world else 0
        self.ranks = self.world.size if self.world else 1
        self.console = Console(stderr=True, quiet=self.rank > 0)
        self._pool: ProcessPoolExecutor | None = None
        self.once(lambda: self._start(settings, resume, overwrite))

    @property
    def complete(self) -> bool:
        """Whether this very job was finished before."""
        return not self.work.exists()

    def _start(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        record = self.output / "job.json"
        if overwrite:
            record.unlink(missing_ok=True)
            for folder in (self.output / "train", self.output / "validation", self.work):
                shutil.rmtree(folder, ignore_errors=True)
        if record.exists():
            what = "an interrupted preparation" if self.work.exists() else "prepared data"
            if not resume:
                raise DataError(f"{self.output} already holds {what}: choose another --output, or pass --resume to "
                                "complete it or --overwrite to start again")  # fmt: skip
            if json.loads(record.read_text())["digest"] != digest:
                raise DataError(f"{self.output} holds {what} of other input or made with other options: repeat those "
                                "to resume it, or pass --overwrite to start again")  # fmt: skip
            return
        self.work.mkdir(parents=True, exist_ok=True)
        partial = self.work / "job.json.partial"
        partial.write_text(json.dumps({"digest": digest, "settings": settings}, indent=1) + "\n")
        os.replace(partial, record)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(error, DataError) and not isinstance(error, WorkerKilled) and self.rank == 0:
            # what was made from input or options that must change is of no use
            (self.output / "job.json").unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)

    def _agree(self, error: Exception | None) -> None:
        """Raise on every rank what went wrong on any."""
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
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
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
            self._pool = ProcessPoolExecutor(self.workers, spawn, _follow, (os.getpid(),))
        pending: set[Future[None]] = set()
        rest = iter(items)
        try:
            while True:
                while len(pending) < 2 * self.workers and (item := next(rest, None)) is not None:
                    pending.add(self._pool.submit(function, item))
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    advance()
        except BrokenProcessPool:
            raise WorkerKilled(
                "a worker process was killed (out of memory?): go on with --resume and fewer --workers"
            ) from None

    def finish(self) -> None:
        """Remove the intermediate files, once the manifests are published."""

        def remove() -> None:
            for left in self.output.glob("*/*.partial"):  # of processes that were killed
                left.unlink()
            shutil.rmtree(self.work, ignore_errors=True)
            self.console.print(f"complete: {self.output}", soft_wrap=True, highlight=False)

        self.once(remove)
