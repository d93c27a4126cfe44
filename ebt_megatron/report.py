"""A report of runs beside each other, as the quickstart makes one: `python -m ebt_megatron.report RUN ...`."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from ebt_megatron.core.cli import guarded

app = typer.Typer(add_completion=False)

NEXT_STEPS = """\
# your own text (txt, HTML, JSONL, Parquet; also .gz and .zst)
ebt-prepare text --input 'corpus/**/*.jsonl.zst' --tokenizer EleutherAI/gpt-neox-20b --output data/text
# the paper's S1 recipe at its xxs size on 8 GPUs, tensor parallel 2
torchrun --nproc-per-node 8 -m ebt_megatron.train text/s1_xxs parallel.tensor=2
# think longer than in training
ebt-evaluate runs/ebt-s1-xxs --steps 8
# every key a recipe may have
ebt-train --help"""


@app.command()
def main(
    runs: list[Path] = typer.Argument(..., help="Each run's training.output_dir, trained and evaluated; of any kind."),
    output: Path = typer.Option(Path("report"), help="Folder for report.html, report.md and the plots."),
    title: str = typer.Option("Energy-Based Transformers", help="Heading."),
) -> None:
    """Write what evaluated runs show: losses, thinking, energies, examples, speed and memory.

    Runs that were evaluated with --suite add compute, starts, uncertainty, landscapes and samples.
    """

    def work() -> None:
        from ebt_megatron.evaluation.report import write_report

        paths = write_report(runs, output, title, NEXT_STEPS)
        Console(soft_wrap=True, highlight=False).print(f"report: {paths['html']} and {paths['markdown']}")

    guarded(work)


if __name__ == "__main__":
    app()
