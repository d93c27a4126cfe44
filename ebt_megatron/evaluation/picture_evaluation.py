"""The suite and the report of pictures: denoised by number of passes, probed, told from others, and made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.evaluation import picture_report
from ebt_megatron.evaluation.interface import Evaluation, SuiteOptions
from ebt_megatron.evaluation.page import Page
from ebt_megatron.evaluation.picture_suite import evaluate_pictures
from ebt_megatron.evaluation.pictures import denoised, first_pictures, made
from ebt_megatron.evaluation.sheet import sheet
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.session import open_run, recipe_of
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.images import Images

GUIDANCE = (0.0, 1.0)
DIT_PASSES = 50  # of a DiT that makes pictures; an EBT takes the steps it was trained with
NEXT_STEPS = """ebt-prepare images --input photos/ --output data/photos --encoder pixels --patch 16
ebt-train images/s1_denoise data.train=[data/photos/train] data.validation=[data/photos/validation]"""


class PictureEvaluation(Evaluation):
    """Denoising, a probe, other pictures; and a report that shows pictures."""

    def suite(self, run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> dict[str, Any]:
        """See `Evaluation`."""
        return evaluate_pictures(run_dir, overrides, options)

    def tables(self, numbers: dict[str, Any]) -> list[Table]:
        """See `Evaluation`."""
        return picture_report.tables({numbers["name"]: numbers}, every=True)

    def report(
        self, runs: Mapping[str, Path] | Sequence[Path], output: Path, title: str, next_steps: str
    ) -> dict[str, Path]:
        """See `Evaluation`; runs without suite.json are of models that make pictures."""
        if not isinstance(runs, Mapping):
            names = [f"{_model(path)}, {recipe_of(path).name}" for path in runs]  # of one recipe: told apart by folders
            runs = {n if names.count(n) == 1 else f"{n} ({path})": path for n, path in zip(names, runs, strict=True)}
        return write_report(runs, output, title, next_steps or NEXT_STEPS)


def _model(run_dir: Path) -> str:
    return "EBT" if recipe_of(run_dir).model.architecture == "ebt" else "DiT"


def look_at(run_dir: Path) -> dict[str, Any]:
    """The suite's numbers of a run, and some pictures: clean, and by level noised and denoised in its best passes."""
    numbers = json.loads((run_dir / "suite.json").read_text())
    with open_run(run_dir) as run:
        task = task_as(run.task, Images)
        batch = first_pictures(run, 8)
        shown: dict[str, Any] = {"numbers": numbers, "clean": task.shown.pictures(batch.samples)}
        for level, of in numbers["denoising"].items():
            noised = task.sample(batch, run.state.device, int(level)).first
            best = max(of["passes"], key=lambda row: row["psnr"])["passes"]
            pair = noised, denoised(run, batch, int(level), [best])[0]
            shown[level] = [task.shown.pictures(x) for x in pair]
        return shown


def make(run_dir: Path, passes: int) -> list[Any]:
    """Pictures of every class that a run makes, for each guidance."""
    with open_run(run_dir) as run:
        task = task_as(run.task, Images)
        labels = torch.arange(max(task.classes, 1)).repeat(2) if task.classes else torch.zeros(20, dtype=torch.int64)
        return [task.shown.pictures(made(run, labels, passes, guidance)) for guidance in GUIDANCE]


def _passes_to_make(run_dir: Path) -> int:
    """Raises RecipeError for a run that only denoises and was not evaluated."""
    recipe = recipe_of(run_dir)
    if recipe.model.architecture != "ebt":
        return DIT_PASSES
    if recipe.thinking.initial == "observed":
        raise RecipeError(f"{run_dir / 'suite.json'} is missing: ebt-evaluate {run_dir} --suite")
    return recipe.thinking.max_steps


def write_report(runs: Mapping[str, Path], output: Path, title: str, next_steps: str = NEXT_STEPS) -> dict[str, Path]:
    """The report of trained runs: of those with suite.json how they denoise, of the others what they make.

    Args:
        runs: run directories by label, which begins with EBT or DiT.
        output: folder to write to.
        title: heading.
        next_steps: plain text, how to go on.

    Returns:
        Paths by name ("html", "markdown" and each picture).

    Raises:
        RecipeError: for a run that denoises and was not evaluated with --suite.
    """
    seen = {label: look_at(path) for label, path in runs.items() if (path / "suite.json").exists()}
    makers = {label: (path, _passes_to_make(path)) for label, path in runs.items() if label not in seen}
    page = Page(title)
    if seen:
        _denoising(page, seen)
    if makers:
        _making(page, makers)
    page.text("How to go on", next_steps)
    page.origin(runs)
    return page.write(output)


def _denoising(page: Page, seen: Mapping[str, dict[str, Any]]) -> None:
    numbers = {label: one["numbers"] for label, one in seen.items()}
    first = next(iter(seen.values()))
    caption = "Held-out pictures; dashed: noised. EBTs are trained at the first of the levels alone, a DiT at all."
    page.figure("denoising", caption, lambda: picture_report.curves(numbers))
    for level in first["numbers"]["denoising"]:
        rows = [first["clean"], first[level][0], *(one[level][1] for one in seen.values())]
        caption = f"Level {level}, from above: the truth, noised, {', '.join(seen)}; at their best passes."
        page.picture(f"level-{level}.png", sheet(rows), caption)
    for table in picture_report.tables(numbers):
        page.table(table)


def _making(page: Page, makers: Mapping[str, tuple[Path, int]]) -> None:
    sheets, names = [], []
    for label, (path, passes) in makers.items():
        for guidance, pictures in zip(GUIDANCE, make(path, passes), strict=True):
            half = len(pictures) // 2
            sheets += [pictures[:half], pictures[half:]]
            names.append(f"{label}, {passes} passes, guidance {guidance:g}")
    caption = f"Made from noise, a column for each class, two rows for each, from above: {'; '.join(names)}."
    page.picture("made.png", sheet(sheets), caption)
