"""Runs of several seeds: each command once, and what the seeds say together."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ebt_megatron.config import Recipe, to_yaml
from ebt_megatron.core.files import write_whole

# Two-sided 95 % quantiles of Student's t by degrees of freedom (n - 1 seeds).
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_LINES_SHOWN = 2000  # characters of a failed command's errors


@dataclass(frozen=True)
class Model:
    """What is trained: a recipe of a quickstart with changes; flops_of: for as many FLOPs as that model."""

    recipe: str
    overrides: tuple[str, ...] = ()
    flops_of: str | None = None


def run_folder(runs: Path, name: str, seed: int) -> Path:
    """Return the folder of the run of a model with a seed."""
    return runs / f"{name.lower().replace('++', 'pp').replace(',', '').replace(' ', '-')}-{seed}"


def steps_at(rows: list[dict[str, Any]], steps: int) -> int:
    """The index of the row of so many thinking steps; the first row is of one, or of none where that predicts."""
    return next(i for i, row in enumerate(rows) if row["steps"] == steps)


def resolved_recipe(
    models: Mapping[str, Model],
    name: str,
    load: Callable[[Model, int | None], Recipe],
    flops: Callable[[Recipe], float],
    steps: int | None,
) -> Recipe:
    """The recipe of a run, its number of steps resolved.

    Args:
        models: by name.
        name: of the one.
        load: a model and a number of steps (None: its recipe's) -> the recipe.
        flops: of a whole training.
        steps: of models that are not trained for as many FLOPs as another.
    """
    model, recipe = models[name], load(models[name], steps)
    if model.flops_of is None:
        return recipe
    budget = flops(load(models[model.flops_of], steps))
    return load(model, round(recipe.training.steps * budget / flops(recipe)))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % interval (Student's t); nan for one seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of values, one for each seed."""
        mean, n = statistics.fmean(values), len(values)
        half = STUDENT_T[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(mean, half)

    def text(self, digits: int = 3, scale: float = 1) -> str:
        """E.g. '3.951 ± 0.012', both multiplied by `scale`."""
        spread = "" if math.isnan(self.half) else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{spread}"


def over_seeds(values: Sequence[Any], left_out: Collection[str] = ()) -> Any:
    """Equal trees of numbers -> one tree of intervals; what is no number is the first one's.

    Args:
        values: a tree for each seed.
        left_out: keys that the result has not.
    """
    first = values[0]
    if isinstance(first, dict):
        return {key: over_seeds([v[key] for v in values], left_out) for key in first if key not in left_out}
    if isinstance(first, list):
        return [over_seeds(rows, left_out) for rows in zip(*values, strict=True)]
    if isinstance(first, int | float) and None not in values:
        return vars(Interval.of(values))
    return first


def text_of(entry: Mapping[str, float] | None, digits: int = 3, scale: float = 1, unit: str = "") -> str:
    """`Interval.text` of an interval of `over_seeds`, and its unit; "-" for None."""
    return "-" if entry is None else Interval(**entry).text(digits, scale) + unit


def write_results(
    folder: Path, name: str, results: dict[str, Any], text: str, plot: Callable[[dict[str, Any], Path], None]
) -> None:
    """Write NAME-cpu-DATE.json, .md and .png into a folder; `plot` makes the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}-cpu-{date.today().isoformat()}"
    write_whole(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_whole(stem.with_suffix(".md"), text)
    plot(results, stem.with_suffix(".png"))


def once(result: Path, module: str, *arguments: str) -> None:
    """Run `python -m MODULE ...` on one thread, unless its result is there.

    Raises:
        RuntimeError: if it fails; with the end of its errors.
    """
    if result.exists():
        return
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with code {done.returncode}:\n{done.stderr[-_LINES_SHOWN:]}")


def train(
    recipe: Recipe, *evaluation: str, result: str = "evaluation.json"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train and evaluate on one process; a run that is done is not repeated, one that was stopped goes on.

    Args:
        recipe: of the run, resolved.
        evaluation: more arguments of `ebt-evaluate`.
        result: the file that these make it write.

    Returns:
        (what the evaluation wrote, the rows of metrics.jsonl).
    """
    folder = Path(recipe.training.output_dir)
    evaluated = folder / result
    if not evaluated.exists():
        folder.mkdir(parents=True, exist_ok=True)
        asked = folder / "asked.yaml"
        asked.write_text(to_yaml(recipe))
        once(evaluated, "ebt_megatron.train", str(asked))
        once(evaluated, "ebt_megatron.evaluate", str(folder), *evaluation)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads(evaluated.read_text()), rows
