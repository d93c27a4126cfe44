"""The video quickstart: films and games to shards, two EBTs and a Transformer++ that predict the next frame, a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

import typer

from examples.films import held_out, prepare
from examples.steps import OVERRIDE, PROCESSES, Steps

RUNS = Path("runs/video")
LABELS = {"s1": "EBT, S1", "s2": "EBT, S2", "transformer": "Transformer++"}
RECIPES = {name: Path(f"recipes/video/quickstart_{name}.yaml") for name in LABELS}


def result_of(run_dir: Path, held: str) -> Path:
    """Return the file of a run's evaluation on a set of held-out films."""
    return run_dir / f"evaluation-{held.replace(' ', '-')}.json"


def main(
    input: list[str] = typer.Option([], help="Films: globs, folders or URLs; default: films and games of packages."),
    runs: Path = typer.Option(RUNS, help="Where the runs go."),
    override: list[str] = OVERRIDE,
    processes: int = PROCESSES,
) -> None:
    """Prepare films, pretrain the models, evaluate them and write the report."""

    def work(step: Steps) -> None:
        prepare(step, input)
        sets = held_out()
        data = f"data.validation=[{','.join(sets.values())}]"
        for number, (name, recipe) in enumerate(RECIPES.items(), 2):
            step.train(number, name, str(recipe), processes, f"training.output_dir={runs / name}", data, *override)
            for held, shards in sets.items():
                step.evaluate(
                    number,
                    name,
                    runs / name,
                    f"data.validation=[{shards}]",
                    "--output",
                    str(result_of(runs / name, held)),
                )
        from ebt_megatron.evaluation.video_evaluation import NEXT_STEPS, write_report

        named = {label: runs / name for name, label in LABELS.items()}
        title = "EBT and Transformer++ on film, on this machine"
        step.done(write_report(named, sets, runs / "report", title), NEXT_STEPS)

    Steps.run("make video", work)


if __name__ == "__main__":
    typer.run(main)
