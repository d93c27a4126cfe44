"""Small models and batches for tests, in any precision, without shards or process launchers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.timing import Timers
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.data_prep.documents import Part
from ebt_megatron.data_prep.text import prepare_text
from ebt_megatron.data_prep.text_passes import TextSettings
from ebt_megatron.objectives import build_objective
from ebt_megatron.objectives.interface import Objective
from ebt_megatron.parallel.setup import ParallelState, initialize
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.interface import Sample, Task
from ebt_megatron.tasks.text import Text
from ebt_megatron.thinking.dual_stream import Descent, Thinker, ThinkingOutput, step_sizes
from ebt_megatron.thinking.plan import Plan

VOCAB = 61


def small_recipe(*overrides: str) -> Recipe:
    """Two layers, four heads of eight, grouped queries, a vocabulary that needs padding."""
    return load_recipe(
        None,
        [
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.num_attention_heads=4",
            "model.num_query_groups=2",
            "model.vocab_multiple=16",
            "optimizer.lr=1e-3",
            "thinking.step_size=5",
            "thinking.max_steps=3",
            "data.sequence_length=10",
            "training.global_batch_size=2",
            "training.micro_batch_size=2",
            "model.kernels=reference",
            *overrides,
        ],
    )


@dataclass
class Batch:
    observed: Tensor
    targets: Tensor
    sample_ids: Tensor
    segments: Tensor | None = None


def text_batch(batch: int = 2, length: int = 10, documents: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (batch, length + 1), generator=generator)
    segments = None
    if documents:
        segments = torch.randint(2, (batch, length), generator=generator).cumsum(1).int()
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(batch) + 5, segments)


def micro_batch(batch: int = 2, length: int = 10) -> MicroBatch:
    """The same tokens as the loader gives them."""
    b = text_batch(batch, length)
    return MicroBatch(b.sample_ids, torch.cat([b.observed, b.targets[:, -1:]], 1))


def sample(recipe: Recipe) -> Sample:
    """And as a model sees them."""
    return Text(recipe, VOCAB).sample(micro_batch(), torch.device("cpu"))


def text_shards(
    folder: Path,
    documents: list[str],
    sequence_length: int,
    samples_per_shard: int,
    vocab: int = 400,
    validation_fraction: float = 0.1,
) -> Path:
    """Documents as FOLDER/shards/train and FOLDER/shards/validation; returns FOLDER/shards."""
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    settings = TextSettings(
        train_bpe=vocab,
        sequence_length=sequence_length,
        samples_per_shard=samples_per_shard,
        validation_fraction=validation_fraction,
    )
    prepare_text(folder / "shards", [[Part(str(raw))]], settings, "a test")
    return folder / "shards"


def state(recipe: Recipe) -> ParallelState:
    """One process's layout."""
    return initialize(recipe.parallel, recipe.training.seed)


def build(recipe: Recipe, dtype: torch.dtype = torch.float64, task: Task | None = None):
    """A single-process model (of text unless told) whose norms and adaLN are away from their special initial values."""
    state(recipe)
    model = build_model(recipe, task or Text(recipe, VOCAB)).to(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise / max(parameter.shape[-1], 1) ** 0.5)
    return model


def objective(model, recipe: Recipe, task: Task | None = None) -> Objective:
    """What trains and evaluates a model (of text unless told) on one process."""
    return build_objective(model, recipe, task or Text(recipe, VOCAB), state(recipe), Timers())


def new_descent(model, recipe: Recipe, batch: Batch | Sample, plan: Plan | None = None) -> Descent:
    seed, length = recipe.training.seed, batch.targets.shape[1]
    start = getattr(batch, "start", None)
    prediction = model.modality.prediction(batch.targets, batch.sample_ids, recipe.thinking, seed, start)
    sizes = step_sizes(model.step_size, recipe.thinking, batch.sample_ids, length, seed, True, model.separable)
    weight = position_weight(batch, model.head.dtype)
    return Descent(prediction, model.step_size, *sizes, plan, weight, separable=model.separable)


def new_thinker(model, recipe: Recipe, batch: Batch | Sample, plan: Plan | None = None) -> Thinker:
    """A micro-batch ready to think with the dual-stream engine."""
    (size, length), learned = batch.targets.shape[:2], plan.learned if plan else ()
    embed, descent = lambda: model.modality.context(batch.observed), new_descent(model, recipe, batch, plan)
    return Thinker(model, size, length, batch.segments, learned, embed, descent, recipe.thinking.reuse)


def position_weight(batch: Batch | Sample, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uneven weights [S, B], so that a weight applied wrongly shows."""
    shape = batch.targets.shape[1], batch.targets.shape[0]
    weight = 1 + torch.arange(shape[0] * shape[1], dtype=dtype).view(shape) / 7
    return weight / weight.sum()


def dual_stream(model, recipe: Recipe, batch: Batch | Sample, plan: Plan) -> ThinkingOutput:
    return new_thinker(model, recipe, batch, plan).train()


def double_backward(model, recipe: Recipe, batch: Batch | Sample, plan: Plan) -> ThinkingOutput:
    from ebt_megatron.thinking import double_backward as engine

    context = model.modality.context(batch.observed)
    energies = engine.energies_of(model, context, batch.segments)
    hidden = engine.read_out(model, context, batch.segments) if model.starts_thinking else None
    return engine.train(energies, new_descent(model, recipe, batch, plan), hidden)


def gradients(model) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm().clamp_min(1e-30)).item()
