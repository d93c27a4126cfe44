"""Denoising and making pictures: what is measured, and that passes do what they say."""

from types import SimpleNamespace

import pytest
import torch

from ebt_megatron.config import ImagesConfig
from ebt_megatron.data.decoder import Decoder, psnr
from ebt_megatron.evaluation import pictures
from ebt_megatron.tasks.diffusion import NoiseSchedule
from tests import builders
from tests.tasks import latents


def opened(*overrides):
    """A run of a small random model."""
    recipe = latents.pictures_recipe(*overrides)
    task = latents.task(recipe)
    task.decoder = Decoder(20 * torch.eye(2), torch.full((2,), 128.0), 2, 2, 1)
    model = builders.build(recipe, torch.float32, task)
    state = builders.state(recipe)
    return SimpleNamespace(
        recipe=recipe, task=task, model=model, state=state, objective=builders.objective(model, recipe, task)
    )


def picture(seed=0):
    return 255 * torch.rand(3, 28, 28, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_that_of_the_formula():
    assert psnr(torch.tensor(25.0)).item() == pytest.approx(34.15, abs=0.01)  # 20 log10(255 / 5)


def test_ssim_of_the_same_picture_is_one_and_falls_with_noise():
    same, noise = picture(), picture(1) - 127
    assert torch.allclose(pictures.ssim(same, same), torch.ones(3, dtype=torch.float64))
    near, far = (pictures.ssim(same, same + scale * noise) for scale in (0.1, 1.0))
    assert (near > far).all() and (near < 1).all()


def test_ssim_in_one_window_is_the_formula():
    a, b = (t[:1, :7, :7] for t in (picture(), picture(1)))
    out = []
    for c in range(3):
        x, y = a[..., c].flatten().double(), b[..., c].flatten().double()
        cov = torch.cov(torch.stack([x, y]))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        out.append(
            (2 * x.mean() * y.mean() + c1)
            * (2 * cov[0, 1] + c2)
            / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
        )
    assert pictures.ssim(a, b).item() == pytest.approx(torch.stack(out).mean().item(), rel=1e-6)


def test_decoded_pictures_are_the_patches_in_their_places():
    decoder = Decoder(torch.eye(12), torch.zeros(12), 4, 6, 2)
    whole = torch.rand(2, 4, 6, 3) * 255
    rows = [whole[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r in range(2) for c in range(3)]
    assert torch.equal(decoder.pictures(torch.stack(rows, 1)), whole)


def test_thoughts_are_those_of_the_engine():
    run = opened("thinking.max_steps=3")
    batch = latents.pictures(4)
    sample = run.task.sample(batch, torch.device("cpu"), level=50)
    expected = []
    run.objective.evaluate(sample, 5, lambda prediction: expected.append(prediction.y.transpose(0, 1)))
    assert torch.allclose(pictures.thought_of(run, sample, 5), torch.stack(expected), atol=1e-5)


def test_guidance_descends_further_from_the_unconditional_energy():
    """A step is linear in the energy: with guidance w, (1 + w) the conditional minus w the unconditional."""
    run = opened()
    sample = run.task.sample(latents.pictures(4), torch.device("cpu"), level=50)
    unconditional = torch.stack([sample.observed[:, 0], torch.full((4,), 3)], 1)

    def move(observed, *guidance):
        sample.observed = observed
        return pictures.thought_of(run, sample, 1, *guidance)[0] - sample.start.transpose(0, 1)

    told = sample.observed
    expected = 3 * move(told) - 2 * move(unconditional)
    assert not torch.allclose(move(told), move(unconditional), atol=1e-4)
    assert torch.allclose(move(told, 2.0, unconditional), expected, atol=1e-5)


class Oracle:
    """Knows the noise of its pictures, as a DiT; with v, as one that learned variances."""

    def __init__(self, schedule, clean, v=None):
        self.schedule, self.clean, self.v, self.asked = schedule, clean, v, []

    def predicted(self, conditions, start):
        level = conditions[:, 0]
        self.asked.append(int(level[0]))
        kept = self.schedule.kept[level][:, None, None].float()
        noise = (start.transpose(0, 1) - kept.sqrt() * self.clean) / (1 - kept).sqrt()
        parts = [noise] if self.v is None else [noise, torch.full_like(noise, self.v)]
        return torch.cat(parts, -1).transpose(0, 1)


def task_with(schedule, noise):
    """A task of pictures with a schedule and a noise of the test's own."""
    task = latents.task(latents.pictures_recipe())
    task.schedule, task.noise = schedule, noise
    return task


@pytest.mark.parametrize("ancestral", [False, True])
@pytest.mark.parametrize("passes", [1, 4, 30])
def test_who_knows_the_noise_gets_the_picture_in_any_number_of_passes(ancestral, passes):
    schedule, clean = NoiseSchedule(ImagesConfig()), torch.randn(2, 4, 2)
    noise = lambda ids, stream=0: torch.randn(2, 4, 2)  # noqa: E731
    oracle, ids = Oracle(schedule, clean), torch.arange(2)
    run = SimpleNamespace(model=oracle, task=task_with(schedule, noise))
    noised = schedule.noised(clean, noise(ids), torch.full((2,), 99))
    out = pictures.sampled(run, torch.zeros(2, 2, dtype=torch.int64), noised, ids, 99, passes, ancestral)
    assert torch.allclose(out, clean, atol=1e-4)
    assert len(oracle.asked) == passes and oracle.asked[0] == 99 and oracle.asked == sorted(set(oracle.asked))[::-1]


@pytest.mark.parametrize("ancestral", [False, True])
def test_ancestral_sampling_alone_uses_learned_variances(ancestral):
    schedule, clean, ids = NoiseSchedule(ImagesConfig()), torch.zeros(2, 4, 2), torch.arange(2)
    fixed = torch.randn(2, 4, 2)
    task = task_with(schedule, lambda ids, stream=0: fixed)
    seen = []

    class Watched(Oracle):
        def predicted(self, conditions, start):
            seen[-1].append(start)
            return super().predicted(conditions, start)

    for v in (None, 0.0, 1.0):
        seen.append([])
        run = SimpleNamespace(model=Watched(schedule, clean, v), task=task)
        pictures.sampled(run, torch.zeros(2, 2, dtype=torch.int64), 2 * fixed, ids, 99, 3, ancestral)
    plain, lower, upper = (torch.stack(starts) for starts in seen)
    assert torch.allclose(plain, lower, atol=1e-5) and torch.allclose(lower, upper, atol=1e-5) == (not ancestral)


@pytest.mark.parametrize("setting", ["ebt", "baseline", "learned variances"])
def test_pictures_are_made_by_class(setting):
    settings = {
        "ebt": ("thinking.initial=noise",),
        "baseline": ("model.architecture=baseline",),
        "learned variances": ("model.architecture=baseline", "images.learn_sigma=true"),
    }
    run = opened(*settings[setting])
    labels = torch.tensor([0, 1, 0])
    made = pictures.made(run, labels, 3, guidance=1.0)
    assert made.shape == (3, 4, 2) and made.isfinite().all()
    again = pictures.made(run, torch.tensor([0, 2, 0]), 3, guidance=1.0)
    assert torch.allclose(made[0], again[0], atol=1e-5) and not torch.allclose(made[1], again[1], atol=1e-3)
