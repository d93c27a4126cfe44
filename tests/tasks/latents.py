"""Small samples of video and pictures, and training steps on them on any layout, without shards."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch

from ebt_megatron.data.captions import NOT_TOLD
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.model import captions, condition, joint, layers
from ebt_megatron.model.initialization import Draw
from ebt_megatron.parallel.setup import shutdown
from ebt_megatron.tasks import task_class
from ebt_megatron.tasks.frames import FrameTokens
from ebt_megatron.tasks.images import Images
from ebt_megatron.training.trainer import Trainer
from tests import builders

FRAMES, SHAPE = 7, [4, 2]  # of a clip; patches (2 x 2) and channels of a frame
PATCHES = 4  # of a picture
# What stands for its caption: up to five tokens, or, in recipes of that name, a vector.
TOKENS = {"kind": "tokens", "shape": [5], "entries": 11, "sha256": "t"}
VECTORS = {"kind": "clip", "shape": [6], "sha256": "v"}
CAPTIONS = ("images.classes=false", "images.captions=true")
LAYOUTS = {
    "TP 2 + SP": ("parallel.tensor=2", "parallel.sequence_parallel=true"),
    "PP 2": ("parallel.pipeline=2",),
    "DP 2": (),
}


def recipe(*overrides: str):
    """A small recipe of latents, with a step size that matters."""
    return builders.small_recipe(
        "data.modality=video",
        f"data.sequence_length={FRAMES - 1}",
        "thinking.step_size=0.7",
        "optimizer.warmup_steps=2",
        "optimizer.epsilon=1e-4",
        *overrides,
    )


def pictures_recipe(*overrides: str):
    """The same of pictures of four patches, denoised."""
    return recipe(
        "data.modality=images",
        f"data.sequence_length={PATCHES}",
        "model.num_query_groups=4",
        "thinking.initial=observed",
        "model.conditioning=adaln_zero",
        "images.highest_level=400",
        "images.classes=true",
        *overrides,
    )


def task(recipe):
    if recipe.data.modality == "images":
        return Images(recipe, [PATCHES, 2], classes=3, captions=VECTORS if recipe.name == "vectors" else TOKENS)
    return task_class(recipe.data.modality)(recipe, FrameTokens(2, 2, 2, recipe.video.tokens_per_side))


def clips(count: int, first: int = 0) -> MicroBatch:
    """Random walks, float32 [count, FRAMES, *SHAPE]."""
    generator = torch.Generator().manual_seed(first)
    latents = torch.randn(count, FRAMES, *SHAPE, generator=generator).cumsum(1)
    return MicroBatch(torch.arange(count) + first, latents)


def pictures(count: int, first: int = 0) -> MicroBatch:
    """float32 [count, PATCHES, 2], with labels, and captions of one to five tokens."""
    generator = torch.Generator().manual_seed(first)
    latents = torch.randn(count, PATCHES, 2, generator=generator)
    tokens = torch.randint(0, TOKENS["entries"], (count, 5), generator=generator)
    tokens = tokens.where(torch.arange(5) <= torch.arange(count)[:, None] % 5, NOT_TOLD)
    beside = {"labels": torch.arange(count) % 3, "captions": tokens}
    return MicroBatch(torch.arange(count) + first, latents, beside=beside)


def with_vectors(batch: MicroBatch) -> MicroBatch:
    """The same with a vector for each caption."""
    generator = torch.Generator().manual_seed(int(batch.sample_ids[0]))
    vectors = torch.randn(len(batch.sample_ids), 6, generator=generator)
    return replace(batch, beside={**batch.beside, "captions": vectors})


def sample(recipe, micro_batch: MicroBatch, dtype=torch.float64):
    """As a model sees it, in `dtype`."""
    micro_batch = with_vectors(micro_batch) if recipe.name == "vectors" else micro_batch
    batch = task(recipe).sample(micro_batch, torch.device("cpu"))
    for name in ("observed", "targets", "start"):
        if (value := getattr(batch, name)) is not None and value.is_floating_point():
            setattr(batch, name, value.to(dtype))
    return batch


@contextmanager
def unless_zero():
    """What begins at zero is drawn instead: heads, gates and biases would hide what is wrong with all behind them."""

    def draw(std, *more):
        return Draw(std or 0.3, *more)

    draw.xavier = Draw.xavier
    with ExitStack() as patches:
        for module in (joint, condition, layers, captions):
            patches.enter_context(mock.patch.object(module, "Draw", draw))
        yield


def losses(overrides: tuple[str, ...], batches, steps: int = 4) -> list[float]:
    """Losses of optimizer steps on global batches of four samples, two at a time."""
    made = (recipe if batches is clips else pictures_recipe)(
        "training.global_batch_size=4", "training.micro_batch_size=2", *overrides
    )
    with unless_zero():
        trainer = Trainer(made, task(made), builders.state(made))
    size, rank, out = trainer.state.data_size, trainer.state.data_rank, []
    for step in range(steps):
        whole = batches(4, 4 * step)
        parts = [whole.part(2 * i, 2 * i + 2) for i in range(2)]
        out.append(trainer.train_step(parts[rank::size], step).loss)
    return out


def several(recipes: dict[str, tuple[str, ...]], layout: tuple[str, ...], batches) -> dict[str, list[float]]:
    """The same of several recipes in one set of processes."""
    out = {name: losses((*overrides, *layout), batches) for name, overrides in recipes.items()}
    shutdown()
    return out
