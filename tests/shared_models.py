"""Runs of a few steps and their exported folders, for what is tested on models that others use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebt_megatron.parallel import setup
from ebt_megatron.sharing.export import export_folder
from tests import builders
from tests.training.runs import DOCUMENTS, recipe_of

MODELS = {
    "ebt": ("model.architecture=ebt",),
    "noisy": ("model.architecture=ebt", "thinking.initial_std=1", "model.conditioning=time_embed_sequence"),
    "transformer": ("model.architecture=baseline", "model.vocab_multiple=48"),
}


def text_runs(folder: Path, names=tuple(MODELS)) -> dict[str, Path]:
    """Runs of text, by name, trained for three steps at a high rate."""
    from ebt_megatron.training.hooks import train_to_end
    from ebt_megatron.training.run import Run

    data = builders.text_shards(folder, DOCUMENTS, 10, 500)
    for name in names:
        setup.shutdown()
        options = "training.steps=3", "training.async_save=false", "optimizer.lr=0.03", "optimizer.warmup_steps=0"
        train_to_end(Run(recipe_of(data, folder / name, *options, *MODELS[name])))
    setup.shutdown()
    return {name: folder / name for name in names}


def exported(runs: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Folders of their models, by name."""
    for name, run in runs.items():
        export_folder(run, folder / name)
    return {name: folder / name for name in runs}


def pixels(*shape: int) -> np.ndarray:
    """uint8 [*shape, 16, 16, 3]: smooth pictures."""
    x = np.arange(16)
    phase = np.arange(int(np.prod(shape))).reshape(*shape, 1, 1, 1)
    wave = np.sin((x[:, None, None] + 2 * x[None, :, None]) / 5 + phase + np.arange(3))
    return ((wave + 1) * 127).astype(np.uint8)
