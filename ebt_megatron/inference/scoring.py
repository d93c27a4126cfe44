"""How likely given continuations are, over contexts that requests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.inference.predictor import Predictor
from ebt_megatron.inference.reader import chunks

Request = tuple[Sequence[int], Sequence[int]]  # tokens of a context, one at least, and of its continuation


@dataclass(frozen=True)
class Score:
    """The score of a continuation.

    Attributes:
        log_p: of each of its tokens, given those before it.
        greedy: whether each was the most likely one.
        energies: of the predictions; NaN where a model has none.
        flops: this request's share of its batch's.
    """

    log_p: list[float]
    greedy: bool
    energies: list[float]
    flops: float


def score(predictor: Predictor, requests: Sequence[Request], batch: int = 16, chunk: int = 64) -> Iterator[Score]:
    """Score continuations, in their order.

    The context of requests that follow each other is read once where it is the same. Noise is fixed by the context's
    tokens, so that continuations of one context start alike, and nothing depends on the batch.

    Args:
        predictor: the model.
        requests: (context, continuation), of at least a token each; the last `predictor.window` before a token count.
        batch: requests at a time.
        chunk: positions of each that are read, and thought about, at a time.

    Raises:
        RecipeError: where there is no memory for a batch.
    """
    for begin in range(0, len(requests), batch):
        yield from _score(predictor, requests[begin : begin + batch], chunk)


def _score(predictor: Predictor, requests: Sequence[Request], chunk: int) -> list[Score]:
    device = predictor.device
    contexts = list(dict.fromkeys(tuple(context) for context, _ in requests))
    row_of = {context: row for row, context in enumerate(contexts)}
    lengths = [len(context) + len(rest) - 1 for context, rest in requests]
    longest = max(lengths)
    predictor.check_batch(len(requests), longest, chunk)
    ids = torch.tensor([stable_seed("context", context) for context in contexts], device=device)
    context, flops = predictor.context(len(contexts), longest, chunk), 0.0
    # A context's last token is read with what follows it: its prediction is the first that counts.
    if any(len(tokens) > 1 for tokens in contexts):
        for rows, positions, tokens in chunks([c[:-1] for c in contexts], chunk, device):
            nothing = torch.zeros_like(rows, dtype=torch.bool)
            flops += predictor(context, rows, positions, tokens, nothing, ids).flops
    each = torch.tensor([row_of[tuple(c)] for c, _ in requests], device=device)
    context.select(each)
    ids = ids[each]
    first = torch.tensor([len(c) - 1 for c, _ in requests], device=device)
    given = [[c[-1], *rest[:-1]] for c, rest in requests]
    found: list[tuple[list[float], list[bool], list[float]]] = [([], [], []) for _ in requests]
    for rows, steps, tokens in chunks(given, chunk, device):
        forecast = predictor(context, rows, first[rows] + steps, tokens, torch.ones_like(rows, dtype=torch.bool), ids)
        flops += forecast.flops
        place = list(zip(rows.tolist(), steps.tolist(), strict=True))
        target = torch.tensor([requests[row][1][step] for row, step in place], device=device)
        log_p = forecast.log_p.gather(1, target[:, None])[:, 0].tolist()
        right = (forecast.log_p.argmax(1) == target).tolist()
        for (row, _), *values in zip(place, log_p, right, forecast.energy.tolist(), strict=True):
            for kept, value in zip(found[row], values, strict=True):
                kept.append(value)
    return [Score(log_p, all(right), energies, flops / len(requests)) for log_p, right, energies in found]
