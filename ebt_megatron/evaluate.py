"""Evaluate a run: `python -m ebt_megatron.evaluate RUN_DIR`, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries, say
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.records import to_json

if TYPE_CHECKING:
    from ebt_megatron.evaluation.interface import SuiteOptions

app = typer.Typer()


def _suite(run_dir: Path, overrides: list[str], options: SuiteOptions, target: Path) -> None:
    """Write the suite's numbers, and show what they come to."""
    from rich.console import Console

    from ebt_megatron.evaluation.interface import evaluation_of
    from ebt_megatron.session import recipe_of

    evaluation = evaluation_of(recipe_of(run_dir, overrides).data.modality)
    numbers = evaluation.suite(run_dir, overrides, options)
    write_whole(target, to_json(numbers, indent=1) + "\n")
    console = Console(soft_wrap=True, highlight=False)
    for table in evaluation.tables(numbers):
        console.print(table.rich())
    console.print(f"{target} has all numbers")


@app.command()
def main(
    run_dir: Path = typer.Argument(..., help="A training.output_dir."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. training.validation_samples=1024."),
    steps: int | None = typer.Option(
        None, min=0, help="The most thinking steps or passes; default: twice those trained with (the suite: more)."
    ),
    output: Path | None = typer.Option(None, help="Where to write; default: RUN_DIR/evaluation.json, or suite.json."),
    example: bool = typer.Option(True, help="Work out one token, too."),
    suite: bool = typer.Option(
        False,
        "--suite",
        help="Text: thinking, starts, energies, uncertainty, shifts. Images: passes, a probe, shifts. Puzzles: solved.",
    ),
    baseline: list[Path] = typer.Option(
        [], help="For the suite of text: runs of Transformer++; the first measures shifts."
    ),
    rival: list[Path] = typer.Option([], hidden=True, help="The name of --baseline before 0.2."),
    shift: list[str] = typer.Option(
        [], help="For the suite: NAME=FOLDER of other samples, prepared with the run's tokenizer or encoder."
    ),
    starts: int = typer.Option(8, min=1, help="For the suites of text and puzzles: the most starts to choose among."),
) -> None:
    """Write validation loss, perplexity, energy and accuracy against thinking steps as JSON.

    The layout of the evaluation is its own: one process unless started by torchrun with
    parallel.* overrides. With --suite: what longer thinking, several starts and energies are good for, beside
    Transformer++ (docs/evaluation.md).
    """

    def work() -> None:
        target = output or run_dir / ("suite.json" if suite else "evaluation.json")
        if not target.absolute().parent.is_dir():
            raise RecipeError(f"--output {target}: {target.parent} is not a folder")
        if rival:
            say("warning: --rival is --baseline since version 0.2; the old name goes with 0.3")
        baselines = [*baseline, *rival]
        if (baselines or shift) and not suite:
            raise RecipeError("--baseline and --shift are of the suite: add --suite")
        if wrong := [item for item in shift if "=" not in item]:
            raise RecipeError(f"--shift {wrong[0]}: give NAME=FOLDER")
        quiet_libraries()
        if suite:
            from ebt_megatron.evaluation.interface import SuiteOptions

            shifts = dict(item.split("=", 1) for item in shift)
            _suite(run_dir, overrides or [], SuiteOptions(steps, starts, baselines, shifts), target)
            return
        from ebt_megatron.evaluation.evaluate import evaluate
        from ebt_megatron.evaluation.lines import lines_of
        from ebt_megatron.session import open_run

        with open_run(run_dir, overrides or []) as run:
            result = evaluate(run, steps, example)
            if run.state.rank == 0:
                write_whole(target, to_json(result, indent=1) + "\n")
                for line in lines_of(result):
                    print(line)

    guarded(
        work,
        stopped=lambda: (
            "nothing was written; the same command begins again, and is shorter with fewer --steps or "
            "training.validation_samples"
        ),
    )


if __name__ == "__main__":
    app()
