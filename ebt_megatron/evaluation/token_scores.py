"""Everything a text model says about every position of some samples: the raw material of the evaluation suite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.objectives.interface import Objective
from ebt_megatron.tasks.interface import Sample

_START = 1 << 44  # sample ids of another start are so far away, apart from those of replay and validation


@dataclass
class TokenScores:
    """Scores of P positions after each of n thinking steps (1 for a feed-forward model).

    Where thinking starts at the context's prediction, [n] is [n + 1]: that prediction comes first.

    Attributes:
        target: int64 [P], the token that comes.
        loss: [n, P] after each step, nats.
        entropy: [n, P] of the prediction after each step, nats.
        confidence: [n, P] the probability of its most likely token.
        answer: int64 [n, P] that token.
        moved: [n, P] total variation between the predictions before and after each step; of a feed-forward model 0.
        energy: [n + 1, P] of the start and of the prediction after each step, each on the landscape of the step that
            would follow it; of a feed-forward model [0, P].
        drawn: int64 [P], a token drawn from the last prediction; and its log-probability, drawn_log_p [P].
        token_energy: [P] of the token that comes, taken as a prediction, on the last landscape; else [0].
        first: the steps of the first prediction: 1, or 0 where the context gives one.
    """

    target: np.ndarray
    loss: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    answer: np.ndarray
    moved: np.ndarray
    drawn: np.ndarray
    drawn_log_p: np.ndarray
    energy: np.ndarray
    token_energy: np.ndarray
    first: int = 1

    def row(self, steps: int) -> int:
        """The index of the prediction after so many steps."""
        return steps - self.first

    @property
    def right(self) -> np.ndarray:
        """Whether the most likely token after each step comes; bool [n, P]."""
        return self.answer == self.target


class _Record:
    """Called with the first logits and those after each step; looks at no more than `steps` steps.

    Attributes:
        rows: entropy, confidence, answer and moved, of the start and after each step.
        last: the probabilities after the last step [S, B, V].
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.rows = tokens, list[list[Tensor]]()
        self.last: Tensor | None = None

    def __call__(self, logits: Tensor, steps: int) -> None:
        if len(self.rows) > steps:
            return
        p = logits[..., : self.tokens].float().softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        confidence, answer = p.max(-1)
        moved = torch.zeros_like(entropy) if self.last is None else (p - self.last).abs().sum(-1) / 2
        self.rows.append([entropy, confidence, answer, moved])
        self.last = p


@torch.no_grad()
def score(objective: Objective, samples: Iterable[Sample], steps: int, start: int = 0) -> TokenScores:
    """Think about every position of some samples, all at once, as in validation.

    Args:
        objective: a text model on one process.
        samples: of its task.
        steps: n, for a model that thinks.
        start: which of several starts (noises) to think from; and of several draws of tokens.
    """
    parts = [_score(objective, sample, steps, start) for sample in samples]
    first = 0 if objective.starts_at_context else 1
    target, loss, *rest = (np.concatenate(values, -1) for values in zip(*parts, strict=True))
    entropy, confidence, answer, moved, drawn, drawn_log_p, energy, token_energy = rest
    return TokenScores(
        target, loss, entropy, confidence, answer, moved, drawn, drawn_log_p, energy, token_energy, first
    )


def _score(objective: Any, sample: Sample, steps: int, start: int) -> list[np.ndarray]:
    record = _Record(objective.task.vocab_size)
    targets = sample.targets.t()
    if not objective.thinks:
        model = objective.model
        logits = model.output.logits(model.hidden(model.embedding(sample.observed), len(targets), sample.segments))
        record(logits, 0)
        loss = torch.nn.functional.cross_entropy(
            logits[..., : record.tokens].float().flatten(0, 1), targets.flatten(), reduction="none"
        ).view(1, *targets.shape)
        energy, token_energy = loss.new_zeros(0, *targets.shape), loss.new_zeros(0)
    else:
        moved_on = replace(sample, sample_ids=sample.sample_ids + start * _START)
        thinker = objective.thinker(moved_on, lambda prediction: record(prediction.logits, steps))
        if not objective.starts_at_context:  # else the start is there later, and observed
            record(thinker.descent.prediction.logits, steps)
        thought = thinker.think(steps + 1)  # one more than asked for: its energy is that of the last prediction
        loss, energy = thought.losses[:steps], thought.energies
        if thought.initial is not None:
            loss = torch.cat([thought.initial[None], loss])
        embedded = objective.model.modality.prediction_embedding(sample.targets).transpose(0, 1)
        token_energy = objective.model.predict(
            embedded, thinker.key_values(constant=True), thinker.length, sample.segments, steps, tangent=False
        )
        record.rows = record.rows[0 if objective.starts_at_context else 1 :]
    watched = [torch.stack(column) for column in zip(*record.rows, strict=True)]
    assert record.last is not None
    generator = torch.Generator(targets.device).manual_seed(start)
    drawn = torch.multinomial(record.last.flatten(0, 1), 1, generator=generator).view(targets.shape)
    drawn_log_p = record.last.gather(-1, drawn[..., None])[..., 0].log()
    values = [targets, loss, *watched, drawn, drawn_log_p, energy, token_energy]
    leading = [0, 1, 1, 1, 1, 1, 0, 0, 1, 0]  # dimensions before [S, B]
    flat = [value.flatten(lead) for value, lead in zip(values, leading, strict=True)]
    return [(value.double() if value.is_floating_point() else value).numpy() for value in flat]


CORRUPTIONS = ("random", "swapped", "repeated")


def corrupted(tokens: Tensor, kind: str, share: float, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Text with wrong tokens in it.

    Args:
        tokens: int64 [B, S + 1].
        kind: "random" (any other token), "swapped" (with the one before it) or "repeated" (the one before it again).
        share: of tokens to corrupt (swaps corrupt two).
        vocab_size: of tokens.
        seed: of the draw.

    Returns:
        The tokens, and which of them are not what they were; bool [B, S + 1].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens.shape, generator=generator) < (share / 2 if kind == "swapped" else share)
    chosen[:, 0] = False
    before = tokens.roll(1, 1)
    if kind == "random":
        out = torch.where(chosen, torch.randint(vocab_size, tokens.shape, generator=generator), tokens)
    elif kind == "repeated":
        out = torch.where(chosen, before, tokens)
    else:
        chosen &= ~chosen.roll(1, 1)  # no token takes part in two swaps
        follows = chosen.roll(-1, 1)
        follows[:, -1] = False
        out = torch.where(chosen, before, torch.where(follows, tokens.roll(-1, 1), tokens))
    return out, out != tokens
