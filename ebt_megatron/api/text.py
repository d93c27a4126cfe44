"""A loaded model of text: continue, score, weigh, and watch it think."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch

from ebt_megatron.api.model import Model
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.inference.cache import Queries
from ebt_megatron.inference.engine import Engine
from ebt_megatron.inference.generation import Continuation, GenerationOptions, generate
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.pool import Growing, Pool
from ebt_megatron.inference.predictor import EnergyPredictor, FeedForwardPredictor, build_predictor
from ebt_megatron.inference.reader import chunks
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.texts import Texts
from ebt_megatron.prediction.logits_state import LogitsState
from ebt_megatron.session import TrainedRun


@dataclass(frozen=True)
class Piece:
    """A token of a text that is being made.

    Attributes:
        text: what the text gained; it may be empty, where a token is a part of a character.
        token, log_p: it, and its log-probability under the model's prediction, in nats.
        energy, steps: of the prediction it was drawn from; NaN and 0 of a model that does not think.
    """

    text: str
    token: int
    log_p: float
    energy: float
    steps: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Scored:
    """Every token of a text but the first, given those before it.

    Attributes:
        tokens: their numbers, and as text.
        log_p: log-probabilities, in nats.
        energies: of the predictions that thinking ended with; NaN of a model that does not think.
        steps: of thinking.
    """

    tokens: list[int]
    pieces: list[str]
    log_p: list[float]
    energies: list[float]
    steps: list[int]

    @property
    def total(self) -> float:
        """The log-probability of the text after its first token, in nats."""
        return sum(self.log_p)


@dataclass(frozen=True)
class Thought:
    """A prediction of the next token at one moment of thinking.

    Attributes:
        step: steps taken so far; 0 is the start.
        energy: of the prediction, on the landscape that the step before led to.
        top: the most likely tokens as text, with their probabilities.
        probabilities: of the whole vocabulary, [V].
    """

    step: int
    energy: float
    top: list[tuple[str, float]]
    probabilities: torch.Tensor


class TextModel(Model):
    """An EBT or a Transformer++ of text; see `Model`.

    Thinking options are the fields of `ThinkingOptions` by name: steps, energy_tolerance, prediction_tolerance,
    candidates, step_size_scale, accept_only, langevin_noise and more. What a model cannot do is refused with
    RecipeError: steps of a Transformer++, candidates of an EBT without noise.
    """

    def __init__(self, run: TrainedRun):
        super().__init__(run)
        self.texts = Texts(run)

    # --- text and tokens ------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.texts.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self.texts.tokenizer.decode(list(tokens), skip_special_tokens=False)

    @property
    def window(self) -> int:
        """The most tokens that a prediction sees: those trained with."""
        return self.run.task.length

    def predictor(self, thinking: ThinkingOptions) -> EnergyPredictor | FeedForwardPredictor:
        """What predicts the next token by given options; raises RecipeError where the model cannot think so."""
        return build_predictor(self.run.model, self.recipe, self.run.task, self.run.state, thinking)

    def _thinking(self, given: dict[str, Any]) -> ThinkingOptions:
        return replace(ThinkingOptions.of(given), final_energy=self.thinks)

    # --- continuing -----------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str, **options: Any) -> Continuation: ...

    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[Continuation]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 64,
        stop: str | Sequence[str] = (),
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        continuations: int = 1,
        keep: str | None = None,
        batch: int = 16,
        **thinking: Any,
    ) -> Continuation | list[Continuation]:
        """Continue a text, or several.

        Args:
            prompts: a text, or texts.
            max_tokens: the most tokens of a continuation.
            stop: strings that end one, and are not part of it.
            temperature: 0 is greedy.
            top_k, top_p: draw among so many most likely tokens, or the fewest of this probability together.
            seed: of draws and noise; the same seed gives the same text.
            continuations: N of each prompt, of which one is kept.
            keep: by lowest "energy" (default of an EBT) or highest "log_p".
            batch: prompts at a time.
            thinking: fields of `ThinkingOptions`, e.g. steps=8.

        Returns:
            Of one text its continuation, of several a list of theirs.

        Raises:
            RecipeError: for an option that does not do, or that the model cannot follow.
            DataError: for a prompt that the tokenizer cannot read.
        """
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        how = GenerationOptions(
            max_tokens,
            (stop,) if isinstance(stop, str) else tuple(stop),
            Sampling(temperature, top_k, top_p, seed),
            continuations,
            keep or ("energy" if self.thinks else "log_p"),
            batch,
        )
        how.check()
        tokens = [self.texts.prompt(text, number) for number, text in enumerate(given, 1)]
        predictor = self.predictor(self._thinking(thinking))
        found = list(generate(predictor, self.texts, tokens, how)) if tokens else []
        return found[0] if isinstance(prompts, str) else found

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 64,
        stop: str | Sequence[str] = (),
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        **thinking: Any,
    ) -> Iterator[Piece]:
        """Continue a text token by token; the same text as `generate`, whose arguments these are."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(temperature, top_k, top_p, seed)
        GenerationOptions(max_tokens, stops, sampling).check()
        tokens = self.texts.prompt(prompt, 1)
        text = Growing(tokens, max_tokens, stops, sampling, self._thinking(thinking))
        gained: list[str] = []
        text.watch = lambda _, new: gained.append(new)
        pool = Pool(self.predictor, self.texts, rows=1, length=len(tokens) + max_tokens)
        pool.check(text)
        pool.add(text)

        def pieces() -> Iterator[Piece]:
            while not text.done:
                pool.step()
                for new in gained:
                    draft = text.draft
                    yield Piece(new, draft.tokens[-1], draft.log_p[-1], draft.energies[-1], draft.steps[-1])
                gained.clear()

        return pieces()

    # --- scoring --------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, text: str, **thinking: Any) -> Scored:
        """How likely each token of a text is, given those before it, and what the model's predictions were worth.

        Args:
            text: of two tokens or more.
            thinking: fields of `ThinkingOptions`.

        Raises:
            RecipeError, DataError: as `generate`; DataError for a text of one token.
        """
        tokens = self.texts.encode(text)
        if len(tokens) < 2:
            raise DataError(
                f"{text[:40]!r} has {len(tokens)} tokens: the first is given, so two are the least to score"
            )
        predictor = self.predictor(self._thinking(thinking))
        context = predictor.context(1, len(tokens), 64)
        ids = torch.tensor([stable_seed("context", tuple(tokens[:1]))], device=predictor.device)
        log_p: list[float] = []
        energies: list[float] = []
        steps: list[int] = []
        for rows, positions, values in chunks([tokens[:-1]], 64, predictor.device):
            found = predictor(context, rows, positions, values, torch.ones_like(rows, dtype=torch.bool), ids)
            targets = torch.tensor([tokens[p + 1] for p in positions.tolist()], device=predictor.device)
            log_p += found.log_p.gather(1, targets[:, None])[:, 0].tolist()
            energies += found.energy.tolist()
            steps += found.steps.tolist()
        pieces = [self.decode([token]) for token in tokens[1:]]
        return Scored(tokens[1:], pieces, log_p, energies, steps)

    @torch.no_grad()
    def energy(self, context: str, continuation: str) -> list[float]:
        """The energies of a continuation's tokens after a context: low where the model finds that they fit.

        A token is weighed as a nearly certain prediction, on the last landscape: its probability is 1 - 1e-4, the rest
        is spread evenly.

        Args:
            context: of a token or more.
            continuation: what follows it.

        Raises:
            RecipeError: for a model without energies.
            DataError: for an empty text.
        """
        self.require_thinking("energy")
        before, after = self.texts.prompt(context, 1), self.texts.prompt(continuation, 2)
        predictor, device = self._energy_predictor(), self.device
        engine = predictor.engine
        tokens = torch.tensor([*before, *after], device=device)
        cache = engine.context(1, len(tokens), len(tokens))
        rows, positions = torch.zeros_like(tokens), torch.arange(len(tokens), device=device)
        h = engine.read(cache, rows[:-1], positions[:-1], tokens[:-1])
        at = positions[len(before) - 1 : -1]
        state = self._start(engine, at, h[len(before) - 1 :])
        y = state.y.new_full(state.y.shape, _odds(1e-4, predictor.vocab_size))
        state.y = y.scatter(1, tokens[len(before) :, None], 0.0)
        queries = Queries(rows[: len(at)], at + cache.sinks)
        return engine.energies(cache, queries, state, engine.landscapes - 1).tolist()

    # --- thinking, step by step -----------------------------------------------------------------

    def think(self, context: str, *, top: int = 5, seed: int | None = None, **thinking: Any) -> Iterator[Thought]:
        """What the model makes of the next token, from the start on and after every step.

        Args:
            context: of a token or more.
            top: how many of the most likely tokens to name.
            seed: of the noise; default: the run's.
            thinking: fields of `ThinkingOptions`; those of stopping and of several candidates are refused, as every
                step of one prediction is shown.

        Raises:
            RecipeError: for a model that does not think, or an option that hides steps.
        """
        self.require_thinking("think")
        options = ThinkingOptions.of(thinking)
        for name in ("energy_tolerance", "prediction_tolerance", "confidence", "flops", "accept_only"):
            if getattr(options, name):
                raise RecipeError(f"{name}: think shows every step; use generate or score")
        if options.candidates > 1:
            raise RecipeError("candidates: think follows one prediction; give another seed for another start")
        return self._thoughts(self.texts.prompt(context, 1), top, seed, options)

    def _thoughts(self, before: list[int], top: int, seed: int | None, options: ThinkingOptions) -> Iterator[Thought]:
        engine, device = self._energy_predictor().engine, self.device
        tokens = torch.tensor(before, device=device)
        cache = engine.context(1, len(before), len(before))
        rows, positions = torch.zeros_like(tokens), torch.arange(len(before), device=device)
        h = engine.read(cache, rows, positions, tokens)
        state = self._start(engine, positions[-1:], h[-1:], seed)
        queries = Queries(rows[-1:], positions[-1:] + cache.sinks)
        schedule = options.schedule(engine.landscapes, self.recipe.thinking.max_steps)

        def shown(step: int, energy: float) -> Thought:
            p = state.log_probabilities()[0].exp()
            values, which = p.topk(min(top, len(p)))
            names = [self.texts.decode([token], before[-1]) for token in which.tolist()]
            return Thought(step, energy, list(zip(names, values.tolist(), strict=True)), p)

        for step, landscape in enumerate(schedule):
            with torch.no_grad():
                if noise := options.noise(self.recipe.thinking, step):
                    state.perturb(step, noise)
                energy, gradient = engine.slopes(cache, queries, state, landscape)
                now = shown(step, float(energy))
                state.step(gradient, options.size(engine.step_size, landscape, engine.landscapes))
            yield now
        with torch.no_grad():
            energy = engine.energies(cache, queries, state, schedule[-1] if schedule else 0)
            last = shown(len(schedule), float(energy))
        yield last

    def _energy_predictor(self) -> EnergyPredictor:
        predictor = self.predictor(ThinkingOptions())
        assert isinstance(predictor, EnergyPredictor)
        return predictor

    @torch.no_grad()
    def _start(
        self, engine: Engine, positions: torch.Tensor, hidden: torch.Tensor, seed: int | None = None
    ) -> LogitsState:
        """Where predictions at positions of the first text start; `hidden` [R, 1, D] is what was read there."""
        seed = self.recipe.training.seed if seed is None else seed
        assert engine.modality is not None
        read = engine.model.read_out(hidden) if engine.starts else None
        return engine.modality.start(torch.zeros_like(positions), positions, self.recipe.thinking, seed, read)


def _odds(rest: float, size: int) -> float:
    """The logit of each of the other tokens beside one of logit 0, so that all of them have probability `rest`."""
    return math.log(rest / (1 - rest) / max(size - 1, 1))
