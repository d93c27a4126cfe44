"""The evaluation suite of a run on pictures: denoising in any number of passes, a linear probe, other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.loader import Loader, MicroBatch
from ebt_megatron.evaluation.interface import SuiteOptions
from ebt_megatron.evaluation.ood_detection import ood_detection
from ebt_megatron.evaluation.pictures import denoising, first_pictures
from ebt_megatron.evaluation.probe import probe
from ebt_megatron.session import TrainedRun, open_run
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.images import Images

PASSES = (1, 2, 3, 5, 10, 30, 100)  # of a DiT, which can take any number
_OOD_PICTURES = 512  # pictures of each kind that are looked at


def levels_of(run: TrainedRun) -> list[int]:
    """The highest level of noise that EBTs are trained on, and twice as far in the schedule."""
    options = run.recipe.images
    return [options.highest_level, min(2 * options.highest_level + 1, options.schedule_steps - 1)]


def passes_of(run: TrainedRun, most: int | None) -> list[int]:
    """How many passes are looked at; an EBT's are steps, so all are, by default up to 10 or three times those trained.

    Args:
        run: of an EBT or a DiT.
        most: at most so many.
    """
    if run.objective.thinks:
        return list(range(1, (most or max(10, 3 * run.recipe.thinking.max_steps)) + 1))
    return [n for n in PASSES if n <= (most or PASSES[-1])]


def _others(run: TrainedRun, folder: str) -> MicroBatch:
    """Pictures of another folder.

    Raises:
        DataError: if they were made with another encoder.
    """
    recipe = replace(run.recipe, data=replace(run.recipe.data, validation=[folder]))
    loader = Loader(recipe, "validation", 0, 1)
    manifest, own = loader.sources[0].manifest, run.data["validation"].sources[0].manifest
    if manifest.kind != own.kind or manifest.sidecar.get("sha256") != own.sidecar["sha256"]:
        raise DataError(
            f"{folder} was not made with the run's encoder: prepare it with --encoder "
            f"{run.data['validation'].sources[0].folder}/{own.sidecar['file']}"
        )
    return loader.read(list(range(min(_OOD_PICTURES, len(loader.blend)))))


def evaluate_pictures(run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> dict[str, Any]:
    """Run the suite; `training.validation_samples` pictures are denoised.

    Args:
        run_dir: of an EBT or a DiT.
        overrides: of its recipe.
        options: `steps` are the most passes; `shifts` are folders of other pictures, of the run's encoder.

    Raises:
        RecipeError, DataError: where run, data or options do not do.
    """
    options.check()
    if options.baselines:
        raise RecipeError("--baseline is for text: pictures' models are evaluated one by one")
    with open_run(run_dir, overrides, ("validation", "train")) as run, Progress(transient=True) as progress:
        task = task_as(run.task, Images)
        doing = progress.add_task("", total=2 + len(options.shifts or {}))
        out: dict[str, Any] = {
            "name": run.recipe.name,
            "trained steps": run.recipe.thinking.max_steps if run.objective.thinks else 1,
            "parameters": sum(p.numel() for p in run.model.parameters()),
        }
        if task.denoises and task.decoder is not None:
            progress.update(doing, description=f"{run.recipe.name}: denoising", advance=1)
            levels = levels_of(run)
            count = run.data["validation"].validation_samples
            out["denoising"] = denoising(run, levels, passes_of(run, options.steps), count)
            for name, folder in (options.shifts or {}).items():
                progress.update(doing, description=f"{run.recipe.name}: {name}", advance=1)
                own = first_pictures(run, _OOD_PICTURES, whole=True)
                out.setdefault("other pictures", {})[name] = ood_detection(run, own, _others(run, folder), levels)
        if run.data["validation"].sources[0].manifest.classes:
            progress.update(doing, description=f"{run.recipe.name}: probe", advance=1)
            out["probe"] = probe(run, [0, run.recipe.images.highest_level])
    return out
