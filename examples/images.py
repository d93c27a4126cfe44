"""The images quickstart: EBTs and a DiT that denoise pictures, and two that make them by class; a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

import typer

from ebt_megatron.core.errors import DataError
from examples import media
from examples.steps import OVERRIDE, PROCESSES, Steps

DATA, RUNS, OTHERS = Path("data/images"), Path("runs/images"), ("photographs",)
SIDE = 28  # of a picture, in pixels
DENOISERS = {"s1": "EBT, S1", "s2": "EBT, S2", "dit": "DiT"}
MAKERS = {"maker": "EBT by class", "maker_dit": "DiT by class"}


def prepare(step: Steps, given: list[str]) -> None:
    """Pictures as shards at DATA, unless they are there: 28 x 28, in patches of 4 x 4."""
    if (DATA / "train" / "manifest.json").exists():
        return
    pictures = given or [str(media.found(media.PICTURES, DATA / "pictures", "pictures")[0])]
    inputs = [word for picture in pictures for word in ("--input", picture)]
    options = f"--height {SIDE} --width {SIDE} --patch 4 --resume".split()
    where = *inputs, "--output", str(DATA)
    step("prepare", "1. pictures to shards", "ebt_megatron.data_prep.images", *where, *options)


def prepare_others(step: Steps) -> None:
    """Grey tiles of photographs as shards at DATA/photographs, made with the same encoder, unless they are there."""
    import numpy as np

    output = DATA / "photographs"
    if (output / "train" / "manifest.json").exists():
        return
    tiles = DATA / "photographs.npy"
    np.save(tiles, media.grey_tiles(media.found(media.PHOTOGRAPHS, DATA / "raw photographs", "photographs"), SIDE))
    options = f"--height {SIDE} --width {SIDE} --validation-fraction 0 --resume".split()
    where = "--input", str(tiles), "--output", str(output), "--encoder", str(DATA / "train" / "encoder.npz")
    step("prepare photographs", "1. other pictures to shards", "ebt_megatron.data_prep.images", *where, *options)


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
        from ebt_megatron.evaluation.picture_evaluation import NEXT_STEPS, write_report

        named = {label: runs / name for name, label in (DENOISERS | MAKERS).items()}
        title = "EBT and DiT on pictures, on this machine"
        step.done(write_report(named, runs / "report", title), NEXT_STEPS)

    Steps.run("make images", work)


if __name__ == "__main__":
    typer.run(main)
