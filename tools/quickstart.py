"""The quickstart: real text to shards, two EBTs and a Transformer++ of the same size, a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.console import Console

from ebt_megatron.report import NEXT_STEPS

from .steps import Steps

DATA = Path("data/quickstart")
RUNS = Path("runs/quickstart")
RECIPES = {name: f"recipes/text/quickstart_{name}.yaml" for name in ("s1", "s2", "transformer")}


def prepare(step: Steps, processes: int, megabytes: int) -> dict[str, float]:
    """Text of this machine as shards at DATA, unless they are there; returns seconds by part."""
    if (DATA / "train" / "manifest.json").exists():
        return {}
    python, raw, seconds = sys.executable, DATA / "raw.jsonl", {}
    if not raw.exists():
        seconds["collect"] = step("1. text this machine already has", [
            python, "-m", "data_prep.local_text", "--output", str(raw), "--max-bytes",
            str(megabytes * 1_000_000), "--workers", str(processes),
        ])  # fmt: skip
    seconds["prepare"] = step("1. real text to shards", [
        python, "-m", "data_prep.text", "--input", str(raw), "--train-bpe", "1024", "--sequence-length", "128",
        "--unit-megabytes", "4", "--output", str(DATA), "--workers", str(processes), "--resume",
    ])  # fmt: skip
    return seconds


def main(
    processes: int = typer.Option(2, help="Ranks; data parallel: 1, 2."),
    megabytes: int = typer.Option(16, help="How much text to prepare."),
) -> None:
    """Prepare data, pretrain the models, evaluate them and write the report."""
    console = Console()
    step = Steps(console, "make quickstart")
    python = sys.executable
    seconds = prepare(step, processes, megabytes)
    for i, (name, recipe) in enumerate(RECIPES.items()):
        seconds[f"train {name}"] = step(f"{i + 2}. pretrain: {name}", [
            python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "-m", "ebt_megatron.train", recipe,
        ])  # fmt: skip
    for name in RECIPES:
        seconds[f"evaluate {name}"] = step(f"{len(RECIPES) + 2}. evaluate: {name}", [
            python, "-m", "ebt_megatron.evaluate", str(RUNS / name),
        ])  # fmt: skip
    from ebt_megatron.evaluation.report import write_report

    title = "EBT and Transformer++ on real text, on this machine"
    runs = {"EBT, S1": RUNS / "s1", "EBT, S2": RUNS / "s2", "Transformer++": RUNS / "transformer"}
    paths = write_report(runs, RUNS / "report", title, NEXT_STEPS)
    console.rule("done", align="left")
    console.print(", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()))
    console.print(f"report: {paths['html']} and {paths['markdown']}\n\nhow to go on:\n{NEXT_STEPS}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
