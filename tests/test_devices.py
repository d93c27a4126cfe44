"""A training step leaves nothing on the CPU: it runs whole on another device, torch's `meta`, which computes nothing.

A device without memory shows every place where a tensor is made on the CPU and meets one that is not, and every place
that reads a number back (`meta` has none to give). Out of reach here are CUDA's own kernels, and streams and graphs.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebt_megatron.config import load_recipe
from ebt_megatron.core.timing import Timers
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.data.puzzles import Puzzle
from ebt_megatron.objectives import build_objective
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.frames import FrameTokens
from ebt_megatron.tasks.images import Images
from ebt_megatron.tasks.puzzles import Puzzles
from ebt_megatron.tasks.text import Text
from ebt_megatron.tasks.video import Video
from tests import builders

META = torch.device("meta")
BASELINE = "model.architecture=baseline"
CONTEXT = ["thinking.initial=context", "thinking.step_rule=mirror_descent"]
SMALL = ["optimizer.lr=1e-3", "training.global_batch_size=2", "training.micro_batch_size=2", "thinking.max_steps=2"]
SMALL += ["model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4"]
TASKS = {
    "text": (Text, (builders.VOCAB,), (11,), ["data.sequence_length=10"]),
    "video": (Video, (FrameTokens(2, 2, 3),), (5, 4, 3), ["data.sequence_length=4"]),
    "images": (Images, ([16, 4],), (16, 4), ["data.sequence_length=16", "model.conditioning=none"]),
    "puzzles": (Puzzles, (Puzzle.sudoku(4),), (2, 16), ["data.sequence_length=16", "model.vocab_multiple=2"]),
}
CASES = [
    ("text", []),
    ("text", CONTEXT),
    ("text", ["thinking.initial_std=1", "thinking.langevin_noise=0.1", "thinking.step_size_scale=2"]),
    ("text", ["thinking.gradient=full", "model.energy_head=quadratic"]),
    ("text", ["thinking.gradient=truncated", "model.conditioning=adaln"]),
    ("text", ["thinking.reuse=true", "model.kernels=torch"]),
    ("text", ["thinking.regenerate=4", *CONTEXT]),
    ("text", ["thinking.replay.enabled=true"]),
    ("text", [BASELINE]),
    ("video", ["thinking.reuse=true"]),
    ("video", [BASELINE]),
    ("images", ["thinking.initial=observed", "thinking.starts_near_answer=0.5"]),
    ("images", [BASELINE]),
    ("puzzles", ["thinking.starts_near_answer=0.5"]),
    ("puzzles", [BASELINE, "puzzles.passes=2"]),
]


class OneDevice(TorchDispatchMode):
    """Operations on tensors of two devices are an error; only copies may have them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if len(found) > 1 and func.overloadpacket not in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            raise RuntimeError(f"{func} has tensors on {' and '.join(sorted(found))}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("modality", "overrides"), CASES, ids=lambda v: v if isinstance(v, str) else ", ".join(v))
def test_a_step_is_on_one_device(modality, overrides):
    task_class, shape, sample, sizes = TASKS[modality]
    recipe = load_recipe(None, [f"data.modality={modality}", *SMALL, *sizes, *overrides])
    task = task_class(recipe, *shape)
    state = replace(builders.state(recipe), device=META)
    objective = build_objective(build_model(recipe, task).to(META), recipe, task, state, Timers())
    dtype = torch.int64 if modality in ("text", "puzzles") else torch.float32
    with OneDevice():
        for iteration in range(2):
            batch = MicroBatch(torch.arange(2) + 2 * iteration, torch.ones(2, *sample, dtype=dtype))
            metrics = objective.train_batch([batch], iteration)
    assert metrics.loss.device == META
    assert all(p.grad is not None or hasattr(p, "main_grad") for p in objective.model.parameters())


@pytest.mark.parametrize(
    "mixed", [lambda x, y: x @ y, lambda x, y: x + y, lambda x, y: x[y.long()[:, 0]], lambda x, y: x.sum().item()]
)
def test_what_is_left_on_the_cpu_is_seen(mixed):
    with pytest.raises(RuntimeError, match=r"on cpu and meta|not on the expected device|item"), OneDevice():
        mixed(torch.ones(2, 2, device=META), torch.ones(2, 2))
