"""Which pictures are not of the kind that a run was trained on: by an EBT's energies, by a DiT's losses, by pixels.

Every score is meant to be higher for other pictures; an AUROC below a half says that it is the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.data.decoder import Decoder
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.evaluation.pictures import noise_in
from ebt_megatron.evaluation.statistics import auroc
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.images import Images


def plain_scores(decoder: Decoder, latents: Tensor) -> dict[str, Tensor]:
    """What needs no model, [B] each: the mean of a picture's pixels, their variance, and how much neighbours differ."""
    pixels = decoder.pictures(latents)
    across = [pixels.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (1, 2)]
    return {
        "mean pixel": pixels.mean((1, 2, 3)),
        "variance of pixels": pixels.flatten(1).var(1),
        "difference of neighbours": (across[0] + across[1]) / 2,
    }


@torch.no_grad()
def model_scores(run: TrainedRun, batch: MicroBatch, levels: Sequence[int]) -> dict[str, Tensor]:
    """What a run that denoises makes of pictures, [B] each.

    An EBT: the energy of the pictures themselves; and, thinking as long as it was trained from the pictures noised to
    each level, the energy it ends with, how far it fell, and the loss of what it ends with. A DiT: its loss at each.

    Args:
        run: of an EBT or a DiT.
        batch: pictures.
        levels: of noise.
    """
    task = task_as(run.task, Images)
    model: Any = run.model
    steps, out = run.recipe.thinking.max_steps, {}
    for level in levels:
        sample = task.sample(batch, run.state.device, level)
        sample.observed = task.unconditional(sample.observed)
        if not run.objective.thinks:
            noise, _ = noise_in(model, sample.observed, sample.first)
            out[f"denoising loss, level {level}"] = (noise - sample.targets).square().mean((1, 2))
            continue
        if not out:
            noised, sample.start = sample.start, sample.targets.transpose(0, 1)
            out["energy of the picture"] = run.objective.evaluate(sample, 1).energies.sum(1)[0]
            sample.start = noised
        thought = run.objective.evaluate(sample, steps + 1)
        energies = thought.energies.sum(1)
        out[f"final energy, level {level}"] = energies[steps]
        out[f"energy drop, level {level}"] = energies[0] - energies[steps]
        out[f"reconstruction error, level {level}"] = thought.losses[steps - 1].mean(0)
    return out


def ood_detection(run: TrainedRun, own: MicroBatch, others: MicroBatch, levels: Sequence[int]) -> dict[str, float]:
    """AUROC by score of telling others' pictures from the run's own held-out ones.

    Args:
        run: of an EBT or a DiT that denoises.
        own, others: pictures.
        levels: of noise.
    """
    task = task_as(run.task, Images)
    size = 128
    sides = []
    for batch in (own, others):
        parts = [batch.part(i, i + size) for i in range(0, len(batch.sample_ids), size)]
        scores = [model_scores(run, part, levels) for part in parts]
        joined = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
        sides.append(joined | plain_scores(task.shown, batch.samples))
    foreign = np.repeat([False, True], [len(b.sample_ids) for b in (own, others)])
    return {name: auroc(torch.cat([side[name].cpu() for side in sides]).numpy(), foreign) for name in sides[0]}
