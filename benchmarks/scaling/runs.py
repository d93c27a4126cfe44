"""Doing a study's runs: so many at a time on this machine, what is missing alone, and how much is left.

A run's folder is all that is kept of it, so a study that was killed goes on where it was, and machines that share the
folder may do parts of it. Whoever finds a run in use waits for it.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from benchmarks.scaling.plan import Cell, Job, Plan
from benchmarks.seeds import steps_at
from benchmarks.study import Stopped, command, stop_commands, train
from ebt_megatron.config import Recipe, RecipeError, to_yaml
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.records import rows_of
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.training.lock import RunLock

_MEASURED_STEPS = 20  # of a run that only shows how fast this machine is
_LOOK_SECONDS = 1.0  # at a folder that is in use


def loss_of(evaluation: dict[str, Any]) -> float:
    """Validation loss (nats) as trained; infinite where it was not finite."""
    rows = evaluation["thinking"]
    loss = rows[steps_at(rows, evaluation["trained_steps"])]["loss"]
    return math.inf if loss is None else float(loss)


@dataclass(frozen=True)
class Left:
    """What is left of a model's runs.

    Attributes:
        done, left: runs.
        flops: of those left.
        rate: FLOPs a second that its runs here were measured at; None: none was.
    """

    done: int
    left: int
    flops: float
    rate: float | None

    @property
    def seconds(self) -> float | None:
        """Of those left, one at a time: of training alone."""
        return 0.0 if not self.flops else None if self.rate is None else self.flops / self.rate


class Runner:
    """A study's runs in a folder.

    Args:
        plan: the study.
        folder: of its runs.
        workers: runs at a time.
        retries: of a run that fails.
        console: for what is to be seen.
    """

    def __init__(self, plan: Plan, folder: Path, workers: int = 1, retries: int = 1, console: Console | None = None):
        self.plan, self.folder, self.workers, self.retries = plan, folder, workers, retries
        self.console = console or Console(width=160)
        self.failed: dict[Job, str] = {}
        self._running: set[Job] = set()
        self._ending = threading.Event()
        self.recipe = cache(lambda job: plan.recipe(job, folder))
        self._flops = cache(lambda cell: plan.flops(self.recipe(Job(cell, 0, plan.learning_rates[0]))))

    def evaluation(self, job: Job) -> dict[str, Any] | None:
        """What `ebt-evaluate` wrote of a run; None: it is not done."""
        path = self.folder / job.name / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else None

    def factor(self, cell: Cell) -> float:
        """The factor on the learning rate that a cell's first seed did best with.

        Raises:
            RecipeError: if not all were tried yet.
        """
        if len(self.plan.learning_rates) == 1:
            return self.plan.learning_rates[0]
        tried = {factor: self.evaluation(Job(cell, 0, factor)) for factor in self.plan.learning_rates}
        losses = {factor: loss_of(found) for factor, found in tried.items() if found is not None}
        if len(losses) < len(tried):
            missing = next(factor for factor in tried if factor not in losses)
            raise RecipeError(f"{self.folder / Job(cell, 0, missing).name}: learning rates are tried first; run it")
        return min(losses, key=losses.__getitem__)

    def others(self) -> list[Job]:
        """Runs of other seeds, of the cells whose learning rate is known."""
        known = {}
        for cell in self.plan.cells:
            try:
                known[cell] = self.factor(cell)
            except RecipeError:
                continue
        return [job for job in self.plan.others(lambda cell: known.get(cell, math.nan)) if job.cell in known]

    def finished(self) -> list[tuple[Job, dict[str, Any]]]:
        """The runs that count, each cell's with its best learning rate, and their evaluations.

        Raises:
            RecipeError: if one of them is missing, or its loss is not finite.
        """
        jobs = [Job(cell, 0, self.factor(cell)) for cell in self.plan.cells] + self.plan.others(self.factor)
        out = []
        for job in jobs:
            found = self.evaluation(job)
            if found is None or not math.isfinite(loss_of(found)):
                raise RecipeError(f"{self.folder / job.name} {'is not done' if found is None else 'diverged'}")
            out.append((job, found))
        return out

    def do_all(self) -> None:
        """Do what is missing: learning rates first, then other seeds. What failed in the end is in `failed`."""
        with Live(get_renderable=lambda: self.table().rich(), console=self.console, auto_refresh=False) as live:
            self.do(self.plan.first(), live)
            self.do(self.others(), live)

    def do(self, jobs: Sequence[Job], live: Live | None = None) -> None:
        """Do those of some runs that are not done.

        Args:
            jobs: the runs.
            live: refreshed when one begins or ends.
        """
        missing = [job for job in jobs if self.evaluation(job) is None]
        recipes = {job: self.recipe(job) for job in missing}  # here: imports and files are not for threads

        def begun(job: Job) -> None:
            self._running.add(job)
            try:
                self._attempt(job, recipes[job])
            finally:
                self._running.discard(job)

        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(begun, job): job for job in missing}
            try:
                for future in as_completed(futures):
                    job, error = futures[future], future.exception()
                    if isinstance(error, Stopped):
                        raise KeyboardInterrupt
                    if error is not None:
                        self.failed[job] = str(error)
                    found = self.evaluation(job)
                    said = f"failed: {error}" if found is None else f"loss {loss_of(found):.4f}"
                    self.console.print(f"{job.name}: {said}", markup=False, highlight=False)
                    if live is not None:
                        live.refresh()
            except BaseException:
                self._ending.set()
                pool.shutdown(wait=False, cancel_futures=True)
                stop_commands()
                raise

    def _attempt(self, job: Job, recipe: Recipe) -> None:
        """Do a run; raises Stopped, or RuntimeError after the last try."""
        folder = self.folder / job.name
        for tries_left in reversed(range(self.retries + 1)):
            self._wait_for(folder)
            try:
                train(recipe)
                return
            except Stopped:
                raise
            except RuntimeError as error:
                if not tries_left:
                    raise
                self.console.print(f"{job.name} is tried again: {error}", markup=False, highlight=False)

    def _wait_for(self, folder: Path) -> None:
        """Return when no other process trains in a folder: one of a study that was killed, or on another machine."""
        while not self._ending.is_set():
            lock = RunLock(folder)
            try:
                lock.acquire()
            except RecipeError:
                self._ending.wait(_LOOK_SECONDS)
                continue
            lock.release()
            return
        raise Stopped(f"{folder} was not begun")

    # --- how much is left -----------------------------------------------------------------------

    def left(self) -> dict[str, Left]:
        """What is left, by model."""
        done = [job.cell for job in {*self.plan.first(), *self.others()} if self.evaluation(job) is not None]
        out = {}
        for model in self.plan.models:
            missing = {c: self.plan.runs_of_a_cell - done.count(c) for c in self.plan.cells if c.model == model}
            flops = sum(count * self._flops(cell) for cell, count in missing.items())
            here = sum(cell.model == model for cell in done)
            out[model] = Left(here, sum(missing.values()), flops, self.rate(model))
        return out

    def table(self) -> Table:
        """Progress: one row a model, and in the title what is left of all."""
        rows, of = [], self.left()
        for model, left in of.items():
            running, failed = (sum(j.cell.model == model for j in jobs) for jobs in (self._running, self.failed))
            speed = "-" if left.rate is None else f"{left.rate / 1e9:.1f}"
            counts = [str(n) for n in (left.done, running, failed, left.left)]
            rows.append([model, *counts, f"{left.flops / 1e12:.1f}", speed, hours(left.seconds)])
        each = [left.seconds for left in of.values()]
        total = None if None in each else sum(s for s in each if s is not None) / self.workers
        done, left_runs = (sum(getattr(left, name) for left in of.values()) for name in ("done", "left"))
        title = (
            f"{self.plan.name}: {done} of {done + left_runs} runs done; left with {self.workers} at a time: "
            f"{hours(total)} h of training"
        )
        head = [
            "model",
            "done",
            "running",
            "failed",
            "left",
            "TFLOP left",
            "GFLOP/s, measured",
            "hours left, one at a time",
        ]
        return Table(title, head, rows)

    def rate(self, model: str) -> float | None:
        """FLOPs a second of a model's runs in the folder: the median over runs of each one's median step."""
        found = []
        for cell in (c for c in self.plan.cells if c.model == model):
            names = [Job(cell, s, f).name for s in range(self.plan.seeds) for f in self.plan.learning_rates]
            folders = [self.folder / name for name in [*names, _measured(cell)]]
            steps = self.recipe(Job(cell, 0, self.plan.learning_rates[0])).training.steps
            for path in (folder / "metrics.jsonl" for folder in folders):
                rows = [row for row, _ in rows_of(path) if row] if path.exists() else []
                if len(rows) > 1:
                    found.append(self._flops(cell) / steps / statistics.median(r["step_seconds"] for r in rows))
        return statistics.median(found) if found else None

    def measure(self) -> None:
        """Train every model that has no rate yet for a few steps at the middle value."""
        for model in (m for m in self.plan.models if self.rate(m) is None):
            cells = [cell for cell in self.plan.cells if cell.model == model]
            cell = cells[len(cells) // 2]
            folder = self.folder / _measured(cell)
            recipe = self.plan.recipe(Job(cell, 0, self.plan.learning_rates[0]), self.folder)
            recipe.training.output_dir = str(folder)
            recipe.training.steps, recipe.training.log_interval, recipe.optimizer.warmup_steps = _MEASURED_STEPS, 5, 0
            recipe.training.validation_interval = 0
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "asked.yaml", to_yaml(recipe))
            command("ebt_megatron.train", str(folder / "asked.yaml"))


def _measured(cell: Cell) -> str:
    return f"measured-{Job(cell, 0, 1.0).name}"


def hours(seconds: float | None) -> str:
    """So many seconds in hours; "-" for None."""
    return "-" if seconds is None else f"{seconds / 3600:.2f}"
