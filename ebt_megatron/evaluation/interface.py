"""What a modality's evaluation is, beyond validation: a suite, and a report of runs beside each other."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebt_megatron.config import RecipeError
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.tasks import task_class


@dataclass
class SuiteOptions:
    """What the suite looks at.

    Attributes:
        steps: the most thinking steps; None: three times those trained.
        starts: the most starts to choose among.
        baselines: feed-forward runs to set beside the model; the first says how far a shift is.
        shifts: other text by name: folders of shards made with the model's tokenizer.
    """

    steps: int | None = None
    starts: int = 8
    baselines: Sequence[Path] = ()
    shifts: dict[str, str] | None = None

    def check(self) -> None:
        """Raise RecipeError for numbers that mean nothing."""
        if self.steps is not None and self.steps < 1:
            raise RecipeError(f"--steps {self.steps}: at least 1")
        if self.starts < 1:
            raise RecipeError(f"--starts {self.starts}: at least 1")


class Evaluation:
    """Of any modality: no suite, and the report that every run's own files give."""

    def suite(self, run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> dict[str, Any]:
        """What longer thinking, energies and features are good for, as plain numbers.

        Args:
            run_dir: of the run.
            overrides: of its recipe: key=value.
            options: what to look at.

        Raises:
            RecipeError: where run and options do not do, or the modality has no suite.
        """
        raise RecipeError(f"{run_dir}: its modality has no --suite: leave it out")

    def tables(self, numbers: dict[str, Any]) -> list[Table]:
        """What a suite's numbers come to."""
        return []

    def report(
        self, runs: Mapping[str, Path] | Sequence[Path], output: Path, title: str, next_steps: str
    ) -> dict[str, Path]:
        """Write report.html, report.md and their pictures; see `evaluation.report.write_report`.

        Args:
            runs: run directories, by label, or by the names of their recipes.
            output: folder to write to.
            title: heading.
            next_steps: plain text, how to go on from here; "": what the modality suggests.

        Returns:
            Paths by name ("html", "markdown" and each plot).
        """
        from ebt_megatron.evaluation.report import write_report

        return write_report(runs, output, title, next_steps or NEXT_STEPS)


NEXT_STEPS = """\
# think longer than in training
ebt-evaluate RUN --steps 8
# every key a recipe may have
ebt-train --help"""


def evaluation_of(modality: str) -> Evaluation:
    """The evaluation that a modality's task names (`Task.evaluation`)."""
    module, _, name = getattr(task_class(modality), "evaluation", "").partition(":")
    return getattr(importlib.import_module(module), name)() if module else Evaluation()
