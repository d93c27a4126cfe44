"""Video's report: losses by thinking steps, by observed frames and by frames ahead, and clips rolled out."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from ebt_megatron.checkpoint.history import History, step_of
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.files import write_whole
from ebt_megatron.evaluation.clips import by_horizon, rolled_out, spread_clips
from ebt_megatron.evaluation.evaluate import evaluate
from ebt_megatron.evaluation.figures import BASELINE_COLOURS, EBT_COLOURS, NEUTRAL, figure_of
from ebt_megatron.evaluation.interface import Evaluation
from ebt_megatron.evaluation.page import Page
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.session import open_run, recipe_of
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.video import Video

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIMPLE = {"repeat_last": "the last frame again", "extrapolation": "extrapolation"}
DASHES = {"repeat_last": "--", "extrapolation": ":"}
GIVEN = 8  # frames that a rolled-out clip begins with, at most
SHOWN, MEASURED = 4, 96  # clips of each set
_SIDE = 128  # pixels of a frame in the animation, where it has fewer
NEXT_STEPS = """ebt-prepare video --input 'films/**/*.mp4' --output data/films --height 224 --width 224 \\
    --frame-rate 4 --encoder vae --model FOLDER
ebt-train video/s1_xxs data.train=[data/films/train] data.validation=[data/films/validation]"""


class VideoEvaluation(Evaluation):
    """No suite; a report of clips."""

    def report(
        self, runs: Mapping[str, Path] | Sequence[Path], output: Path, title: str, next_steps: str
    ) -> dict[str, Path]:
        """See `Evaluation`; every folder of data.validation of the first run is a set of its own."""
        named = runs if isinstance(runs, Mapping) else {recipe_of(path).name: path for path in runs}
        folders = recipe_of(next(iter(named.values()))).data.validation
        names = [Path(folder).name for folder in folders]
        sets = {name if names.count(name) == 1 else path: path for name, path in zip(names, folders, strict=True)}
        return write_report(named, sets, output, title, next_steps or NEXT_STEPS)


def given_of(frames: int) -> int:
    """How many of a clip's frames are given: half of them, at most GIVEN."""
    return max(2, min(GIVEN, frames // 2))


def evaluated(run_dir: Path, held: str, shards: str) -> dict[str, Any]:
    """What `evaluate` says of a run's newest step on a set of held-out clips, kept as evaluation-HELD.json."""
    path = run_dir / ("evaluation-" + re.sub(r"[^\w.]+", "-", held) + ".json")
    saved = History(run_dir / "checkpoints", 0).published()
    if not path.exists() or not saved or json.loads(path.read_text())["step"] != step_of(saved[-1]):
        with open_run(run_dir, [f"data.validation=[{shards}]"]) as run:
            write_whole(path, json.dumps(evaluate(run), indent=1) + "\n")
    return dict(json.loads(path.read_text()))


def clips_of(run_dir: Path, sets: Mapping[str, str]) -> tuple[Any, Any, dict[str, Any]]:
    """Rolled-out clips of a run and the true ones, uint8 arrays [clips, frames, height, width, 3], some of each set.

    And of every set the losses by how many frames ahead, over more clips. Where nothing shows the latents, no clips.
    """
    shown: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    ahead = {}
    for held, shards in sets.items():
        with open_run(run_dir, [f"data.validation=[{shards}]", "training.validation_samples=1000000"]) as run:
            task = task_as(run.task, Video)
            frames = spread_clips(run, MEASURED)
            given = given_of(frames.shape[1])
            clips = rolled_out(run, frames, given)
            ahead[held] = by_horizon(clips, frames, given)
            moving = frames.diff(dim=1).abs().mean((1, 2, 3)).argsort(descending=True)
            chosen = moving[:: max(1, len(moving) // (2 * SHOWN))][:SHOWN]
            for kept, values in zip(shown, (clips, frames), strict=True):
                if task.decoder is not None:
                    kept.append(task.decoder.pictures(values[chosen]).round().byte())
    made, true = (torch.cat(some).numpy() if some else None for some in shown)
    return made, true, ahead


def animation(rows: list[Any], given: int) -> bytes:
    """A GIF whose rows are models' clips, uint8 [clips, frames, height, width, 3], side by side.

    Small frames are shown larger, up to about _SIDE pixels. Those after the first `given` frames are under a red line.
    """
    from PIL import Image

    frames, scale = [], max(1, _SIDE // rows[0].shape[2])
    for t in range(rows[0].shape[1]):
        picture = np.concatenate([np.concatenate(list(row[:, t]), 1) for row in rows], 0)
        picture = picture.repeat(scale, 0).repeat(scale, 1)
        if t >= given:  # a mark: these are predicted
            picture[:4] = (200, 68, 45)
        frames.append(Image.fromarray(picture))
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0)
    return out.getvalue()


def _colours_of(runs: Mapping[str, Path]) -> dict[str, str]:
    """EBTs' colours and the baselines', one after another."""
    left = {True: iter(EBT_COLOURS), False: iter(BASELINE_COLOURS)}
    try:
        return {name: next(left[recipe_of(path).model.architecture == "ebt"]) for name, path in runs.items()}
    except StopIteration:
        raise RecipeError(f"{len(runs)} runs are too many for one report: give fewer") from None


def write_report(
    runs: Mapping[str, Path], sets: Mapping[str, str], output: Path, title: str, next_steps: str = NEXT_STEPS
) -> dict[str, Path]:
    """The report of trained runs.

    Args:
        runs: run directories by label.
        sets: folders of shards that are held out, by what they are.
        output: folder to write to.
        title: heading.
        next_steps: plain text, how to go on.

    Returns:
        Paths by name ("html", "markdown" and each plot).

    Raises:
        RecipeError: for more runs than there are colours.
    """
    colours, page = _colours_of(runs), Page(title)
    results = {name: {held: evaluated(path, held, sets[held]) for held in sets} for name, path in runs.items()}

    rolled = {name: clips_of(path, sets) for name, path in runs.items()}
    first = next(iter(results))
    given = given_of(recipe_of(runs[first]).data.sequence_length + 1)

    def panels(draw: Callable[[Any, str], None], x: str, y: str) -> Figure:
        """One plot for each set."""
        figure, axes = figure_of(4.2 * len(sets), len(sets))
        several = [axes] if len(sets) == 1 else list(axes)
        for held, plot in zip(sets, several, strict=True):
            draw(plot, held)
            plot.set(xlabel=x, ylabel=y, title=held)
            plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        several[-1].legend(frameon=False, fontsize=8)
        return figure

    def curve(plot: Any, values: list[float], name: str) -> None:
        """Losses 1, 2 ... of a model, or of what learns nothing."""
        style = {"color": colours[name], "marker": "o", "ms": 3} if name in colours else {"color": NEUTRAL}
        plot.plot(range(1, len(values) + 1), values, ls=DASHES.get(name, "-"), label=SIMPLE.get(name, name), **style)

    def thinking(plot: Any, held: str) -> None:
        for name, of_sets in results.items():
            repeat = of_sets[held]["repeat_last_loss"]
            curve(plot, [row["loss"] / repeat for row in of_sets[held]["thinking"]], name)
        plot.axhline(1, color=NEUTRAL, ls="--", lw=1, label=SIMPLE["repeat_last"])

    def positions(plot: Any, held: str) -> None:
        for name, of_sets in results.items():
            curve(plot, of_sets[held]["loss_by_position"]["steps"][of_sets[held]["trained_steps"] - 1], name)
        for simple in SIMPLE:
            curve(plot, results[first][held]["loss_by_position"][simple], simple)

    def horizons(plot: Any, held: str) -> None:
        for name, (_, _, ahead) in rolled.items():
            curve(plot, ahead[held]["model"], name)
        for simple in SIMPLE:
            curve(plot, rolled[first][2][held][simple], simple)
        plot.set_ylim(0, 3 * max(rolled[first][2][held]["repeat_last"]))

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
            f"Rolled out: after {given} frames each is predicted from those before it; up to {MEASURED} clips.",
        ),
    ):
        page.figure(figure, caption, partial(panels, draw, x, y))
    order = ["the truth", *runs]
    caption = (
        f"Held-out clips, from above: {', '.join(order)}; {SHOWN} each of {', '.join(sets)}. {given} frames are "
        "given; under the red line every frame is predicted from those predicted before it."
    )
    if rolled[first][1] is not None:
        clips = [rolled[first][1], *(made for made, _, _ in rolled.values())]
        page.picture("clips.gif", animation(clips, given), caption)

    header = ["model", "thinking steps", "validation loss", "against the last frame", "PSNR, dB"]
    for held in sets:
        rows = []
        any_of = results[first][held]
        repeat = any_of["repeat_last_loss"]
        for name, of_sets in results.items():
            for row in of_sets[held]["thinking"]:
                trained = " (trained)" if row["steps"] == of_sets[held]["trained_steps"] else ""
                rows.append(
                    [
                        name,
                        f"{row['steps']}{trained}",
                        f"{row['loss']:.4f}",
                        f"{100 * (row['loss'] / repeat - 1):+.1f} %",
                        f"{row['psnr']:.2f}" if "psnr" in row else "-",
                    ]
                )
        for simple, label in SIMPLE.items():
            loss = any_of[f"{simple}_loss"]
            ratio = f"{any_of[f'{simple}_psnr']:.2f}" if f"{simple}_psnr" in any_of else "-"
            rows.append([label, "-", f"{loss:.4f}", f"{100 * (loss / repeat - 1):+.1f} %", ratio])
        page.table(Table(f"Held out: {held}", header, rows))
    page.text("How to go on", next_steps)
    page.origin(runs)
    return page.write(output)
