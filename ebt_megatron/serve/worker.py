"""The one thread that uses the model: it takes texts as they come and lets them grow together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.pool import Growing, Pool

Result = TypeVar("Result")


class Worker(threading.Thread):
    """Runs a pool.

    Args:
        pool: used by this thread alone, but for `check`.
        waiting: the most texts that wait for a row.
    """

    def __init__(self, pool: Pool, waiting: int):
        super().__init__(name="model", daemon=True)
        self.pool, self.most, self.served = pool, waiting, 0
        self._queue: deque[Growing] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed, self._stopping = threading.Condition(), False

    def submit(self, texts: list[Growing]) -> None:
        """Let texts grow; each is told of by its `watch`, in this thread.

        Raises:
            RecipeError: where too many wait already.
        """
        with self._changed:
            if len(self._queue) + len(texts) > self.most:
                raise RecipeError(f"{len(self._queue)} texts wait already, of at most {self.most}: try again later")
            self._queue.extend(texts)
            self._changed.notify()

    def use(self, work: Callable[[], Result]) -> Future[Result]:
        """Let this thread do something else with the model, between two passes; the future has what it gives."""
        future: Future[Result] = Future()
        with self._changed:
            self._jobs.append((work, future))
            self._changed.notify()
        return future

    @property
    def load(self) -> dict[str, int]:
        """How many texts grow, wait, and have been complete."""
        return {"growing": len(self.pool.rows) - self.pool.free, "waiting": len(self._queue), "served": self.served}

    def stop(self) -> None:
        """End after the pass under way."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        """Until `stop`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._queue or self._jobs or self.pool.busy)
                if self._stopping:
                    break
                jobs = list(self._jobs)
                self._jobs.clear()
                while self.pool.free and self._queue:
                    text = self._queue.popleft()
                    if not text.cancelled:
                        self.pool.add(text)
            for work, future in jobs:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(work())
                    except Exception as error:
                        future.set_exception(error)
            growing = [text for text in self.pool.rows if text is not None]
            try:
                self.pool.step()
            except Exception as error:  # of a text, or of the machine: all are told, and the next ones served
                for text in growing:
                    text.cancelled, text.error = True, f"{type(error).__name__}: {error}"
                    if text.watch is not None:
                        text.watch(text, "")
            self.served += sum(text.done and not text.cancelled for text in growing)
