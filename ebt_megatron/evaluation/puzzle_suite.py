"""The evaluation suite of a run on puzzles, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebt_megatron.config import RecipeError
from ebt_megatron.evaluation.interface import Evaluation, SuiteOptions
from ebt_megatron.evaluation.puzzles import followed, measure
from ebt_megatron.evaluation.tables import Table, number, percent
from ebt_megatron.session import open_run


def evaluate_puzzle_suite(run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> dict[str, Any]:
    """Run the suite on `training.validation_samples` puzzles, and on as many of each other folder.

    Args:
        run_dir: of any model of puzzles.
        overrides: of its recipe.
        options: `steps` are the most thinking steps or passes (default 32), `starts` to choose among, `shifts` are
            folders of other puzzles of the same size.

    Raises:
        RecipeError, DataError: where run, data or options do not do.
    """
    options.check()
    if options.baselines:
        raise RecipeError("--baseline is for text: models of puzzles are evaluated one by one")
    with open_run(run_dir, overrides) as run:
        count = run.recipe.training.validation_samples
        common = {"count": count, "steps": options.steps or 32, "starts": options.starts}
        out: dict[str, Any] = {
            "name": run.recipe.name,
            "trained steps": run.recipe.thinking.max_steps if run.objective.thinks else run.recipe.puzzles.passes,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "validation": measure(run, None, **common),
        }
        for name, folder in (options.shifts or {}).items():
            out[name] = measure(run, folder, **common)
        out["followed"] = followed(run)
    return out


def puzzle_tables(numbers: Mapping[str, Any]) -> list[Table]:
    """What the suite's numbers come to."""
    out = []
    for split, of in numbers.items():
        if not isinstance(of, dict) or "steps" not in of:
            continue
        rows = [
            [
                str(row["steps"]),
                percent(row["solved"]),
                percent(row["cells right"]),
                number(row["loss"]),
                number(row["energy"], 2),
                number(row["flops"] / 1e6, 1),
            ]
            for row in of["steps"]
        ]
        head = ["steps", "solved", "cells right", "loss", "energy", "MFLOPs a puzzle"]
        out.append(Table(f"{split}: {of['puzzles']} puzzles", head, rows))
        scores = {k: v for k, v in of["verification"].items() if k != "solved"}
        out.append(Table(f"{split}: is it solved? AUROC", list(scores), [[number(v) for v in scores.values()]]))
        if "stopping" in of:
            rules = [[rule, number(by["steps"], 2), percent(by["solved"])] for rule, by in of["stopping"].items()]
            out.append(Table(f"{split}: where thinking ends", ["when", "steps", "solved"], rules))
        for what in ("one error", "starts"):
            if what in of:
                found = {k: number(v, 0) if k == "number" else percent(v) for k, v in of[what].items()}
                out.append(Table(f"{split}: {what}", list(found), [list(found.values())]))
    return out


class PuzzleEvaluation(Evaluation):
    """The evaluation of puzzles: the suite and tables above."""

    def suite(self, run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> dict[str, Any]:
        """See `Evaluation`."""
        return evaluate_puzzle_suite(run_dir, overrides, options)

    def tables(self, numbers: dict[str, Any]) -> list[Table]:
        """See `Evaluation`."""
        return puzzle_tables(numbers)
