"""Pictures of a run: denoised in any number of passes, and made from noise; for an EBT and for a DiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.captions import open_captions
from ebt_megatron.data.decoder import Decoder, psnr
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives.energy import EnergyObjective
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.images import Images

_WINDOW = 7  # of SSIM, in pixels


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures [N, H, W, 3] in [0, 255], [N]; uniform windows of 7 x 7."""
    a, b = (t.movedim(-1, 1).double() for t in (pictures, others))

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, _WINDOW, 1)

    count = _WINDOW**2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = (
        (mean(x * y) - m * n) * count / (count - 1)
        for x, y, m, n in ((a, a, mean_a, mean_a), (b, b, mean_b, mean_b), (a, b, mean_a, mean_b))
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def quality(decoder: Decoder, predicted: Tensor, clean: Tensor) -> dict[str, float]:
    """PSNR (the mean over pictures, dB), SSIM and MSE of latents [B, S, C], in pixels from 0 to 255."""
    errors = decoder.squared_error(predicted, clean).double()
    similar = ssim(decoder.pictures(predicted), decoder.pictures(clean))
    return {"psnr": psnr(errors).mean().item(), "ssim": similar.mean().item(), "mse": errors.mean().item()}


@torch.no_grad()
def sampled(
    run: TrainedRun,
    conditions: Tensor,
    noised: Tensor,
    sample_ids: Tensor,
    first: int,
    passes: int,
    ancestral: bool = False,
    guidance: float = 0.0,
    unconditional: Tensor | None = None,
) -> Tensor:
    """What a DiT makes of noised pictures.

    Args:
        run: of a DiT.
        conditions: [B, ...] of the task; the level in it is not read.
        noised: [B, S, C], at level `first`.
        sample_ids: int64 [B], which fix the noise of ancestral sampling.
        first, passes: the levels are `NoiseSchedule.levels(first, passes)`.
        ancestral: with DDPM's fresh noise, of learned variance if the run learned one; else by DDIM.
        guidance: w of classifier-free guidance: noise(conditional) + w (noise(conditional) - noise(unconditional)).
        unconditional: conditions without class and caption, for guidance.

    Returns:
        Pictures [B, S, C].
    """
    task = task_as(run.task, Images)
    model: Any = run.model
    schedule, x = task.schedule, noised
    levels = schedule.levels(first, passes)
    for i, level in enumerate(levels):
        now = torch.full_like(sample_ids, level)
        to = None if i + 1 == passes else torch.full_like(sample_ids, levels[i + 1])

        def noise(conditions: Tensor, now: Tensor = now, x: Tensor = x) -> tuple[Tensor, Tensor | None]:
            return noise_in(model, torch.cat([now[:, None].to(conditions.dtype), conditions[:, 1:]], 1), x)

        predicted, v = noise(conditions)
        if guidance and unconditional is not None:
            predicted = predicted + guidance * (predicted - noise(unconditional)[0])
        fresh = task.noise(sample_ids, 1 + i) if ancestral else None
        x = schedule.step(x, predicted, now, to, fresh, v)
    return x


def noise_in(model: Any, conditions: Tensor, noised: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a DiT takes for the noise of pictures [B, S, C], and its v, or None if that is not learned."""
    out = model.predicted(conditions, noised.transpose(0, 1)).transpose(0, 1)
    if out.shape[-1] == noised.shape[-1]:
        return out, None
    noise, v = out.chunk(2, -1)
    return noise, v


def thought_of(
    run: TrainedRun, sample: Any, steps: int, guidance: float = 0.0, unconditional: Tensor | None = None
) -> Tensor:
    """What an EBT makes of pictures, after each step, [steps, B, S, C].

    Args:
        run: of an EBT.
        sample: from its task.
        steps: of thinking.
        guidance: w of classifier-free guidance: descends E(conditional) + w (E(conditional) - E(unconditional)).
        unconditional: conditions [B, ...] without class and caption, for guidance.
    """
    model: Any = run.model
    assert isinstance(run.objective, EnergyObjective)
    descent, length = run.objective.thinker(sample).descent, run.task.length
    prediction, alpha = descent.prediction, descent.alpha
    sides = [(1 + guidance, sample.observed)]
    if guidance and unconditional is not None:
        sides.append((-guidance, unconditional))
    out = []
    for step in range(steps):
        prediction.perturb(step)
        x = prediction.embed().detach()
        total = torch.zeros_like(x)
        for weight, observed in sides:
            with torch.no_grad():
                _, modulations = model.context(model.modality.context(observed), length, None, step)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                energy = model.predict(leaf, modulations, length, None, step, tangent=False)
                (gradient,) = torch.autograd.grad(energy.sum(), leaf)
            total += weight * gradient
        prediction.refine(total, alpha)
        prediction.advance(keep=False)
        assert prediction.y is not None
        out.append(prediction.y.transpose(0, 1).detach())
    return torch.stack(out)


def denoised(
    run: TrainedRun, batch: MicroBatch, level: int, passes: Sequence[int], ancestral: bool = False, times: int = 1
) -> list[Tensor]:
    """Pictures [B, S, C] after each number of passes, from `level`.

    Args:
        run: of pictures, which denoises.
        batch: clean ones.
        level: of the noise that is put on them.
        passes: of a DiT, or thinking steps.
        ancestral: as of `sampled`.
        times: a DiT denoises what it made, as if that had the same noise still, until it has so many times in all.
    """
    task = task_as(run.task, Images)
    sample = task.sample(batch, run.state.device, level)
    if run.objective.thinks:
        thoughts = thought_of(run, sample, max(passes))
        return [thoughts[n - 1] for n in passes]
    out = []
    for count in passes:
        pictures = sample.first
        for _ in range(times):
            pictures = sampled(run, sample.observed, pictures, sample.sample_ids, level, count, ancestral)
        out.append(pictures)
    return out


def denoising(run: TrainedRun, levels: Sequence[int], passes: Sequence[int], pictures: int = 128) -> dict[str, Any]:
    """PSNR, SSIM and MSE of held-out pictures, by level of noise and number of passes; and of the noised pictures.

    Args:
        run: opened with its validation data, on one process.
        levels: to denoise from.
        passes: of a DiT no more than a level has are run.
        pictures: how many to look at, at most.
    """
    task = task_as(run.task, Images)
    batch = first_pictures(run, pictures)
    clean = batch.samples
    out: dict[str, Any] = {}
    for level in levels:
        sample = task.sample(batch, run.state.device, level)
        counts = [n for n in passes if run.objective.thinks or n <= level + 1]
        rows = [
            {"passes": n, **quality(task.shown, latents, clean)}
            for n, latents in zip(counts, denoised(run, batch, level, counts), strict=True)
        ]
        noised = quality(task.shown, sample.first, clean)
        out[str(level)] = {"noised": noised, "passes": rows}
    return out


def made(
    run: TrainedRun, given: Tensor | Sequence[str], passes: int, guidance: float = 0.0, ancestral: bool = True
) -> Tensor:
    """Pictures [B, S, C] made from noise; an EBT's by `passes` steps.

    Args:
        run: of a model that makes pictures.
        given: classes int64 [B], or captions of a model that is conditional on them.
        passes: of the model.
        guidance: w, as in `thought_of` and `sampled`.
        ancestral: as in `sampled`.

    Raises:
        DataError: for captions to a model that is not conditional on any, or without the encoder they need.
    """
    task = task_as(run.task, Images)
    ids = torch.arange(len(given)) + (1 << 51)  # apart from training's and validation's
    labels, captions = (given, None) if isinstance(given, Tensor) else (None, captions_for(run, given))
    conditions = task.conditions(torch.zeros_like(ids), labels, captions)
    unconditional = task.unconditional(conditions)
    if run.objective.thinks:
        nothing = torch.zeros(len(ids), task.length, task.channels)
        sample = task.sample(MicroBatch(ids, nothing), run.state.device)
        sample.observed = conditions
        return thought_of(run, sample, passes, guidance, unconditional)[-1]
    last = task.options.schedule_steps - 1
    return sampled(run, conditions, task.noise(ids), ids, last, passes, ancestral, guidance, unconditional)


def captions_for(run: TrainedRun, texts: Sequence[str]) -> Tensor:
    """What stands for texts, as for the captions of the run's data; raises DataError as `made`."""
    if task_as(run.task, Images).captions is None:
        raise DataError(f"{run.recipe.name} is not conditional on captions: images.captions=false")
    return torch.from_numpy(open_captions(run.source).encode(texts))


def first_pictures(run: TrainedRun, count: int, whole: bool = False) -> MicroBatch:
    """Up to `count` pictures of the validation data, in one micro-batch.

    Args:
        run: opened with its validation data.
        count: how many.
        whole: also those beyond training.validation_samples.
    """
    loader = run.data["validation"]
    return loader.read(list(range(min(count, len(loader.blend) if whole else loader.validation_samples))))
