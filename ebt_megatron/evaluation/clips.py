"""Clips of a run: frames predicted one after another, each from those predicted before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.data.decoder import psnr
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.evaluation.pictures import ssim
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.video import Video


@torch.no_grad()
def rolled_out(
    run: TrainedRun, frames: Tensor, given: int, steps: int | None = None, until: int | None = None
) -> Tensor:
    """Clips [B, F, patches, channels] of which the first `given` frames are true, and each later one is predicted.

    Args:
        run: of video, on one process.
        frames: true clips [B, F, patches, channels].
        given: frames to go on from, at least 1.
        steps: thinking steps of each frame; default: those trained with.
        until: the last frame to predict, not included; default: all.
    """
    steps, task = steps or run.recipe.thinking.max_steps, task_as(run.task, Video)
    clip = torch.zeros_like(frames)  # what is not there yet is not seen: the model is causal
    clip[:, :given] = frames[:, :given]
    ids = torch.arange(len(frames)) + (1 << 51)  # apart from training's and validation's
    for frame in range(given, until or frames.shape[1]):
        made: list[Tensor] = []

        def keep(prediction: Any, made: list[Tensor] = made) -> None:
            made.append(prediction.y)

        run.objective.evaluate(task.sample(MicroBatch(ids, clip), frames.device), steps, keep)
        clip[:, frame] = task.tokens.join(made[-1].transpose(0, 1))[:, frame - 1]
    return clip


def continued(run: TrainedRun, frames: Tensor, count: int, steps: int | None = None) -> Tensor:
    """Frames [B, given, patches, channels] and `count` more, [B, given + count, ...], beyond a clip's length as well.

    A clip that gets longer than those trained on goes on from its last frames, as many as a clip has but one.

    Args:
        run, steps: as of `rolled_out`.
        frames: to go on from, at least one of each clip.
        count: frames to add.
    """
    longest, made = run.recipe.data.sequence_length + 1, frames
    total = frames.shape[1] + count
    while made.shape[1] < total:
        seen = made[:, 1 - longest :]
        given = seen.shape[1]
        until = min(longest, given + total - made.shape[1])
        room = seen.new_zeros(len(seen), longest - given, *seen.shape[2:])
        clip = rolled_out(run, torch.cat([seen, room], 1), given, steps, until)
        made = torch.cat([made, clip[:, given:until]], 1)
    return made


def pixels_ahead(made: Tensor, true: Tensor, given: int) -> dict[str, list[float]]:
    """How like the truth films are 1, 2 ... frames ahead, and how much moves in them: the mean over clips.

    Args:
        made, true: pixels [B, F, height, width, 3] from 0 to 255.
        given: frames at the start that are not looked at.

    Returns:
        By name: "psnr" in dB and "ssim"; "motion", the mean absolute change of a pixel from the frame before.
    """
    ahead = [(made[:, t].float(), true[:, t].float(), made[:, t - 1].float()) for t in range(given, made.shape[1])]
    return {
        "psnr": [psnr((a - b).square().mean((1, 2, 3)).double()).mean().item() for a, b, _ in ahead],
        "ssim": [ssim(a, b).mean().item() for a, b, _ in ahead],
        "motion": [(a - before).abs().mean().item() for a, _, before in ahead],
    }


def by_horizon(clips: Tensor, frames: Tensor, given: int) -> dict[str, list[float]]:
    """Smooth L1 (beta 1) 1, 2 ... frames ahead: of rolled-out clips, of the last given frame and of it extrapolated.

    Args:
        clips: from `rolled_out`, [B, F, patches, channels].
        frames: the true ones.
        given: as there; at least 2.
    """
    last, truth = frames[:, given - 1 : given], frames[:, given:]
    ahead = torch.arange(1, truth.shape[1] + 1, device=frames.device)[:, None, None]
    predicted = {
        "model": clips[:, given:],
        "repeat_last": last.expand_as(truth),
        "extrapolation": last + ahead * (last - frames[:, given - 2 : given - 1]),
    }
    return {
        name: F.smooth_l1_loss(values, truth, reduction="none").mean((0, 2, 3)).tolist()
        for name, values in predicted.items()
    }


def spread_clips(run: TrainedRun, count: int) -> Tensor:
    """Up to `count` clips spread evenly over the validation data, [B, F, patches, channels]."""
    loader = run.data["validation"]
    number = loader.validation_samples
    return loader.read(list(range(0, number, -(-number // count)))).samples
