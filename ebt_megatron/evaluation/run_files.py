"""What a run directory says about itself, for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebt_megatron.core.errors import RecipeError


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
            ("evaluation.json", f"python -m ebt_megatron.evaluate {path}"),
        ):
            if not (path / name).exists():
                raise RecipeError(f"{path / name} is missing: {how}")
        lines = (path / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads((path / "evaluation.json").read_text())
        suite = json.loads((path / "suite.json").read_text()) if (path / "suite.json").exists() else {}
        return cls(label or evaluation["name"], path, [json.loads(line) for line in lines], evaluation, suite)

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
