"""The command: `python -m benchmarks.scaling STUDY.yaml`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.scaling import report, slurm
from benchmarks.scaling.plan import Job, Plan, tokens
from benchmarks.scaling.runs import Runner, hours
from benchmarks.study import write_results
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import machine
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.tools.hardware import Hardware
from ebt_megatron.tools.plan import estimate


def planned(runner: Runner) -> list[Table]:
    """A plan with its cost, how fast this machine is, and what differences it can tell."""
    plan, rows, baseline = runner.plan, [], []
    for cell in plan.cells:
        job = Job(cell, 0, plan.learning_rates[0])
        recipe = runner.recipe(job)
        sizes = report.sizes(plan, job, recipe)
        memory = estimate(recipe, plan.task(recipe), 1, Hardware(1, 1, 1))  # its times are not used
        rate = runner.rate(cell.model)
        rows.append(
            [
                cell.model,
                f"{cell.value:g}",
                f"{tokens(recipe) / 1e6:.2f}",
                str(recipe.training.steps),
                f"{recipe.optimizer.lr:.2g}",
                f"{sizes['layers'] / 1e3:.0f}",
                f"{sizes['parameters'] / 1e3:.0f}",
                f"{(memory.weight_bytes + memory.activation_bytes) / 1e6:.0f}",
                f"{sizes['flops'] / 1e12:.2f}",
                hours(None if rate is None else sizes["flops"] / rate),
            ]
        )
        if cell.model == plan.baseline:
            baseline.append(sizes)
    head = ["model", plan.axis, "Mtokens", "steps", "rate by rule", "k weights in layers", "all"]
    total = plan.runs_of_a_cell * sum(float(row[-2]) for row in rows)
    title = (
        f"{len(rows)} cells of {plan.runs_of_a_cell} runs: factors {plan.learning_rates} on the learning rate with the "
        f"first of {plan.seeds} seeds, the best of them with the others; {total:.0f} TFLOP in all"
    )
    return [
        Table(title, [*head, "MB, estimated", "TFLOP a run", "hours a run"], rows),
        runner.table(),
        report.power(plan, baseline),
    ]


def fit(runner: Runner, output: Path | None) -> None:
    """Fit what is done, print it, and write it: rows to NAME.jsonl, all else to NAME-cpu-DATE.{json,md,png}."""
    plan = runner.plan
    rows = [report.row(plan, job, runner.recipe(job), found) for job, found in runner.finished()]
    write_whole(runner.folder / f"{plan.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    where = machine()
    found = {"machine": where, "seeds": plan.seeds} | report.results(plan, rows)
    begin = (
        f"Scaling on {where['machine']}, torch {where['torch']}, {where['date']}. Losses are means ± half-widths of "
        f"95 % intervals over {plan.seeds} seeds."
    )
    text = "\n\n".join([begin, *(f"{t.title}:\n\n{t.markdown()}" for t in report.tables(plan, found))]) + "\n"
    runner.console.print(text, markup=False, highlight=False)
    write_results(output or runner.folder, plan.name, found, text, report.plot(plan, found))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(
    study: Path = typer.Argument(..., help="A YAML file, such as benchmarks/studies/data.yaml."),
    runs: Path = typer.Option(Path("runs/scaling"), help="Where the runs go; what is done there is not repeated."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs."),
    workers: int = typer.Option(1, min=1, help="Runs at a time, each on one thread."),
    retries: int = typer.Option(1, min=0, help="Of a run that fails."),
    measure: bool = typer.Option(False, "--measure", help="First train models without a finished run for 20 steps."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan, its cost and its power; nothing is done."),
    use_slurm: bool = typer.Option(False, "--slurm", help="Submit what is missing to Slurm instead of doing it here."),
    index: int | None = typer.Option(None, min=0, help="Do this run alone: what a task of Slurm's array does."),
) -> None:
    """Plan, run, resume and fit a scaling study."""

    def work() -> None:
        plan = Plan.read(study)
        runner = Runner(plan, runs / plan.name, workers, retries, Console(width=160))
        if measure:
            runner.measure()
        if dry_run:
            for table in planned(runner):
                typer.echo(f"{table.title}:\n\n{table.markdown()}\n")
        elif use_slurm:
            numbers = slurm.submit(runner, study, runs)
            typer.echo(f"submitted: {', '.join(numbers)}" if numbers else "nothing is missing")
        else:
            for number in (signal.SIGTERM, signal.SIGUSR1):  # as Ctrl-C: trainings save
                signal.signal(number, _interrupt)
            runner.folder.mkdir(parents=True, exist_ok=True)
            if index is None:
                runner.do_all()
            else:
                runner.do([slurm.job_of(runner, index)])
            if runner.failed:
                names = ", ".join(job.name for job in runner.failed)
                typer.echo(f"failed, and tried again by the same command: {names}", err=True)
                raise typer.Exit(1)
            if index is None:
                fit(runner, output)

    quiet_libraries()
    guarded(work, stopped=lambda: "the same command goes on")


if __name__ == "__main__":
    typer.run(main)
