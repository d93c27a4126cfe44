"""The video quickstart: films and games to shards, two EBTs and a Transformer++ that predict the next frame, a report.

Every part is skipped if it is already done, so running it again goes on where it stopped.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries

from .films import held_out, prepare
from .steps import Steps

RUNS = Path("runs/video")
LABELS = {"s1": "EBT, S1", "s2": "EBT, S2", "transformer": "Transformer++"}
RECIPES = {name: Path(f"recipes/video/quickstart_{name}.yaml") for name in LABELS}
SIMPLE = {"repeat_last": "the last frame again", "extrapolation": "extrapolation"}
GIVEN = 8  # frames that a rolled-out clip begins with
SHOWN = 4  # clips of each set
NEXT_STEPS = """ebt-prepare video --input 'films/**/*.mp4' --output data/films --height 224 --width 224 \\
    --frame-rate 4 --encoder vae --model FOLDER
ebt-train video/s1_xxs data.train=[data/films/train] data.validation=[data/films/validation]"""


def result_of(run_dir: Path, held: str) -> Path:
    """Where a run's evaluation on a set of held-out films is."""
    return run_dir / f"evaluation-{held.replace(' ', '-')}.json"


def clips_of(run_dir: Path, sets: dict[str, str]) -> tuple[Any, Any]:
    """Rolled-out clips of a run and the true ones, uint8 arrays [clips, frames, height, width, 3]; some of each set."""
    import torch

    from ebt_megatron.evaluation.clips import first_clips, rolled_out
    from ebt_megatron.session import open_run

    shown: tuple[list[Any], list[Any]] = [], []
    for shards in sets.values():
        with open_run(run_dir, [f"data.validation=[{shards}]", "training.validation_samples=1000000"]) as run:
            task: Any = run.task
            frames = first_clips(run, 100000)
            moving = frames.diff(dim=1).abs().mean((1, 2, 3)).argsort(descending=True)
            chosen = frames[moving[:: max(1, len(moving) // (2 * SHOWN))][:SHOWN]]
            for kept, clips in zip(shown, (rolled_out(run, chosen, GIVEN), chosen), strict=True):
                kept.append(task.decoder.pictures(clips).round().byte())
    return torch.cat(shown[0]).numpy(), torch.cat(shown[1]).numpy()


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
    from ebt_megatron.evaluation.figures import EBT_COLOURS, NEUTRAL, RIVAL_COLOURS, figure_of
    from ebt_megatron.evaluation.page import Page
    from ebt_megatron.evaluation.tables import Table

    sets = held_out()
    results = {name: {held: json.loads(result_of(runs / name, held).read_text()) for held in sets} for name in LABELS}
    colours = dict(zip(LABELS, (*EBT_COLOURS[:2], RIVAL_COLOURS[0]), strict=True))
    page = Page("EBT and Transformer++ on film, on this machine")

    def against_thinking() -> Any:
        figure, axes = figure_of(4.2 * len(sets), len(sets))
        for held, plot in zip(sets, [axes] if len(sets) == 1 else axes, strict=True):
            for name, of_sets in results.items():
                rows, repeat = of_sets[held]["thinking"], of_sets[held]["repeat_last_loss"]
                plot.plot([r["steps"] for r in rows], [r["loss"] / repeat for r in rows], "o-", color=colours[name],
                          label=LABELS[name])  # fmt: skip
            plot.axhline(1, color=NEUTRAL, ls="--", lw=1, label=SIMPLE["repeat_last"])
            plot.set(xlabel="thinking steps", title=held)
        (axes if len(sets) == 1 else axes[0]).set_ylabel("loss / loss of the last frame again")
        plot.legend(frameon=False, fontsize=8)
        return figure

    def by_position() -> Any:
        figure, axes = figure_of(4.2 * len(sets), len(sets))
        for held, plot in zip(sets, [axes] if len(sets) == 1 else axes, strict=True):
            for name, of_sets in results.items():
                losses = of_sets[held]["loss_by_position"]["steps"][of_sets[held]["trained_steps"] - 1]
                plot.plot(range(1, len(losses) + 1), losses, "o-", ms=3, color=colours[name], label=LABELS[name])
            for (simple, label), style in zip(SIMPLE.items(), ("--", ":"), strict=True):
                losses = results["s1"][held]["loss_by_position"][simple]
                plot.plot(range(1, len(losses) + 1), losses, color=NEUTRAL, ls=style, label=label)
            plot.set(xlabel="observed frames", title=held)
        (axes if len(sets) == 1 else axes[0]).set_ylabel("loss")
        plot.legend(frameon=False, fontsize=8)
        return figure

    page.figure(
        "thinking", "Held-out films; smooth L1 of normalised latents, all positions of a clip.", against_thinking
    )
    page.figure("positions", "As trained; beside two predictors that learn nothing.", by_position)
    rolled = {name: clips_of(runs / name, sets) for name in LABELS}
    order = ["the truth", *LABELS.values()]
    caption = (f"Held-out clips, from above: {', '.join(order)}; {SHOWN} each of {', '.join(sets)}. {GIVEN} frames are "
               "given; under the red line every frame is predicted from those predicted before it.")  # fmt: skip
    page.picture("clips.gif", animation([rolled["s1"][1], *(clips for clips, _ in rolled.values())]), caption)

    header = ["model", "thinking steps", "validation loss", "against the last frame", "PSNR, dB"]
    for held in sets:
        rows = []
        any_of = results["s1"][held]
        repeat = any_of["repeat_last_loss"]
        for name, of_sets in results.items():
            for row in of_sets[held]["thinking"]:
                trained = " (trained)" if row["steps"] == of_sets[held]["trained_steps"] else ""
                rows.append([LABELS[name], f"{row['steps']}{trained}", f"{row['loss']:.4f}",
                             f"{100 * (row['loss'] / repeat - 1):+.1f} %", f"{row['psnr']:.2f}"])  # fmt: skip
        for simple, label in SIMPLE.items():
            loss = any_of[f"{simple}_loss"]
            rows.append([label, "-", f"{loss:.4f}", f"{100 * (loss / repeat - 1):+.1f} %",
                         f"{any_of[f'{simple}_psnr']:.2f}"])  # fmt: skip
        page.table(Table(f"Held out: {held}", header, rows))
    page.text("How to go on", NEXT_STEPS)
    return page.write(runs / "report")


def main(
    input: list[str] = typer.Option([], help="Films: globs, folders or URLs; default: films and games of packages."),
    override: list[str] = typer.Option([], help="key=value for every recipe, e.g. training.seed=2."),
    runs: Path = typer.Option(RUNS, help="Where the runs go."),
    processes: int = typer.Option(2, help="Ranks: data parallel."),
) -> None:
    """Prepare films, pretrain the models, evaluate them and write the report."""

    def work() -> None:
        quiet_libraries()
        step = Steps("make video")
        prepare(step, input)
        sets = held_out()
        data = f"data.validation=[{','.join(sets.values())}]"
        for number, (name, recipe) in enumerate(RECIPES.items(), 2):
            step.train(number, name, str(recipe), processes, f"training.output_dir={runs / name}", data, *override)
            for held, shards in sets.items():
                step.evaluate(number, name, runs / name, f"data.validation=[{shards}]", "--output",
                              str(result_of(runs / name, held)))  # fmt: skip
        step.done(write_report(runs), NEXT_STEPS)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
