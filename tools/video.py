"""The video quickstart: real films to shards, two EBTs and a Transformer++ that predict the next frame, a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries

from . import media
from .steps import Steps

DATA, RUNS = Path("data/video"), Path("runs/video")
LABELS = {"s1": "EBT, S1", "s2": "EBT, S2", "transformer": "Transformer++"}
GIVEN = 8  # frames that a rolled-out clip begins with
SHOWN = 8  # clips
NEXT_STEPS = """ebt-prepare video --input 'films/**/*.mp4' --output data/films --height 224 --width 224 \\
    --frame-rate 4 --encoder vae --model FOLDER
ebt-train video/s1_xxs data.train=[data/films/train] data.validation=[data/films/validation]"""


def prepare(step: Steps, given: list[str]) -> None:
    """Films as shards at DATA, unless they are there: tiles of 32 x 32, 0.25 s apart, whole films held out."""
    if (DATA / "train" / "manifest.json").exists():
        return
    films = given or [str(film) for film in media.found(media.FILMS, DATA / "films", "films")]
    inputs = [word for film in films for word in ("--input", film)]
    step("prepare", "1. films to shards", "data_prep.video", *inputs, "--output", str(DATA), "--frames", "16",
         "--height", "32", "--width", "32", "--tiles", "6", "--frame-rate", "4", "--validation-fraction", "0.3",
         "--seed", "1", "--resume", "--skip-broken")  # fmt: skip


def clips_of(run_dir: Path) -> tuple[Any, Any]:
    """Rolled-out clips of a run and the true ones, uint8 arrays [clips, frames, height, width, 3]."""
    from ebt_megatron.evaluation.clips import first_clips, rolled_out
    from ebt_megatron.session import open_run

    with open_run(run_dir, ["training.validation_samples=100000"]) as run:
        task: Any = run.task
        frames = first_clips(run, 100000)
        moving = frames.diff(dim=1).abs().mean((1, 2, 3)).argsort(descending=True)
        chosen = frames[moving[:: max(1, len(moving) // (2 * SHOWN))][:SHOWN]]
        shown = [task.decoder.pictures(clips).round().byte().numpy()
                 for clips in (rolled_out(run, chosen, GIVEN), chosen)]  # fmt: skip
    return shown[0], shown[1]


def animation(rows: list[Any], scale: int = 3) -> bytes:
    """A GIF whose rows are models' clips, uint8 [clips, frames, height, width, 3], side by side."""
    import numpy as np
    from PIL import Image

    frames = []
    for t in range(rows[0].shape[1]):
        picture = np.concatenate([np.concatenate(list(row[:, t]), 1) for row in rows], 0)
        picture = picture.repeat(scale, 0).repeat(scale, 1)
        if t >= GIVEN:  # a mark: these are predicted
            picture[:4] = (200, 68, 45)
        frames.append(Image.fromarray(picture))
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0)
    return out.getvalue()


def write_report(runs: Path) -> dict[str, Path]:
    """The report of the evaluated runs in a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ebt_megatron.evaluation.figures import EBT_COLOURS, NEUTRAL, RIVAL_COLOURS, figure_of, png_of
    from ebt_megatron.evaluation.page import Page
    from ebt_megatron.evaluation.tables import Table

    results = {name: json.loads((runs / name / "evaluation.json").read_text()) for name in LABELS}
    colours = dict(zip(LABELS, (*EBT_COLOURS[:2], RIVAL_COLOURS[0]), strict=True))
    any_of = results["s1"]
    repeat = any_of["repeat_last_loss"]
    page = Page("EBT and Transformer++ on film, on this machine")

    figure, axes = figure_of()
    for name, result in results.items():
        rows = result["thinking"]
        axes.plot([r["steps"] for r in rows], [r["loss"] for r in rows], "o-", color=colours[name], label=LABELS[name])
    axes.axhline(repeat, color=NEUTRAL, ls="--", lw=1, label="the last frame again")
    axes.set(xlabel="thinking steps", ylabel="validation loss (smooth L1)", title="Next frame: loss against thinking")
    axes.legend(frameon=False)
    page.picture("thinking.png", png_of(figure), "Held-out films; loss of normalised latents, all positions of a clip.")

    figure, axes = figure_of()
    for name, result in results.items():
        steps = result["loss_by_position"]["steps"][result["trained_steps"] - 1]
        axes.plot(range(1, len(steps) + 1), steps, "o-", ms=3, color=colours[name], label=LABELS[name])
    for simple, style in (("repeat_last", "--"), ("extrapolation", ":")):
        values = any_of["loss_by_position"][simple]
        axes.plot(range(1, len(values) + 1), values, color=NEUTRAL, ls=style, label=simple.replace("_", " "))
    axes.set(xlabel="observed frames", ylabel="validation loss", title="Loss by how many frames were observed")
    axes.legend(frameon=False, fontsize=8)
    page.picture("positions.png", png_of(figure), "As trained; beside two predictors that learn nothing.")
    plt.close("all")

    rolled = {name: clips_of(runs / name) for name in LABELS}
    order = ["the truth", *LABELS.values()]
    caption = (f"Held-out clips, from above: {', '.join(order)}. {GIVEN} frames are given; under the red line every "
               "frame is predicted from those predicted before it.")  # fmt: skip
    page.picture("clips.gif", animation([rolled["s1"][1], *(clips for clips, _ in rolled.values())]), caption)

    rows = [["model", "thinking steps", "validation loss", "against the last frame", "PSNR, dB"]]
    for name, result in results.items():
        for row in result["thinking"]:
            trained = " (trained)" if row["steps"] == result["trained_steps"] else ""
            rows.append([LABELS[name], f"{row['steps']}{trained}", f"{row['loss']:.4f}",
                         f"{100 * (row['loss'] / repeat - 1):+.1f} %", f"{row['psnr']:.2f}"])  # fmt: skip
    for simple in ("repeat_last", "extrapolation"):
        loss = any_of[f"{simple}_loss"]
        rows.append([simple.replace("_", " "), "-", f"{loss:.4f}", f"{100 * (loss / repeat - 1):+.1f} %",
                     f"{any_of[f'{simple}_psnr']:.2f}"])  # fmt: skip
    page.table(Table("Held-out films", rows[0], rows[1:]))
    page.text("How to go on", NEXT_STEPS)
    return page.write(runs / "report")


def main(
    input: list[str] = typer.Option([], help="Films: globs, folders or URLs; default: some that packages bring."),
    override: list[str] = typer.Option([], help="key=value for every recipe, e.g. training.seed=2."),
    runs: Path = typer.Option(RUNS, help="Where the runs go."),
    processes: int = typer.Option(2, help="Ranks: data parallel."),
) -> None:
    """Prepare films, pretrain the models, evaluate them and write the report."""

    def work() -> None:
        quiet_libraries()
        step = Steps("make video")
        prepare(step, input)
        for number, name in enumerate(LABELS, 2):
            recipe, output = f"recipes/video/quickstart_{name}.yaml", f"training.output_dir={runs / name}"
            step.train(number, name, recipe, processes, output, *override)
            step.evaluate(number, name, runs / name)
        step.done(write_report(runs), NEXT_STEPS)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
