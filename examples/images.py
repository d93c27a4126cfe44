"""The images quickstart: EBTs and a DiT that denoise pictures, and two that make them by class; a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.errors import DataError
from ebt_megatron.evaluation.sheet import sheet
from examples import media
from examples.steps import OVERRIDE, PROCESSES, Steps

DATA, RUNS, OTHERS = Path("data/images"), Path("runs/images"), ("photographs",)
SIDE = 28  # of a picture, in pixels
DENOISERS = {"s1": "EBT, S1", "s2": "EBT, S2", "dit": "DiT"}
MAKERS = {"maker": "EBT", "maker_dit": "DiT"}
MAKER_PASSES = {"maker": 3, "maker_dit": 50}
GUIDANCE = (0.0, 1.0)
NEXT_STEPS = """ebt-prepare images --input photos/ --output data/photos --encoder pixels --patch 16
ebt-train images/s1_denoise data.train=[data/photos/train] data.validation=[data/photos/validation]"""


def prepare(step: Steps, given: list[str]) -> None:
    """Pictures as shards at DATA, unless they are there: 28 x 28, in patches of 4 x 4."""
    if (DATA / "train" / "manifest.json").exists():
        return
    pictures = given or [str(media.found(media.PICTURES, DATA / "pictures", "pictures")[0])]
    inputs = [word for picture in pictures for word in ("--input", picture)]
    step(
        "prepare",
        "1. pictures to shards",
        "ebt_megatron.data_prep.images",
        *inputs,
        "--output",
        str(DATA),
        "--height",
        str(SIDE),
        "--width",
        str(SIDE),
        "--patch",
        "4",
        "--resume",
    )


def prepare_others(step: Steps) -> None:
    """Grey tiles of photographs as shards at DATA/photographs, made with the same encoder, unless they are there."""
    import numpy as np

    output = DATA / "photographs"
    if (output / "train" / "manifest.json").exists():
        return
    tiles = DATA / "photographs.npy"
    np.save(tiles, media.grey_tiles(media.found(media.PHOTOGRAPHS, DATA / "raw photographs", "photographs"), SIDE))
    step(
        "prepare photographs",
        "1. other pictures to shards",
        "ebt_megatron.data_prep.images",
        "--input",
        str(tiles),
        "--output",
        str(output),
        "--height",
        str(SIDE),
        "--width",
        str(SIDE),
        "--encoder",
        str(DATA / "train" / "encoder.npz"),
        "--validation-fraction",
        "0",
        "--resume",
    )


def look_at(run_dir: Path) -> dict[str, Any]:
    """The suite's numbers of a run, and some pictures: clean, and by level noised and denoised in its best passes."""
    from ebt_megatron.evaluation.pictures import denoised, first_pictures
    from ebt_megatron.session import open_run

    numbers = json.loads((run_dir / "suite.json").read_text())
    with open_run(run_dir) as run:
        task: Any = run.task
        batch = first_pictures(run, 8)
        shown: dict[str, Any] = {"numbers": numbers, "clean": task.decoder.pictures(batch.samples)}
        for level, of in numbers["denoising"].items():
            noised = task.sample(batch, run.state.device, int(level)).start.transpose(0, 1)
            best = max(of["passes"], key=lambda row: row["psnr"])["passes"]
            pair = noised, denoised(run, batch, int(level), [best])[0]
            shown[level] = [task.decoder.pictures(x) for x in pair]
        return shown


def make(run_dir: Path, passes: int) -> list[Any]:
    """Pictures of every class that a run makes, for each guidance."""
    import torch

    from ebt_megatron.evaluation.pictures import made
    from ebt_megatron.session import open_run

    with open_run(run_dir) as run:
        task: Any = run.task
        labels = torch.arange(max(task.classes, 1)).repeat(2) if task.classes else torch.zeros(20, dtype=torch.int64)
        return [task.decoder.pictures(made(run, labels, passes, guidance)) for guidance in GUIDANCE]


def write_report(runs: Path) -> dict[str, Path]:
    """The report of the trained runs in a folder."""
    from ebt_megatron.evaluation.page import Page
    from ebt_megatron.evaluation.picture_report import curves, tables

    seen = {name: look_at(runs / name) for name in DENOISERS}
    numbers = {DENOISERS[name]: one["numbers"] for name, one in seen.items()}
    levels = list(next(iter(numbers.values()))["denoising"])
    page = Page("EBT and DiT on pictures, on this machine")
    caption = "Held-out pictures; dashed: noised. EBTs are trained at the first of the levels alone, the DiT at all."
    page.figure("denoising", caption, lambda: curves(numbers))
    for level in levels:
        rows_of_pictures = [seen["s1"]["clean"], seen["s1"][level][0], *(one[level][1] for one in seen.values())]
        caption = (
            f"Level {level}, from above: the truth, noised, {', '.join(DENOISERS.values())}; at their best passes."
        )
        page.picture(f"level-{level}.png", sheet(rows_of_pictures), caption)
    for table in tables(numbers):
        page.table(table)

    sheets, names = [], []
    for name, label in MAKERS.items():
        for guidance, pictures in zip(GUIDANCE, make(runs / name, MAKER_PASSES[name]), strict=True):
            half = len(pictures) // 2
            sheets += [pictures[:half], pictures[half:]]
            names.append(f"{label}, {MAKER_PASSES[name]} passes, guidance {guidance:g}")
    caption = f"Made from noise, a column for each class, two rows for each, from above: {'; '.join(names)}."
    page.picture("made.png", sheet(sheets), caption)
    page.text("How to go on", NEXT_STEPS)
    return page.write(runs / "report")


def main(
    input: list[str] = typer.Option([], help="Pictures or arrays, labels beside; default: Fashion-MNIST's package."),
    runs: Path = typer.Option(RUNS, help="Where the runs go."),
    override: list[str] = OVERRIDE,
    processes: int = PROCESSES,
) -> None:
    """Prepare pictures, pretrain the models and write the report."""

    def work(step: Steps) -> None:
        prepare(step, input)
        if not input:
            try:
                prepare_others(step)
            except DataError as error:  # the rest does not need them
                step.console.print(f"[yellow]no other pictures:[/yellow] {error}")
        for number, name in enumerate((*DENOISERS, *MAKERS), 2):
            recipe, output = f"recipes/images/quickstart_{name}.yaml", f"training.output_dir={runs / name}"
            step.train(number, name, recipe, processes, output, *override)
        others = [name for name in OTHERS if (DATA / name / "train" / "manifest.json").exists()]
        shifts = [word for name in others for word in ("--shift", f"{name}={DATA / name / 'train'}")]
        for number, name in enumerate(DENOISERS, 2 + len(DENOISERS) + len(MAKERS)):
            if not (runs / name / "suite.json").exists():
                step.evaluate(number, name, runs / name, "--suite", *shifts)
        step.done(write_report(runs), NEXT_STEPS)

    Steps.run("make images", work)


if __name__ == "__main__":
    typer.run(main)
