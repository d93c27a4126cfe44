"""The images quickstart: EBTs and a DiT that denoise pictures, and two that make them by class; a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole

from . import media
from .steps import Steps

DATA, RUNS, OTHERS = Path("data/images"), Path("runs/images"), ("photographs",)
SIDE = 28  # of a picture, in pixels
DENOISERS = {"s1": "EBT, S1", "s2": "EBT, S2", "dit": "DiT"}
MAKERS = {"maker": "EBT", "maker_dit": "DiT"}
PASSES = {"s1": range(1, 11), "s2": range(1, 11), "dit": (1, 2, 3, 5, 10, 20, 50, 100)}
LEVELS = {99: "the level trained on (EBT)", 199: "twice as far in the schedule, unseen by the EBTs"}
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
    step("prepare", "1. pictures to shards", "data_prep.images", *inputs, "--output", str(DATA), "--height", str(SIDE),
         "--width", str(SIDE), "--patch", "4", "--resume")  # fmt: skip


def prepare_others(step: Steps) -> None:
    """Grey tiles of photographs as shards at DATA/photographs, made with the same encoder, unless they are there."""
    import numpy as np

    output = DATA / "photographs"
    if (output / "train" / "manifest.json").exists():
        return
    tiles = DATA / "photographs.npy"
    np.save(tiles, media.grey_tiles(media.found(media.PHOTOGRAPHS, DATA / "raw photographs", "photographs"), SIDE))
    step("prepare photographs", "1. other pictures to shards", "data_prep.images", "--input", str(tiles), "--output",
         str(output), "--height", str(SIDE), "--width", str(SIDE), "--encoder", str(DATA / "train" / "encoder.npz"),
         "--validation-fraction", "0", "--resume")  # fmt: skip


def look_at(run_dir: Path, passes: Any) -> dict[str, Any]:
    """How well a run denoises, which is kept beside it, and some of its pictures."""
    from ebt_megatron.evaluation.pictures import denoised, denoising, first_pictures
    from ebt_megatron.session import open_run

    with open_run(run_dir) as run:
        task: Any = run.task
        result = denoising(run, list(LEVELS), list(passes))
        write_whole(run_dir / "denoising.json", json.dumps(result, indent=1) + "\n")
        batch = first_pictures(run, 8)
        noised = {level: task.sample(batch, run.state.device, level).start.transpose(0, 1) for level in LEVELS}
        best = {level: max(result[str(level)]["passes"], key=lambda row: row["psnr"])["passes"] for level in LEVELS}
        shown = {level: denoised(run, batch, level, [best[level]])[0] for level in LEVELS}
        pictures = {name: {level: task.decoder.pictures(x) for level, x in by_level.items()}
                    for name, by_level in (("noised", noised), ("denoised", shown))}  # fmt: skip
        return {"result": result, "clean": task.decoder.pictures(batch.latents), **pictures}


def make(run_dir: Path, passes: int) -> list[Any]:
    """Pictures of every class that a run makes, for each guidance."""
    import torch

    from ebt_megatron.evaluation.pictures import made
    from ebt_megatron.session import open_run

    with open_run(run_dir) as run:
        task: Any = run.task
        labels = torch.arange(max(task.classes, 1)).repeat(2) if task.classes else torch.zeros(20, dtype=torch.int64)
        return [task.decoder.pictures(made(run, labels, passes, guidance)) for guidance in GUIDANCE]


def sheet(rows: list[Any], scale: int = 2) -> bytes:
    """A PNG of rows of pictures [N, height, width, 3]."""
    import torch
    from PIL import Image

    whole = torch.cat([torch.cat(
        [torch.nn.functional.pad(p.movedim(-1, 0), (1, 1, 1, 1), value=255.0).movedim(0, -1) for p in row], 1
    ) for row in rows])  # fmt: skip
    array = whole.repeat_interleave(scale, 0).repeat_interleave(scale, 1).round().byte().numpy()
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def write_report(runs: Path) -> dict[str, Path]:
    """The report of the trained runs in a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ebt_megatron.evaluation.figures import EBT_COLOURS, NEUTRAL, RIVAL_COLOURS, png_of
    from ebt_megatron.evaluation.page import Page
    from ebt_megatron.evaluation.tables import Table

    seen = {name: look_at(runs / name, PASSES[name]) for name in DENOISERS}
    colours = dict(zip(DENOISERS, (*EBT_COLOURS[:2], RIVAL_COLOURS[0]), strict=True))
    page = Page("EBT and DiT on pictures, on this machine")

    figure, all_axes = plt.subplots(1, len(LEVELS), figsize=(9.2, 3.8), dpi=110, sharey=True)
    rows = [["noise", "model", "passes", "PSNR, dB", "SSIM", "MSE"]]
    for axes, (level, what) in zip(all_axes, LEVELS.items(), strict=True):
        noised = seen["s1"]["result"][str(level)]["noised"]
        rows.append([f"level {level}", "the noised picture", "-", *_numbers(noised)])
        for name, one in seen.items():
            points = one["result"][str(level)]["passes"]
            axes.plot([p["passes"] for p in points], [p["psnr"] for p in points], "o-", ms=3, color=colours[name],
                      label=DENOISERS[name])  # fmt: skip
            best = max(points, key=lambda p: p["psnr"])
            for point in dict.fromkeys((points[0]["passes"], best["passes"], points[-1]["passes"])):
                numbers = next(p for p in points if p["passes"] == point)
                rows.append([f"level {level}", DENOISERS[name], str(point), *_numbers(numbers)])
        axes.axhline(noised["psnr"], color=NEUTRAL, ls="--", lw=1)
        axes.set(xscale="log", xlabel="passes", title=f"level {level}: {what}")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel("PSNR, dB")
    all_axes[0].legend(frameon=False, fontsize=8)
    page.picture("denoising.png", png_of(figure), "Held-out pictures; the dashed line is the noised picture.")
    for level in LEVELS:
        rows_of_pictures = [seen["s1"]["clean"], seen["s1"]["noised"][level],
                            *(one["denoised"][level] for one in seen.values())]  # fmt: skip
        caption = (
            f"Level {level}, from above: the truth, noised, {', '.join(DENOISERS.values())}; at their best passes."
        )
        page.picture(f"level-{level}.png", sheet(rows_of_pictures), caption)
    page.table(Table("Denoising held-out pictures", rows[0], rows[1:]))

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


def _numbers(row: dict[str, float]) -> list[str]:
    return [f"{row['psnr']:.2f}", f"{row['ssim']:.3f}", f"{row['mse']:.1f}"]


def main(
    input: list[str] = typer.Option([], help="Pictures or arrays, labels beside; default: Fashion-MNIST's package."),
    override: list[str] = typer.Option([], help="key=value for every recipe, e.g. training.seed=2."),
    runs: Path = typer.Option(RUNS, help="Where the runs go."),
    processes: int = typer.Option(2, help="Ranks: data parallel."),
) -> None:
    """Prepare pictures, pretrain the models and write the report."""

    def work() -> None:
        quiet_libraries()
        step = Steps("make images")
        prepare(step, input)
        for number, name in enumerate((*DENOISERS, *MAKERS), 2):
            recipe, output = f"recipes/images/quickstart_{name}.yaml", f"training.output_dir={runs / name}"
            step.train(number, name, recipe, processes, output, *override)
        step.done(write_report(runs), NEXT_STEPS)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
