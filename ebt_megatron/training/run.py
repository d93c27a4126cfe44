"""A run: a recipe from its first or last saved step, its data, its checkpoints and its folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ebt_megatron.checkpoint.checkpoints import Checkpoints
from ebt_megatron.checkpoint.history import begin_anew
from ebt_megatron.checkpoint.start import start_from
from ebt_megatron.config import Recipe, RecipeError, to_yaml
from ebt_megatron.core import cli
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.launch import attempts
from ebt_megatron.core.machine import record_machine
from ebt_megatron.core.own_modules import folder_of
from ebt_megatron.data.loader import Loader, MicroBatch, identity
from ebt_megatron.session import DATA, Session, bring_up
from ebt_megatron.training.faults import BadSteps, BrokenOff, agree
from ebt_megatron.training.metrics import Clock, last_step
from ebt_megatron.training.optimizer import schedule_change, schedule_of
from ebt_megatron.training.trainer import StepResult, Trainer

_MANY_EPOCHS = 4  # repeating data up to about so often is nearly as good as new data (Muennighoff et al., 2305.16264)


class StoppedRun(RuntimeError):
    """Training cannot go on, or what it made is not saved; the message says why and what there is to go on from."""


class Run:
    """A recipe from its first or last saved step to its end.

    Args:
        recipe: resolved and checked.

    Raises:
        RecipeError, DataError: if layout, data or output folder do not do.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.training.output_dir)
        self.state = bring_up(recipe)
        self.is_main = self.state.rank == 0
        self.on_main(partial(_check_writable, self.folder))
        splits = ["train", "validation"] if recipe.training.validation_interval else ["train"]
        self.session = Session.open(recipe, splits, state=self.state)
        self.train_data = self.session.data["train"]
        self.validation_data: Loader | None = self.session.data.get("validation")
        self._look_at_amounts()
        self.trainer = Trainer(recipe, self.session.task, self.state)
        self.timers = self.trainer.timers
        self.step = self.tokens = 0
        self.bad = BadSteps(recipe.training.max_bad_steps)
        self.unwritten: dict[str, Any] | None = None  # the row of the step that was resumed from
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            recipe.training.keep_checkpoints,
            self.session.identity,
            recipe.training.async_save,
            self.warn,
        )
        self.clock = Clock(recipe.training.steps, 0)
        self._stream: Generator[MicroBatch, None, None] | None = None

    # --- what it says ---------------------------------------------------------------------------

    def say(self, text: str, style: str = "") -> None:
        """Print on rank 0."""
        if self.is_main:
            cli.say(text, style)

    def warn(self, text: str) -> None:
        """Print on rank 0, to be seen."""
        self.say(text, "yellow")

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, or raises there, on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (RecipeError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _look_at_amounts(self) -> None:
        options = self.recipe.training
        turns, source = self.train_data.most_repeated(options.steps * options.global_batch_size)
        if turns > _MANY_EPOCHS:
            self.warn(
                f"training.steps={options.steps} goes {turns:.3g} times through {source}: past about "
                f"{_MANY_EPOCHS} epochs repeated data teaches little: prepare more, or train less"
            )
        if self.validation_data is not None and self.validation_data.validation_samples < options.validation_samples:
            self.say(
                f"validation is on all {self.validation_data.validation_samples} samples of data.validation: "
                f"training.validation_samples={options.validation_samples} are not there"
            )

    # --- where it begins ------------------------------------------------------------------------

    def begin(self) -> None:
        """Go on from the newest checkpoint, or begin anew; the folder is this run's alone meanwhile.

        Raises:
            RecipeError, DataError: if the folder's checkpoints do not fit this run.
        """
        if not self.recipe.training.resume:
            launches: list[dict[str, int]] = [{}] * self.state.world_size
            dist.all_gather_object(launches, attempts())  # after a restart rank 0 may be on another machine
            merged = {name: count for found in launches for name, count in found.items()}
            if moved := self.on_main(partial(begin_anew, self.folder, merged)):
                self.warn(f"training.resume=false: what an earlier run left in {self.folder} is moved to {moved}")
        newest = self.checkpoints.resume_point()
        if newest:
            self.restore(newest)
            if self.step > self.recipe.training.steps:
                raise RecipeError(
                    f"{self.folder} is at step {self.step}, past training.steps={self.recipe.training.steps}: "
                    "nothing is changed; give more steps, or training.resume=false to begin anew"
                )
            self.say(f"resumed from {newest}")
        elif self.recipe.training.start_from:
            vocab_size = getattr(self.session.task, "vocab_size", 0)
            source, model = Path(self.recipe.training.start_from), self.trainer.model
            self.say(f"begins with {start_from(source, model, self.recipe, self.session.identity, vocab_size)}")
            self.trainer.optimizer.reload_model_params()
            if self.trainer.average is not None:
                self.trainer.average.reset()
        # Only now: a run that does not fit the folder must leave it as it is.
        self.checkpoints.go_on_from(self.step)
        self.on_main(partial(self.session.source.copy_to, self.folder / DATA))
        self.on_main(partial(write_whole, self.folder / "recipe.yaml", to_yaml(self.recipe)))
        module, own, _ = self.recipe.data.modality.partition(":")
        modules = folder_of(module) if own else None
        self.on_main(partial(record_machine, self.folder, self.state.world_size, modules))
        logged = self.on_main(partial(last_step, self.folder))
        if logged > self.step:
            why = "" if newest else f"no checkpoint in {self.checkpoints.folder}, starting at step 0: "
            self.warn(
                f"{why}metrics.jsonl goes to step {logged}; its rows after step {self.step} are kept in "
                "metrics-replaced.jsonl"
            )
        if logged >= self.step:
            self.unwritten = None
        self.clock = Clock(self.recipe.training.steps, self.step)

    def restore(self, newest: Path) -> None:
        """Go back to a checkpoint."""
        t = self.trainer
        self.step, extra, rank_states = self.checkpoints.load(newest, t.model, t.optimizer, t.scheduler, t.average)
        self.tokens = extra["tokens"]
        self.train_data.load_state_dict(extra["data"])
        t.objective.load_rank_states(rank_states)
        # What follows is not in older checkpoints.
        self.bad.in_a_row = extra.get("bad_in_a_row", 0)
        self.unwritten = extra.get("row")
        if change := schedule_change(self.recipe, extra.get("schedule", {}), self.step):
            self.warn(change)
        if extra.get("validation", self._validation_identity()) != self._validation_identity():
            self.warn(
                "data.validation or training.validation_samples changed: validation losses before and after "
                f"step {self.step} are of other samples"
            )

    def _validation_identity(self) -> list[Any] | None:
        data = self.validation_data
        return None if data is None else [data.validation_samples, *(identity(s.manifest) for s in data.sources)]

    # --- a step ---------------------------------------------------------------------------------

    def take_step(self) -> tuple[StepResult, float]:
        """One optimizer step on the next global batch, and the seconds since the last one ended."""
        options, position = self.recipe.training, self.train_data.consumed
        count = options.global_batch_size // (options.micro_batch_size * self.state.data_size)
        self._stream = self._stream or iter(self.train_data)
        try:
            micro_batches = self.read(self._stream, count)
        except BrokenOff:
            self.train_data.consumed = position  # others have taken theirs
            raise
        result = self.trainer.train_step(micro_batches, self.step)
        self.step += 1
        self.tokens += result.positions
        return result, self.clock.tick(self.step)

    def read(self, stream: Iterator[MicroBatch], count: int = 1) -> list[MicroBatch]:
        """The next micro-batches of a loader, fewer at its end; all ranks call it together.

        Raises:
            BrokenOff: on every rank, where one cannot read its own.
        """
        micro_batches, error = [], None
        with self.timers.phase("data"):
            try:
                micro_batches = list(itertools.islice(stream, count))
            except Exception as reason:
                error = reason
        with self.timers.phase("communication"):
            agree(error, self.state.device)
        return micro_batches

    def rewind(self, newest: Path) -> None:
        """Go back to a checkpoint, but not back in the data."""
        position = self.train_data.state_dict()
        self.restore(newest)
        self.checkpoints.go_on_from(self.step)
        self.close()
        self.train_data.load_state_dict(position)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    # --- saving ---------------------------------------------------------------------------------

    def write_checkpoint(self, row: dict[str, Any] | None, among: Checkpoints | None = None) -> str | None:
        """Save the step; returns why it is not there, if it failed.

        Args:
            row: what will be recorded of it.
            among: other checkpoints than those that the run goes on from.
        """
        extra = {
            "tokens": self.tokens,
            "data": self.train_data.state_dict(),
            "schedule": schedule_of(self.recipe),
            "validation": self._validation_identity(),
            "bad_in_a_row": self.bad.in_a_row,
            "row": row,
        }
        t, good = self.trainer, not self.bad.in_a_row
        with self.timers.phase("save"):
            return (among or self.checkpoints).save(
                self.step, t.model, t.optimizer, t.scheduler, extra, t.objective.rank_state(), good, t.average
            )

    def report_unsaved(self, error: str | None) -> None:
        """Say why a checkpoint is not there, if it is not."""
        if error:
            self.say(f"checkpoint not saved: {error}; training goes on", "red")


def _check_writable(folder: Path) -> None:
    """Raise RecipeError if no files can be made in `folder`, which need not be there yet."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise RecipeError(f"training.output_dir={folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"training.output_dir={folder}: {there} cannot be written")
