"""Run a test's function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

# A server process that has imported torch and megatron-core once; ranks are forked from it in no time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "ebt_megatron.parallel.setup",
        "megatron.core.dist_checkpointing.strategies.fully_parallel",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel.schedules",
    ]
)


class RankError(AssertionError):
    """A rank raised, died or timed out; the message holds its traceback."""


def _rank_main(
    pipe: Connection, fn: Callable[..., Any], rank: int, world_size: int, port: int, env: dict, args: tuple
) -> None:
    os.environ.update(
        env,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is served by the parent, as torchrun's agent does
    )
    try:
        import torch

        torch.set_num_threads(1)
        pipe.send((True, fn(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        # Leave at once: peers may be stuck in a collective with us, and there is nothing to tidy up.
        os._exit(0)


class Ranks:
    """`fn(*args)` on `world_size` ranks of this machine, started at once.

    Each rank sees the variables torchrun would set, so `fn` starts with `setup.initialize`.

    Args:
        fn: a top-level function of an importable module; its results must pickle.
        timeout: seconds a rank waits for the others to come up.
        env: more environment variables for the ranks.
    """

    def __init__(
        self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, env: dict | None = None
    ):
        import torch.distributed as dist

        wait = timedelta(seconds=timeout)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main,
                args=(sender, fn, rank, world_size, self.store.port, env or {}, args),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether any rank is still at work."""
        return any(p.is_alive() for p in self.processes)

    def kill(self, *ranks: int) -> None:
        """SIGKILL some ranks (none named: all) and wait for their end."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
            self.processes[rank].join()

    def results(self, timeout: float) -> list[Any]:
        """What each rank returned, in rank order; ranks are killed when one fails or time is up.

        Raises:
            RankError: with the traceback of the first rank that failed.
        """
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < len(self.pipes):
                waiting = [p for r, p in enumerate(self.pipes) if r not in results]
                ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [r for r in range(len(self.pipes)) if r not in results]
                    raise RankError(f"ranks {missing} gave no answer within {timeout:g} s")
                for pipe in ready:
                    rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        ok, value = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        raise RankError(f"rank {rank} died without an answer") from None
                    if not ok:
                        raise RankError(f"rank {rank} failed:\n{value}")
                    results[rank] = value
        finally:
            if len(results) < len(self.pipes):
                self.kill()
            for process in self.processes:
                process.join()
        return [results[rank] for rank in range(len(self.pipes))]


@contextmanager
def no_survivors() -> Iterator[None]:
    """Kill, at the end, every process that was started inside, also those in sessions of their own or without a parent.

    torchrun's ranks are both, once a test has killed torchrun. They are known by a variable that they inherit.
    """
    mark = f"test-{uuid.uuid4().hex}"

    def marked(process: psutil.Process) -> bool:
        try:
            return process.environ().get("STARTED_BY") == mark
        except psutil.Error:
            return False

    before = os.environ.get("STARTED_BY")
    os.environ["STARTED_BY"] = mark
    try:
        yield
    finally:
        os.environ.pop("STARTED_BY")
        if before is not None:
            os.environ["STARTED_BY"] = before
        while survivors := [p for p in psutil.process_iter() if marked(p)]:
            for process in survivors:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(survivors, 10)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, env: dict | None = None
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks; returns their results in rank order (see `Ranks`)."""
    return Ranks(fn, world_size, *args, timeout=timeout, env=env).results(timeout)
