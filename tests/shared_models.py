"""Runs of a few steps and their exported folders, for what is tested on models that others use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ebt_megatron.config import Recipe
from ebt_megatron.data_prep.images import PictureSource
from ebt_megatron.data_prep.video import VideoSource
from ebt_megatron.parallel import setup
from ebt_megatron.sharing.export import export_folder
from tests import builders
from tests.data.test_latents import prepare
from tests.data_prep.media import moving_square, write_videos
from tests.training.runs import DOCUMENTS, recipe_of

MODELS = {
    "ebt": ("model.architecture=ebt",),
    "noisy": ("model.architecture=ebt", "thinking.initial_std=1", "model.conditioning=time_embed_sequence"),
    "transformer": ("model.architecture=baseline", "model.vocab_multiple=48"),
}

CONTEXT = (
    "thinking.initial=context",
    "thinking.step_rule=mirror_descent",
    "thinking.min_steps=1",
    "thinking.max_steps=1",
)
MORE = {"ebt-context": ("model.architecture=ebt", *CONTEXT)}  # where one test needs it


def text_runs(folder: Path, names=tuple(MODELS)) -> dict[str, Path]:
    """Runs of text, by name, trained for three steps at a high rate."""
    from ebt_megatron.training.hooks import train_to_end
    from ebt_megatron.training.run import Run

    data = builders.text_shards(folder, DOCUMENTS, 10, 500)
    for name in names:
        setup.shutdown()
        options = "training.steps=3", "training.async_save=false", "optimizer.lr=0.03", "optimizer.warmup_steps=0"
        train_to_end(Run(recipe_of(data, folder / name, *options, *(MODELS | MORE)[name])))
    setup.shutdown()
    return {name: folder / name for name in names}


def exported(runs: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Folders of their models, by name."""
    for name, run in runs.items():
        export_folder(run, folder / name)
    return {name: folder / name for name in runs}


def film_shards(folder: Path, **settings) -> Path:
    """Clips of six frames of 16 x 16, of four films; needs PyAV."""
    folder.mkdir(exist_ok=True)
    return prepare(write_videos(folder, 4, 30), folder / "out", VideoSource(frames=6, height=16, width=16), **settings)


def picture_shards(folder: Path, **settings) -> Path:
    """Forty pictures of 16 x 16, of two classes."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "a.npz", images=moving_square(40, 16, 16), labels=np.arange(40) % 2)
    return prepare(folder, folder / "out", PictureSource(16, 16), **settings)


def untrained(made: Callable[..., Recipe], data: Path, folder: Path, *overrides: str) -> Path:
    """A run of random weights, of the recipe that `made` gives."""
    from ebt_megatron.training.run import Run

    splits = f"data.train=[{data}/train]", f"data.validation=[{data}/validation]"
    run = Run(made(*splits, f"training.output_dir={folder}", f"name={folder.name}", *overrides))
    run.begin()
    assert not (run.write_checkpoint(None) or run.checkpoints.wait())
    run.close()
    setup.shutdown()
    return folder
