"""The training loop: one optimizer step after the other, and hooks that look at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ebt_megatron.training.faults import BrokenOff
from ebt_megatron.training.run import Run
from ebt_megatron.training.trainer import StepResult


@dataclass
class Moment:
    """A step that was taken, and what hooks made of it.

    Attributes:
        result: what the step did.
        seconds: it took.
        logged: whether its phases were timed exactly.
        ends: whether it is the run's last.
        row: what is recorded of it; None: nothing.
        stops: whether training ends here; True as well where ranks were told to stop.
        unsaved: why the last checkpoint is not there.
        rewound: whether the run went back to an earlier step; no other hook sees the step.
    """

    result: StepResult
    seconds: float
    logged: bool
    ends: bool
    row: dict[str, Any] | None = None
    stops: bool = False
    unsaved: str | None = None
    rewound: bool = False


class Hook:
    """Something that is done beside training; hooks are called in the order they are given.

    Args:
        run: the run.
    """

    def __init__(self, run: Run):
        self.run = run

    def begin(self) -> None:
        """Called before the first step."""

    def after_step(self, moment: Moment) -> None:
        """Called after each step, on every rank."""

    def broken_off(self) -> None:
        """Called between two steps, before an error that all ranks know of ends the run."""

    def close(self) -> None:
        """Called at the end, also after an error."""


def train(run: Run, hooks: Sequence[Hook]) -> None:
    """Take steps to the end of the run, or until a hook stops it.

    Where a rank cannot read its data, that rank raises what was wrong, and the others a PeerError.
    """
    options = run.recipe.training
    try:
        for hook in hooks:
            hook.begin()
        while run.step < options.steps:
            logged = (run.step + 1) % options.log_interval == 0 or run.step + 1 == options.steps
            run.timers.synchronize = logged
            result, seconds = run.take_step()
            moment = Moment(result, seconds, logged, run.step == options.steps)
            for hook in hooks:
                hook.after_step(moment)
                if moment.rewound:
                    break
            if moment.stops:
                return
    except BrokenOff as reason:
        for hook in hooks:
            hook.broken_off()
        raise reason.error from None
    finally:
        run.close()
        for hook in hooks:
            hook.close()
