"""Pictures made by a trained run from captions or classes: `ebt-pictures RUN --caption 'a bag' --output made.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries, say, user_path
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.core.files import write_whole
from ebt_megatron.evaluation.sheet import sheet

app = typer.Typer()


def make(run_dir: Path, captions: list[str], labels: list[int], each: int, passes: int | None, guidance: float) -> Any:
    """Rows of pictures uint8 [each, height, width, 3], one row for each caption or label.

    Args:
        run_dir: a training.output_dir; its data are not needed.
        captions, labels: the conditions; one of them.
        each: pictures of a row.
        passes: of the model; None: an EBT's thinking.max_steps, 50 of a DiT.
        guidance: see `ebt_megatron.evaluation.pictures`.

    Raises:
        RecipeError: for a run that does not make pictures, or is not conditional on that.
        DataError: for captions that cannot be put as its data's were, or an encoder without a decoder.
    """
    import torch

    from ebt_megatron.data.captions import open_captions
    from ebt_megatron.data_prep.encoders import load_encoder
    from ebt_megatron.evaluation.pictures import made
    from ebt_megatron.session import open_run
    from ebt_megatron.tasks import task_as
    from ebt_megatron.tasks.images import Images

    with open_run(run_dir, splits=()) as run:
        task = task_as(run.task, Images)
        if run.objective.thinks and task.denoises:
            raise RecipeError(f"{run_dir} makes no pictures: give a run of images that starts at noise")
        if labels and not all(0 <= label < task.classes for label in labels):
            raise RecipeError(f"--label {labels}: {run.recipe.name} knows {task.classes} classes, from 0 on")
        if not captions and not labels and (task.captions or task.classes):
            raise RecipeError(
                f"{run.recipe.name} is conditional on {'captions' if task.captions else 'classes'}: give "
                f"--{'caption' if task.captions else 'label'}"
            )
        if captions and (count := open_captions(run.source).lacking(captions)):
            say(f"{count} characters or words of the captions have no token of the run's tokenizer")
        given = [text for text in captions for _ in range(each)] or torch.tensor(labels or [0]).repeat_interleave(each)
        passes = passes or (run.recipe.thinking.max_steps if run.objective.thinks else 50)
        latents = made(run, given, passes, guidance).cpu().numpy()
        frames = load_encoder(run.source.sidecar()).to_frames(latents)
    return torch.from_numpy(frames).unflatten(0, (-1, each))


@app.command()
def main(
    run_dir: Path = typer.Argument(..., parser=user_path, help="A training.output_dir of a run that makes pictures."),
    caption: list[str] = typer.Option([], help="A row of pictures for each."),
    label: list[int] = typer.Option([], help="The same of classes."),
    output: Path = typer.Option("made.png", parser=user_path, help="PNG to write."),
    each: int = typer.Option(8, min=1, help="Pictures of each caption or class."),
    passes: int | None = typer.Option(None, min=1, help="Steps of an EBT [thinking.max_steps], passes of a DiT [50]."),
    guidance: float = typer.Option(0.0, min=0.0, help="w of conditional + w (conditional - unconditional)."),
) -> None:
    """Make pictures from noise."""

    def work() -> None:
        if caption and label:
            raise DataError("give either --caption or --label")
        if not output.absolute().parent.is_dir():
            raise RecipeError(f"--output {output}: {output.parent} is not a folder")
        quiet_libraries()
        rows = make(run_dir, caption, label, each, passes, guidance)
        write_whole(output, sheet(list(rows.float())))
        say(f"{output}: {len(rows)} rows of {each} pictures")

    guarded(work)


if __name__ == "__main__":
    app()
