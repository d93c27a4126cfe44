"""Clips of a run: frames predicted one after another, each from those predicted before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks.interface import Sample


@torch.no_grad()
def rolled_out(run: TrainedRun, frames: Tensor, given: int, steps: int | None = None) -> Tensor:
    """Clips [B, S + 1, C] of which the first `given` frames are true, and each later one is predicted.

    Args:
        run: of video, on one process.
        frames: true clips [B, S + 1, C].
        given: frames to go on from, at least 1.
        steps: thinking steps of each frame; default: those trained with.
    """
    steps = steps or run.recipe.thinking.max_steps
    clip = torch.zeros_like(frames)  # what is not there yet is not seen: the model is causal
    clip[:, :given] = frames[:, :given]
    ids = torch.arange(len(frames)) + (1 << 51)  # apart from training's and validation's
    starts = run.recipe.thinking.initial == "observed" and run.objective.thinks
    for frame in range(given, frames.shape[1]):
        observed = clip[:, :-1]
        sample = Sample(observed, clip[:, 1:], ids, start=observed.transpose(0, 1) if starts else None)
        made: list[Tensor] = []

        def keep(prediction: Any, made: list[Tensor] = made) -> None:
            made.append(prediction.y)

        run.objective.evaluate(sample, steps, keep)
        clip[:, frame] = made[-1][frame - 1]
    return clip


def first_clips(run: TrainedRun, count: int) -> Tensor:
    """Up to `count` clips of the validation data, [B, S + 1, C]."""
    loader = run.data["validation"]
    latents = loader.read(list(range(min(count, loader.validation_samples)))).latents
    assert latents is not None
    return latents.flatten(2)
