"""Pictures of thinking, for the report: a text with every token's energy, energy landscapes, and samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebt_megatron.inference.cache import Queries
from ebt_megatron.inference.generation import GenerationOptions, generate
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import EnergyPredictor, predictor_of
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.texts import Texts
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.text import Text

_TOP, _GRID, _MARGIN, _LANDSCAPES, _SAMPLES = 4, 33, 0.35, 2, 3


def token_trace(run: TrainedRun, sample: Sample, settled: float = 0.1) -> dict[str, Any]:
    """What thinking about one validation text looks like.

    Args:
        run: of text, on one process.
        sample: its first row is shown.
        settled: a token's thinking counts as done once a step moves its prediction by less (total variation).

    Returns:
        "tokens": of each predicted token its text, loss, energy, how many steps it needed, and the most likely ones
        after the first step and after the last; "landscapes" of those whose thinking changed most; "samples", texts
        continued from the first words of this one.
    """
    texts, trained = Texts(run), run.recipe.thinking.max_steps
    one = Sample(
        sample.observed[:1],
        sample.targets[:1],
        sample.sample_ids[:1],
        None if sample.segments is None else sample.segments[:1],
    )
    predictions: list[Tensor] = []
    size = task_as(run.task, Text).vocab_size

    def watch(prediction: Any) -> None:
        predictions.append(prediction.logits[:, 0, :size].float().softmax(-1))

    with torch.no_grad():
        thinker = run.objective.thinker(one, watch)  # type: ignore[attr-defined]
        thought = thinker.think(trained + 2)
    after = torch.stack(predictions[len(predictions) - trained - 2 :])  # [n, S, V], without the context's own
    moved = (after[1:] - after[:-1]).abs().sum(-1) / 2
    needed = torch.where((moved <= settled).any(0), (moved <= settled).int().argmax(0) + 1, len(after))
    losses, energies = thought.losses[trained - 1, :, 0], thought.energies[trained, :, 0]
    before = one.observed[0].tolist()
    tokens = [
        {
            "text": texts.decode([int(token)], before[i]),
            "loss": float(losses[i]),
            "energy": float(energies[i]),
            "steps": int(needed[i]),
            "first": _likely(texts, after[0, i], before[i]),
            "last": _likely(texts, after[trained - 1, i], before[i]),
        }
        for i, token in enumerate(one.targets[0].tolist())
    ]
    change = (after[trained - 1] - after[0]).abs().sum(-1)
    change[: len(change) // 8] = -1  # leave some context to show
    chosen = change.topk(min(_LANDSCAPES, len(change))).indices.tolist()
    predictor = predictor_of(run, ThinkingOptions())
    assert isinstance(predictor, EnergyPredictor)
    landscapes = [landscape(predictor, texts, before[: i + 1], int(one.targets[0, i]), trained) for i in chosen]
    options = GenerationOptions(max_tokens=40, sampling=Sampling(temperature=0.8))
    prompt = before[: min(16, len(before))]
    samples = [c.text for c in generate(predictor, texts, [prompt] * _SAMPLES, options)]
    shown = texts.decode(prompt[1:], prompt[0])
    return {"tokens": tokens, "landscapes": landscapes, "samples": {"prompt": shown, "texts": samples}}


def _likely(texts: Texts, p: Tensor, before: int) -> list[list[Any]]:
    """The most likely tokens of a distribution, with their probabilities."""
    top = p.topk(_TOP)
    return [[texts.decode([int(t)], before), float(v)] for v, t in zip(top.values, top.indices, strict=True)]


class _Embedded:
    """Predictions that are known by what the model reads of them, [R, 1, D]."""

    def __init__(self, x: Tensor):
        self.x = x

    def embed(self) -> Tensor:
        return self.x


@torch.no_grad()
def landscape(
    predictor: EnergyPredictor, texts: Texts, context_tokens: list[int], target: int, steps: int
) -> dict[str, Any]:
    """Energies over the plane through a prediction's start, its end, and the token that comes.

    All are points of the space that the model reads predictions in, x = softmax(y) W. The first axis goes from the end
    back to the start, the second towards the token that comes; energies are those of the last step's landscape.

    Args:
        predictor: the model.
        texts: its tokenizer.
        context_tokens: what comes before.
        target: the token that comes.
        steps: thinking steps.

    Returns:
        "energy" [rows, columns] at "x" and "y"; "path" [[x, y] ...] of the descent; "target" [x, y]; both texts.
    """
    engine, device = predictor.engine, predictor.device
    assert engine.modality is not None
    length = len(context_tokens)
    rows, positions = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    context = engine.context(1, length, length)
    h = engine.read(context, rows.to(device), positions.to(device), torch.tensor(context_tokens, device=device))
    at = torch.tensor([length - 1], device=device)
    queries = Queries(torch.zeros_like(at), at + context.sinks)
    state = engine.start(torch.zeros_like(at), at, h[-1:].to(engine.dtype))
    path, last = [state.embed()[0, 0]], 0
    for step in range(steps):
        last = min(step, engine.landscapes - 1)
        _, gradient = engine.slopes(context, queries, state, last)
        state.step(gradient, engine.step_size)
        path.append(state.embed()[0, 0])
    points = torch.stack(path).double()
    goal = engine.modality.prediction_embedding.weight[target].double()
    end = points[-1]
    first, second = points[0] - end, goal - end
    first = first / first.norm().clamp_min(1e-12)
    second = second - (second @ first) * first
    second = second / second.norm().clamp_min(1e-12)
    plane = torch.stack([first, second])
    flat = (torch.cat([points, goal[None]]) - end) @ plane.T  # [n + 2, 2]
    low, high = flat.min(0).values, flat.max(0).values
    margin = _MARGIN * (high - low).clamp_min(1e-3)
    axes = [
        torch.linspace(float(a), float(b), _GRID, dtype=torch.float64)
        for a, b in zip(low - margin, high + margin, strict=True)
    ]
    y, x = torch.meshgrid(axes[1], axes[0], indexing="ij")
    grid = end + torch.stack([x, y], -1).to(end) @ plane
    many = grid.reshape(-1, 1, grid.shape[-1]).to(path[0].dtype)
    over = Queries(torch.zeros(len(many), dtype=torch.int64, device=device), at.expand(len(many)) + context.sinks)
    energy = engine.energies(context, over, _Embedded(many), last)  # type: ignore[arg-type]
    return {
        "x": axes[0].tolist(),
        "y": axes[1].tolist(),
        "energy": energy.view(_GRID, _GRID).double().tolist(),
        "path": flat[:-1].tolist(),
        "target": flat[-1].tolist(),
        "context": texts.decode(context_tokens[-16:][1:], context_tokens[-16:][0]),
        "token": texts.decode([target], context_tokens[-1]),
    }
