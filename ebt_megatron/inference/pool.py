"""Texts that grow together and come and go: each has a row of one cached context from its prompt to its last token.

Where `generation.generate` continues a batch that is known beforehand, a `Pool` takes a new text whenever a row is
free, so that many users share the passes of one model. A text is the same as when it is continued alone. Those that
think alike share a pass; where noise has a part in thinking, those of one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.generation import SEVERAL, Continuation, Draft
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import Forecast, Predictor
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.texts import Texts


@dataclass
class Growing:
    """A text in a pool.

    Attributes:
        prompt: its tokens, one at least.
        max_tokens, stop, sampling, thinking: as for `generate`.
        number: which of several continuations of the prompt, which fixes its draws.
        top: how many of the most likely tokens to keep beside each token.
        watch: called after each token with this text, and what is known with it to be part of the result; it may set
            `cancelled`.
        draft: what there is of it.
        alternatives: of each token, (token, log-probability) of the `top` most likely.
        cancelled: it is put out before the next pass.
        error: why it ended without being complete, or None.
    """

    prompt: list[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    thinking: ThinkingOptions = field(default_factory=ThinkingOptions)
    number: int = 0
    top: int = 0
    watch: Callable[[Growing, str], None] | None = None
    draft: Continuation = field(default_factory=lambda: Continuation(0))
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    cancelled: bool = False
    error: str | None = None
    done: bool = False


class Pool:
    """The rows of one cached context, some of them taken by texts that grow.

    Args:
        predictor_of: makes the predictor of options; over one model, so that all read the same context.
        texts: the tokenizer.
        rows: the most texts at a time.
        length: the most tokens of a text, its prompt included.
        chunk: prompt positions of a text that are read at a time.

    Raises:
        RecipeError: where there is no memory for the context.
    """

    def __init__(
        self,
        predictor_of: Callable[[ThinkingOptions], Predictor],
        texts: Texts,
        rows: int = 16,
        length: int = 2048,
        chunk: int = 256,
    ):
        self._make, self.texts, self.length, self.chunk = predictor_of, texts, length, chunk
        self._predictors: dict[ThinkingOptions, Predictor] = {}
        self.first = self.predictor(ThinkingOptions(final_energy=True))
        self.context = self.first.context(rows, length, chunk)
        self.rows: list[Growing | None] = [None] * rows
        self._drafts: dict[int, Draft] = {}  # of the rows that are taken
        self._read = [0] * rows  # prompt positions that are in the context

    def predictor(self, thinking: ThinkingOptions) -> Predictor:
        """What predicts by some options; raises RecipeError where the model cannot think so."""
        if thinking not in self._predictors:
            if len(self._predictors) > 64:  # of as many users
                self._predictors = {o: p for o, p in self._predictors.items() if p is self.first}
            self._predictors[thinking] = self._make(thinking)
        return self._predictors[thinking]

    @property
    def free(self) -> int:
        """Rows that are not taken."""
        return self.rows.count(None)

    @property
    def busy(self) -> bool:
        """Whether any row is taken."""
        return self.free < len(self.rows)

    def check(self, text: Growing) -> None:
        """Raise RecipeError for a text that the pool, or the model, does not take."""
        if len(text.prompt) + text.max_tokens > self.length:
            raise RecipeError(
                f"{len(text.prompt)} tokens of a prompt and max_tokens={text.max_tokens} are more than {self.length}"
            )
        if text.thinking.flops is not None:
            raise RecipeError("flops is a budget of a batch, and texts here share one: give steps or a tolerance")
        text.sampling.check()
        self.predictor(text.thinking)

    def add(self, text: Growing) -> None:
        """Give a text a free row."""
        row = self.rows.index(None)
        self.rows[row], self._read[row] = text, 0
        self._drafts[row] = Draft(text.draft, self.texts, text.prompt[-1], text.stop, text.max_tokens)
        for cache in self.context.caches:
            cache.positions[row, cache.sinks :] = 1 << 62  # nothing of the text before it is seen

    def step(self) -> None:
        """One pass: read the next chunk of every new prompt, and the newest token of every other text; add a token."""
        groups: dict[tuple[ThinkingOptions, int], list[int]] = {}
        for row, text in enumerate(self.rows):
            if text is None:
                continue
            if text.cancelled:
                self._end(row)
                continue
            seed = text.sampling.seed if self.predictor(text.thinking).noisy else 0  # else it is of the draws alone
            groups.setdefault((text.thinking, seed), []).append(row)
        for (thinking, seed), rows in groups.items():
            self._advance(self.predictor(thinking), seed, rows)

    def _advance(self, predictor: Predictor, seed: int, rows: list[int]) -> None:
        fed: list[tuple[int, int, int, bool]] = []
        for row in rows:
            text, start = self._text(row), self._read[row]
            given = text.prompt + text.draft.tokens
            part = given[start : start + self.chunk]
            fed += [(row, start + i, token, start + i == len(given) - 1) for i, token in enumerate(part)]
            self._read[row] = start + len(part)
        device = predictor.device
        at, positions, tokens, last = torch.tensor(fed, device=device).unbind(1)
        ids = torch.tensor([0 if t is None else t.number * SEVERAL for t in self.rows], device=device)
        forecast = predictor(self.context, at, positions, tokens, last.bool(), ids, seed)
        wanted = [(row, position) for row, position, _, is_last in fed if is_last]
        count = [sum(1 for r, *_ in fed if r == row) for row in rows]
        for row, n in zip(rows, count, strict=True):
            self._text(row).draft.flops += forecast.flops * n / len(fed)
        for i, (row, position) in enumerate(wanted):
            self._draw(row, position, forecast, i, ids[row])

    def _draw(self, row: int, position: int, forecast: Forecast, i: int, identity: torch.Tensor) -> None:
        text, log_p = self._text(row), forecast.log_p[i : i + 1].double()
        # A draw is keyed by the positions that came before it, as in `generate`.
        place = torch.tensor([position + 1], device=log_p.device)
        token = int(text.sampling.draw(log_p, identity[None], place))
        if text.top:
            values, tokens = log_p[0].topk(min(text.top, log_p.shape[1]))
            text.alternatives.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))
        draft = self._drafts[row]
        new = draft.add(token, float(log_p[0, token]), float(forecast.energy[i]), int(forecast.steps[i]))
        text.done = draft.done
        if text.watch is not None:
            text.watch(text, new)
        if draft.done:
            self._end(row)

    def _text(self, row: int) -> Growing:
        text = self.rows[row]
        assert text is not None
        return text

    def _end(self, row: int) -> None:
        self._text(row).done = True
        self.rows[row] = None
