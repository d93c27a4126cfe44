"""A study as arrays of Slurm: every task does one run, by its index, in the same folders as on one machine."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scaling.plan import Cell, Job
from benchmarks.scaling.runs import Runner
from ebt_megatron.config import RecipeError

SCRIPT = Path(__file__).with_name("array.sbatch")


def job_of(runner: Runner, index: int) -> Job:
    """The run of an index: those of learning rates, then those of other seeds.

    Raises:
        RecipeError: if there is none, or its learning rate is not known yet.
    """
    first, plan = runner.plan.first(), runner.plan
    if index < len(first):
        return first[index]
    others = plan.others(_any_factor)
    if index >= len(first) + len(others):
        raise RecipeError(f"--index {index}: the study has {len(first) + len(others)} runs")
    job = others[index - len(first)]
    return Job(job.cell, job.seed, runner.factor(job.cell))


def missing(runner: Runner) -> tuple[list[int], list[int]]:
    """Indices of the runs that are not done: of learning rates, and of other seeds."""
    first = runner.plan.first()
    tried = {i: job for i, job in enumerate(first) if runner.evaluation(job) is None}
    unknown = {job.cell for job in tried.values()}

    def is_missing(job: Job) -> bool:
        return job.cell in unknown or runner.evaluation(Job(job.cell, job.seed, runner.factor(job.cell))) is None

    others = runner.plan.others(_any_factor)
    return list(tried), [len(first) + i for i, job in enumerate(others) if is_missing(job)]


def _any_factor(cell: Cell) -> float:
    return 1.0


def ranges(indices: Sequence[int]) -> str:
    """Rising indices as sbatch takes them: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ",".join("-".join(map(str, part)) for part in parts)


def submit(runner: Runner, study: Path, runs: Path) -> list[str]:
    """Submit what is missing: an array of learning rates, and one of other seeds that waits for its end.

    Partition, time and more are sbatch's own environment: SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_GPUS ...

    Args:
        runner: the study's.
        study: its file.
        runs: where all studies' runs go.

    Returns:
        The arrays' numbers; none if nothing is missing.

    Raises:
        RecipeError: without sbatch, or if it refuses.
    """
    numbers: list[str] = []
    for indices in missing(runner):
        if not indices:
            continue
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        array = [f"--array={ranges(indices)}", *after, str(SCRIPT)]
        line = ["sbatch", "--parsable", *array, str(study.absolute()), "--runs", str(runs.absolute())]
        try:
            answer = subprocess.run(line, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise RecipeError("--slurm: there is no sbatch here") from None
        except subprocess.CalledProcessError as error:
            raise RecipeError(f"--slurm: sbatch refused: {error.stderr.strip()}") from None
        numbers.append(answer.stdout.strip().partition(";")[0])
    return numbers
