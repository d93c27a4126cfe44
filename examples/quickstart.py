"""The quickstart: real text to shards, two EBTs and a Transformer++ of the same size, a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

import typer

from examples.steps import PROCESSES, Steps

DATA = Path("data/quickstart")
RUNS = Path("runs/quickstart")
RECIPES = {name: f"recipes/text/quickstart_{name}.yaml" for name in ("context", "s2", "transformer")}


def prepare(step: Steps, processes: int, megabytes: int) -> None:
    """Text of this machine as shards at DATA, unless they are there."""
    if (DATA / "train" / "manifest.json").exists():
        return
    raw = DATA / "raw.jsonl"
    if not raw.exists():
        options = f"--max-bytes {megabytes * 1_000_000} --workers {processes}".split()
        what = "1. text this machine already has", "ebt_megatron.data_prep.local_text"
        step("collect", *what, "--output", str(raw), *options)
    options = f"--train-bpe 1024 --sequence-length 128 --unit-megabytes 4 --workers {processes} --resume".split()
    where = "--input", str(raw), "--output", str(DATA)
    step("prepare", "1. real text to shards", "ebt_megatron.data_prep.text", *where, *options)


def main(processes: int = PROCESSES, megabytes: int = typer.Option(16, help="How much text to prepare.")) -> None:
    """Prepare data, pretrain the models, evaluate them and write the report."""

    def work(step: Steps) -> None:
        prepare(step, processes, megabytes)
        for number, (name, recipe) in enumerate(RECIPES.items(), 2):
            step.train(number, name, recipe, processes)
        for name in RECIPES:
            step.evaluate(len(RECIPES) + 2, name, RUNS / name)
        from ebt_megatron.evaluation.report import write_report
        from ebt_megatron.evaluation.text_evaluation import NEXT_STEPS

        title = "EBT and Transformer++ on real text, on this machine"
        runs = {"EBT": RUNS / "context", "EBT, S2": RUNS / "s2", "Transformer++": RUNS / "transformer"}
        step.done(write_report(runs, RUNS / "report", title, NEXT_STEPS), NEXT_STEPS)

    Steps.run("make quickstart", work)


if __name__ == "__main__":
    typer.run(main)
