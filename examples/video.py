"""The video quickstart: films and games to shards, two EBTs and a Transformer++ that predict the next frame, a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from examples.films import held_out, prepare
from examples.steps import OVERRIDE, PROCESSES, Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = Path("runs/video")
LABELS = {"s1": "EBT, S1", "s2": "EBT, S2", "transformer": "Transformer++"}
RECIPES = {name: Path(f"recipes/video/quickstart_{name}.yaml") for name in LABELS}
SIMPLE = {"repeat_last": "the last frame again", "extrapolation": "extrapolation"}
DASHES = {"repeat_last": "--", "extrapolation": ":"}
GIVEN = 8  # frames that a rolled-out clip begins with
SHOWN, MEASURED = 4, 96  # clips of each set
NEXT_STEPS = """ebt-prepare video --input 'films/**/*.mp4' --output data/films --height 224 --width 224 \\
    --frame-rate 4 --encoder vae --model FOLDER
ebt-train video/s1_xxs data.train=[data/films/train] data.validation=[data/films/validation]"""


def result_of(run_dir: Path, held: str) -> Path:
    """Return the file of a run's evaluation on a set of held-out films."""
    return run_dir / f"evaluation-{held.replace(' ', '-')}.json"


def clips_of(run_dir: Path, sets: dict[str, str]) -> tuple[Any, Any, dict[str, Any]]:
    """Rolled-out clips of a run and the true ones, uint8 arrays [clips, frames, height, width, 3], some of each set.

    And of every set the losses by how many frames ahead, over more clips.
    """
    import torch

    from ebt_megatron.evaluation.clips import by_horizon, rolled_out, spread_clips
    from ebt_megatron.session import open_run

    shown: tuple[list[Any], list[Any]] = [], []
    ahead = {}
    for held, shards in sets.items():
        with open_run(run_dir, [f"data.validation=[{shards}]", "training.validation_samples=1000000"]) as run:
            task: Any = run.task
            frames = spread_clips(run, MEASURED)
            clips = rolled_out(run, frames, GIVEN)
            ahead[held] = by_horizon(clips, frames, GIVEN)
            moving = frames.diff(dim=1).abs().mean((1, 2, 3)).argsort(descending=True)
            chosen = moving[:: max(1, len(moving) // (2 * SHOWN))][:SHOWN]
            for kept, values in zip(shown, (clips, frames), strict=True):
                kept.append(task.decoder.pictures(values[chosen]).round().byte())
    return torch.cat(shown[0]).numpy(), torch.cat(shown[1]).numpy(), ahead


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
    from ebt_megatron.evaluation.figures import BASELINE_COLOURS, EBT_COLOURS, NEUTRAL, figure_of
    from ebt_megatron.evaluation.page import Page
    from ebt_megatron.evaluation.tables import Table

    sets = held_out()
    results = {name: {held: json.loads(result_of(runs / name, held).read_text()) for held in sets} for name in LABELS}
    colours = dict(zip(LABELS, (*EBT_COLOURS[:2], BASELINE_COLOURS[0]), strict=True))
    page = Page("EBT and Transformer++ on film, on this machine")

    rolled = {name: clips_of(runs / name, sets) for name in LABELS}

    def panels(draw: Callable[[Any, str], None], x: str, y: str) -> Figure:
        """One plot for each set."""
        figure, axes = figure_of(4.2 * len(sets), len(sets))
        several = [axes] if len(sets) == 1 else list(axes)
        for held, plot in zip(sets, several, strict=True):
            draw(plot, held)
            plot.set(xlabel=x, title=held)
        several[0].set_ylabel(y)
        several[-1].legend(frameon=False, fontsize=8)
        return figure

    def curve(plot: Any, values: list[float], name: str) -> None:
        """Losses 1, 2 ... of a model, or of what learns nothing."""
        style = {"color": colours[name], "marker": "o", "ms": 3} if name in colours else {"color": NEUTRAL}
        plot.plot(range(1, len(values) + 1), values, ls=DASHES.get(name, "-"), label=(LABELS | SIMPLE)[name], **style)

    def thinking(plot: Any, held: str) -> None:
        for name, of_sets in results.items():
            repeat = of_sets[held]["repeat_last_loss"]
            curve(plot, [row["loss"] / repeat for row in of_sets[held]["thinking"]], name)
        plot.axhline(1, color=NEUTRAL, ls="--", lw=1, label=SIMPLE["repeat_last"])

    def positions(plot: Any, held: str) -> None:
        for name, of_sets in results.items():
            curve(plot, of_sets[held]["loss_by_position"]["steps"][of_sets[held]["trained_steps"] - 1], name)
        for simple in SIMPLE:
            curve(plot, results["s1"][held]["loss_by_position"][simple], simple)

    def horizons(plot: Any, held: str) -> None:
        for name, (_, _, ahead) in rolled.items():
            curve(plot, ahead[held]["model"], name)
        for simple in SIMPLE:
            curve(plot, rolled["s1"][2][held][simple], simple)
        plot.set_ylim(0, 3 * max(rolled["s1"][2][held]["repeat_last"]))

    for figure, draw, x, y, caption in (
        (
            "thinking",
            thinking,
            "thinking steps",
            "loss / loss of the last frame again",
            "Smooth L1 of normalised latents, all positions of a clip.",
        ),
        ("positions", positions, "observed frames", "loss", "As trained; beside two predictors that learn nothing."),
        (
            "horizons",
            horizons,
            "frames ahead",
            "loss",
            f"Rolled out: after {GIVEN} frames each is predicted from those predicted before it; {MEASURED} clips.",
        ),
    ):
        page.figure(figure, caption, partial(panels, draw, x, y))
    order = ["the truth", *LABELS.values()]
    caption = (
        f"Held-out clips, from above: {', '.join(order)}; {SHOWN} each of {', '.join(sets)}. {GIVEN} frames are "
        "given; under the red line every frame is predicted from those predicted before it."
    )
    page.picture("clips.gif", animation([rolled["s1"][1], *(clips for clips, _, _ in rolled.values())]), caption)

    header = ["model", "thinking steps", "validation loss", "against the last frame", "PSNR, dB"]
    for held in sets:
        rows = []
        any_of = results["s1"][held]
        repeat = any_of["repeat_last_loss"]
        for name, of_sets in results.items():
            for row in of_sets[held]["thinking"]:
                trained = " (trained)" if row["steps"] == of_sets[held]["trained_steps"] else ""
                rows.append(
                    [
                        LABELS[name],
                        f"{row['steps']}{trained}",
                        f"{row['loss']:.4f}",
                        f"{100 * (row['loss'] / repeat - 1):+.1f} %",
                        f"{row['psnr']:.2f}",
                    ]
                )
        for simple, label in SIMPLE.items():
            loss = any_of[f"{simple}_loss"]
            rows.append(
                [label, "-", f"{loss:.4f}", f"{100 * (loss / repeat - 1):+.1f} %", f"{any_of[f'{simple}_psnr']:.2f}"]
            )
        page.table(Table(f"Held out: {held}", header, rows))
    page.text("How to go on", NEXT_STEPS)
    return page.write(runs / "report")


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
        step.done(write_report(runs), NEXT_STEPS)

    Steps.run("make video", work)


if __name__ == "__main__":
    typer.run(main)
