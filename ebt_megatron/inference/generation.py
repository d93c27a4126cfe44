"""Continuing texts, token by token, in batches of any lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.predictor import Predictor
from ebt_megatron.inference.reader import chunks
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.texts import Spelling, Texts

SEVERAL = 1 << 40  # continuations of one text are that far apart in what fixes their draws


@dataclass(frozen=True)
class GenerationOptions:
    """How texts are continued.

    Attributes:
        max_tokens: the most tokens of a continuation.
        stop: strings that end one, and are not part of it.
        sampling: how tokens are drawn.
        continuations: N for each prompt, of which one is kept.
        keep: by what: "energy", the lowest sum of the predictions' energies, or "log_p", the highest sum of the tokens'
            log-probabilities.
        batch: texts at a time.
        chunk: prompt positions of each text that are read at a time.
    """

    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    continuations: int = 1
    keep: str = "energy"
    batch: int = 16
    chunk: int = 256

    def check(self) -> None:
        """Raise RecipeError for the first option that does not do."""
        for name in ("max_tokens", "continuations", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.keep not in ("energy", "log_p"):
            raise RecipeError(f"keep={self.keep}: choose one of energy, log_p")
        if "" in self.stop:
            raise RecipeError("stop='': an empty string stops everything: leave it out")
        self.sampling.check()


@dataclass
class Continuation:
    """What was generated after a prompt.

    Attributes:
        prompt: its number, from 0.
        text: without what stopped it.
        tokens: all that were drawn.
        finish: "length", "stop" or "end" (of the text, as the model says).
        log_p: of each token, under the model's prediction.
        energies, steps: of the prediction that each token was drawn from.
        flops: of a batch's reading and thinking, its share.
    """

    prompt: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = "length"
    log_p: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    flops: float = 0.0


# Told of every token: the continuation with it, and the text that is known with it to be part of the result.
Watch = Callable[[Continuation, str], None]


def generate(
    predictor: Predictor,
    texts: Texts,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    watch: Watch | None = None,
    first: int = 0,
) -> Iterator[Continuation]:
    """Continue prompts; yields a continuation for each, in their order.

    Args:
        predictor: the model.
        texts: its tokenizer.
        prompts: tokens of each, one at least.
        options: how.
        watch: told of every token as it comes.
        first: the prompt to begin with, a multiple of `options.batch`; those before it were continued earlier.

    Raises:
        RecipeError: where there is no memory for a batch, or continuations are kept by an energy that there is not.
    """
    if options.continuations > 1 and options.keep == "energy" and not predictor.thinks:
        raise RecipeError("keep=energy: the model has no energies: keep=log_p")
    starts = range(first, len(prompts), options.batch)
    for part in (prompts[begin : begin + options.batch] for begin in starts):
        length = max(map(len, part)) + options.max_tokens
        predictor.check_batch(len(part) * options.continuations, length, options.chunk)
    for begin in starts:
        batch = _Batch(predictor, texts, prompts[begin : begin + options.batch], options, begin)
        for several in batch.run(watch):
            yield _best(several, options.keep)


def _best(several: list[Continuation], keep: str) -> Continuation:
    if keep == "log_p":
        return max(several, key=lambda c: sum(c.log_p))
    return min(several, key=lambda c: sum(c.energies))


class Draft:
    """A continuation as its tokens come.

    Attributes:
        done: whether it is complete.

    Args:
        of: the continuation to write to, empty as yet.
        texts: the tokenizer.
        before: the prompt's last token.
        stop, max_tokens: as in `GenerationOptions`.
    """

    def __init__(self, of: Continuation, texts: Texts, before: int, stop: Sequence[str], max_tokens: int):
        self.of, self.stop, self.max_tokens, self.done = of, stop, max_tokens, False
        self._end, self._spelled = texts.end, Spelling(texts, before)
        self._shown = 0  # characters that `add` has returned

    def add(self, token: int, log_p: float, energy: float, steps: int) -> str:
        """Put a token to it; returns the text that is known with it to be part of the result."""
        of = self.of
        of.tokens.append(token)
        of.log_p.append(log_p)
        of.energies.append(energy)
        of.steps.append(steps)
        if token == self._end:
            of.finish = "end"
        else:
            seen = max(0, len(of.text) - max(map(len, self.stop), default=0))
            self._spelled.add(token)
            of.text = self._spelled.text
            found = [place for s in self.stop if (place := of.text.find(s, seen)) >= 0]
            if found:
                of.text, of.finish = of.text[: min(found)], "stop"
        self.done = of.finish != "length" or len(of.tokens) >= self.max_tokens
        known = len(of.text) - (0 if self.done else _beginning(self.stop, of.text))
        new = of.text[self._shown : known]
        self._shown = max(self._shown, known)
        return new


class _Batch:
    """Prompts that are continued together."""

    def __init__(
        self,
        predictor: Predictor,
        texts: Texts,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        first: int,
    ):
        self.predictor, self.prompts, self.options = predictor, prompts, options
        self.numbers, self.device = range(first, first + len(prompts)), predictor.device
        self.drafts = [
            Draft(Continuation(number), texts, prompt[-1], options.stop, options.max_tokens)
            for number, prompt in zip(self.numbers, prompts, strict=True)
            for _ in range(options.continuations)
        ]

    def run(self, watch: Watch | None) -> list[list[Continuation]]:
        """Return, for each prompt, all its continuations."""
        several, device = self.options.continuations, self.device
        rows = len(self.prompts)
        chunk = self.options.chunk
        context = self.predictor.context(rows, max(map(len, self.prompts)) + self.options.max_tokens, chunk)
        lengths = torch.tensor([len(p) for p in self.prompts], device=device)
        ids = torch.tensor(self.numbers, device=device)
        log_p = torch.empty(rows, self.predictor.vocab_size, dtype=torch.float64, device=device)
        energy, steps = log_p.new_empty(rows), lengths.clone()
        for at, positions, tokens in chunks(self.prompts, chunk, device):
            wanted = positions == lengths[at] - 1
            forecast = self.predictor(context, at, positions, tokens, wanted, ids, self.options.sampling.seed)
            log_p[at[wanted]] = forecast.log_p.to(log_p)
            energy[at[wanted]], steps[at[wanted]] = forecast.energy.to(energy), forecast.steps
            self._share(forecast.flops, range(len(self.drafts)))
        each = torch.arange(rows, device=device).repeat_interleave(several)
        if several > 1:
            context.select(each)
        ids = ids[each] + torch.arange(several, device=device).repeat(rows) * SEVERAL
        positions, log_p, energy, steps = lengths[each], log_p[each], energy[each], steps[each]
        alive = torch.arange(len(each), device=device)
        while True:
            drawn = self.options.sampling.draw(log_p, ids[alive], positions[alive])
            chosen = log_p.gather(1, drawn[:, None])[:, 0]
            found, scores, energies, counts = (t.tolist() for t in (drawn, chosen, energy, steps))
            drafts = [self.drafts[row] for row in alive.tolist()]
            for i, draft in enumerate(drafts):
                new = draft.add(found[i], scores[i], energies[i], counts[i])
                if watch is not None:
                    watch(draft.of, new)
            going = ~torch.tensor([draft.done for draft in drafts], device=device)
            alive, drawn = alive[going], drawn[going]
            if not len(alive):
                break
            wanted = torch.ones_like(alive, dtype=torch.bool)
            forecast = self.predictor(context, alive, positions[alive], drawn, wanted, ids, self.options.sampling.seed)
            positions[alive] += 1
            log_p, energy, steps = forecast.log_p.to(log_p), forecast.energy, forecast.steps
            self._share(forecast.flops, alive.tolist())
        made = [draft.of for draft in self.drafts]
        return [made[i : i + several] for i in range(0, len(made), several)]

    def _share(self, flops: float, rows: Sequence[int]) -> None:
        for row in rows:
            self.drafts[row].of.flops += flops / len(rows)


def _beginning(stop: Sequence[str], text: str) -> int:
    """How many characters at the end of a text may begin one of the strings that end it."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
