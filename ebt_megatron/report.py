"""A report of runs beside each other, as the quickstarts make one: `python -m ebt_megatron.report RUN ...`."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.errors import RecipeError

app = typer.Typer()


@app.command()
def main(
    runs: list[Path] = typer.Argument(..., help="Each run's training.output_dir, evaluated; of one modality."),
    output: Path = typer.Option(Path("report"), help="Folder for report.html, report.md and the plots."),
    label: list[str] = typer.Option([], help="What to call a run; give it once for each, in their order."),
    title: str = typer.Option("Energy-Based Transformers", help="Heading."),
) -> None:
    """Write what evaluated runs of one modality show.

    Text: losses, thinking, energies, examples, speed and memory; with suite.json of ebt-evaluate --suite also compute,
    starts, uncertainty, landscapes and samples. Video: losses by steps, observed frames and frames ahead, and clips.
    Images: pictures denoised (of runs with suite.json) and made (of the others).
    """

    def work() -> None:
        quiet_libraries()
        from ebt_megatron.evaluation.interface import evaluation_of
        from ebt_megatron.session import recipe_of

        modalities = {path: recipe_of(path).data.modality for path in runs}
        if len(set(modalities.values())) > 1:
            said = ", ".join(f"{path}: {modality}" for path, modality in modalities.items())
            raise RecipeError(f"a report is about one modality ({said}): give runs of one")
        if label and (len(label) != len(runs) or len(set(label)) < len(label)):
            raise RecipeError(f"--label: give each of the {len(runs)} runs one of its own, in their order")
        named = dict(zip(label, runs, strict=True)) if label else runs
        paths = evaluation_of(modalities[runs[0]]).report(named, output, title, "")
        Console(soft_wrap=True, highlight=False).print(f"report: {paths['html']} and {paths['markdown']}")

    guarded(work)


if __name__ == "__main__":
    app()
