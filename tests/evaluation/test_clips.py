"""Rolled-out clips: each frame is predicted from those before it, and nothing is seen that is not there yet."""

from types import SimpleNamespace

import pytest
import torch

from ebt_megatron.evaluation.clips import by_horizon, continued, pixels_ahead, rolled_out
from tests import builders
from tests.tasks import latents


@pytest.mark.parametrize(
    "options",
    [
        ("thinking.max_steps=2", "thinking.initial=observed"),
        ("thinking.max_steps=2", "video.tokens_per_side=2"),
        ("model.architecture=baseline",),
        ("model.architecture=baseline", "video.predicts=change"),
    ],
)
def test_a_clip_goes_on_from_its_own_frames(options):
    recipe = latents.recipe(*options)
    task = latents.task(recipe)
    model = builders.build(recipe, torch.float32, task)
    run = SimpleNamespace(recipe=recipe, task=task, objective=builders.objective(model, recipe, task))
    frames = latents.clips(2).samples
    clip = rolled_out(run, frames, given=3)
    assert torch.equal(clip[:, :3], frames[:, :3])
    other = frames.clone()
    other[:, 3:] = torch.randn_like(other[:, 3:])
    assert torch.allclose(rolled_out(run, other, given=3), clip)
    # What one frame more would be, given what was predicted so far.
    assert torch.allclose(rolled_out(run, clip, given=5), clip, atol=1e-5)
    one = rolled_out(run, clip, given=6)
    assert torch.allclose(one[:, 6], clip[:, 6], atol=1e-5) and not torch.allclose(one[:, 6], frames[:, 6], atol=1e-2)
    # And longer than a clip: from its last frames.
    longest = frames.shape[1]
    film = continued(run, frames[:, :3], longest - 1)
    assert film.shape[1] == longest + 2 and torch.allclose(film[:, :longest], clip, atol=1e-5)
    window = torch.cat([film[:, 2 : longest + 1], torch.zeros_like(film[:, :1])], 1)
    assert torch.allclose(film[:, longest + 1], rolled_out(run, window, longest - 1)[:, -1], atol=1e-5)


def test_pixels_ahead_are_compared_and_what_moves_is_measured():
    true = torch.full((1, 4, 8, 8, 3), 100.0)
    true[:, 3] += 10
    made = true.clone()
    made[:, 3] -= 5
    found = pixels_ahead(made, true, 2)
    assert found["motion"] == pytest.approx([0, 5])
    assert found["psnr"][1] == pytest.approx(34.15, abs=0.01) and found["ssim"][0] == pytest.approx(1)
    assert found["ssim"][1] < 1


def test_losses_by_horizon_are_those_of_each_later_frame():
    frames = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 1) / 10  # a straight line
    clips = frames.clone()
    clips[:, 5] += 0.5
    losses = by_horizon(clips, frames, 3)
    assert losses["model"] == pytest.approx([0, 0, 0.125])
    assert losses["repeat_last"] == pytest.approx([0.005, 0.02, 0.045], rel=1e-4)
    assert losses["extrapolation"] == pytest.approx([0, 0, 0], abs=1e-6)
