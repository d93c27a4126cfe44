"""What a run directory says about itself, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebt_megatron.core.cli import say
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.records import record_of, rows_of


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that are of a step; says how many lines are no whole rows."""
    found = [row for row, _ in rows_of(path / "metrics.jsonl")]
    metrics = [row for row in found if row is not None and "step" in row]
    if broken := len(found) - len(metrics):
        say(f"{path / 'metrics.jsonl'}: {broken} lines are no whole rows, and are read over", "yellow", "note:")
    return metrics


@dataclass
class RunFiles:
    """A run's metrics.jsonl, evaluation.json and, where it was evaluated with --suite, suite.json.

    Attributes:
        label: how the report calls it.
    """

    label: str
    path: Path
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    suite: dict[str, Any]

    @classmethod
    def read(cls, path: Path, label: str | None = None) -> RunFiles:
        """Read a run; it is called `label`, or by its recipe's name.

        Raises:
            RecipeError: naming what is missing and the command that makes it.
        """
        for name, how in (
            ("metrics.jsonl", "train it first"),
            ("evaluation.json", f"ebt-evaluate {path}"),
        ):
            if not (path / name).exists():
                raise RecipeError(f"{path / name} is missing: {how}")
        metrics = metrics_of(path)
        if not metrics:
            raise RecipeError(f"{path / 'metrics.jsonl'} has no row of a step: train it first")
        evaluation = record_of(path / "evaluation.json")
        if any(row["loss"] is None for row in evaluation["thinking"]):
            raise RecipeError(f"{path / 'evaluation.json'} has losses that are not finite: leave the run out")
        suite = record_of(path / "suite.json") if (path / "suite.json").exists() else {}
        return cls(label or evaluation["name"], path, metrics, evaluation, suite)

    @classmethod
    def read_all(cls, paths: Sequence[Path], labels: Sequence[str] = ()) -> list[RunFiles]:
        """Read runs; those that would be called alike are told apart by their folders.

        Args:
            paths: of the runs.
            labels: of all of them, or none.

        Raises:
            RecipeError: see `read`; for another number of labels than of runs, or one that is given twice.
        """
        if labels and len(labels) != len(paths):
            raise RecipeError(f"{len(labels)} labels for {len(paths)} runs: give each run one, in their order")
        for one, count in Counter(labels or [str(path.resolve()) for path in paths]).items():
            if count > 1:
                raise RecipeError(f"{one} is given {count} times: give it once, or each time another label")
        given: Sequence[str | None] = labels or [None] * len(paths)
        runs = [cls.read(path, label) for path, label in zip(paths, given, strict=True)]
        for name_of in (lambda run: f"{run.label} ({run.path.resolve().name})", lambda run: str(run.path.resolve())):
            counts = Counter(run.label for run in runs)
            for run in runs:
                if counts[run.label] > 1:
                    run.label = name_of(run)
        return runs

    @property
    def thinks(self) -> bool:
        """Whether it is an EBT."""
        return self.evaluation["architecture"] == "ebt"

    @property
    def final(self) -> dict[str, Any]:
        """The evaluation at the steps trained with."""
        return next(r for r in self.evaluation["thinking"] if r["steps"] == self.evaluation["trained_steps"])

    @property
    def tokens(self) -> int:
        """The tokens it was trained on."""
        return self.metrics[-1]["tokens"]

    @property
    def flops_a_token(self) -> float:
        """The training FLOPs of a token."""
        row = self.metrics[-1]
        return row["model_flops_per_second"] / row["tokens_per_second"]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, value) of every logged step that has the key."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["tokens"] for row in rows], [row[key] for row in rows]
