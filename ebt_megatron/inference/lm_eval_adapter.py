"""A run as lm-evaluation-harness sees it: `ebt-lm-eval --model ebt --model_args run=RUN_DIR,steps=4 --tasks ...`."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ebt_megatron.core.cli import say
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.generation import GenerationOptions, generate
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import Predictor, predictor_of
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.scoring import Request, score
from ebt_megatron.inference.texts import Texts
from ebt_megatron.session import open_run

_HARNESS = ("device", "max_batch_size", "trust_remote_code")  # what the harness says besides
_MOST = 64  # requests at a time that batch_size=auto tries, and then halves
# What of a task's generation arguments is used; of the others only these values are what is done anyway.
_USED = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_SAME = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1, "use_cache": True}


@register_model("ebt")
class RunLM(TemplateLM):
    """An EBT or Transformer++ of a run directory.

    Args:
        run: a training.output_dir.
        batch_size: requests at a time; "auto": as many as there is memory for, up to 64.
        options: fields of `ThinkingOptions`, and keys of the recipe (parallel.tensor=2, under torchrun).

    Raises:
        RecipeError: for a run that cannot be used, or an option that there is not.
    """

    def __init__(self, run: str = "", batch_size: int | str = 16, **options: Any):
        super().__init__()
        if run == "":
            raise RecipeError("--model_args run=RUN_DIR is missing")
        if not isinstance(run, str) and not Path(str(run)).exists():
            raise RecipeError(f"run={run}: the harness reads this as a {type(run).__name__}: give run=./FOLDER")
        run = str(run)
        overrides = [f"{name}={'null' if value is None else value}" for name, value in options.items() if "." in name]
        given = {name: value for name, value in options.items() if "." not in name and name not in _HARNESS}
        thinking = ThinkingOptions.of(given)
        self._open = ExitStack()
        atexit.register(self._open.close)
        opened = self._open.enter_context(open_run(Path(run).expanduser(), overrides, splits=()))
        self._use(predictor_of(opened, thinking), Texts(opened), batch_size)
        self._speaks = opened.state.rank == 0

    def _use(self, predictor: Predictor, texts: Texts, batch_size: int | str) -> None:
        self.predictor, self.texts, self._said = predictor, texts, set[str]()
        self._device, self._speaks = predictor.device, True
        if str(batch_size).partition(":")[0] == "auto":
            self.batch = self._largest()
        elif str(batch_size).isdecimal() and int(batch_size) >= 1:
            self.batch = int(batch_size)
        else:
            raise RecipeError(f"batch_size={batch_size}: must be a number of at least 1, or auto")

    def _largest(self) -> int:
        """The most requests of the trained length that there is memory for."""
        batch = _MOST
        while batch > 1:
            try:
                self.predictor.check_batch(batch, self.predictor.window, GenerationOptions().chunk)
                break
            except RecipeError:
                batch //= 2
        return batch

    def _say(self, line: str) -> None:
        """Print a line once, on one rank."""
        if line not in self._said and self._speaks:
            say(line, "yellow", "note:")
        self._said.add(line)

    @classmethod
    def of(cls, predictor: Predictor, texts: Texts, batch_size: int = 16) -> RunLM:
        """Make the model of a run that is already open."""
        lm = cls.__new__(cls)
        TemplateLM.__init__(lm)
        lm._use(predictor, texts, batch_size)
        return lm

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which is also what one without a context begins after."""
        if self.texts.end is None:
            raise RecipeError("the run's tokenizer has no end of text that a text without a context could begin after")
        return self.texts.end

    @property
    def tokenizer_name(self) -> str:
        """What requests that the harness keeps are told apart by."""
        return f"{len(self.texts.tokenizer.get_vocab())} entries"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text."""
        return self.texts.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Log-probability, whether it is the most likely one) of continuations; of an empty one (0, True).

        As the harness's own, spaces that end a context begin the continuation, and a continuation is what follows the
        context's tokens in those of both together. Where all of it merges into them, it is their last token.
        """
        return self._loglikelihood_tokens([(r.args, *self._pair(*r.args)) for r in requests])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not continuation:
            return [], []
        moved = context[len(context.rstrip()) :]
        before, whole = self.tok_encode(context.rstrip()), self.tok_encode(context.rstrip() + moved + continuation)
        split = min(len(before), len(whole) - 1) if whole else 0
        if split <= 0:
            return [self.eot_token_id], whole
        return whole[:split], whole[split:]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        window = self.predictor.window
        parts: list[Request] = []
        counts = []
        for _, context, rest in requests:
            # As the harness does: the last window counts, and a token. What is longer is taken a window at a time.
            tokens, begins = [*context, *rest], range(len(context), len(context) + len(rest), window)
            for begin in begins:
                end = min(begin + window, len(tokens))
                parts.append((tokens[max(0, end - window - 1) : begin], tokens[begin:end]))
            counts.append(len(begins))
        scores = score(self.predictor, parts, self.batch)
        results = []
        for (asked, *_), count in zip(requests, counts, strict=True):
            scored = list(islice(scores, count))
            results.append((float(sum(sum(s.log_p) for s in scored)), all(s.greedy for s in scored)))
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, results[-1])
        self._say_losses()
        return results

    def _say_losses(self) -> None:
        for line in self.texts.losses():
            self._say(line)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each after the end of a text, in windows of the trained length."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.predictor.window, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(float(sum(log_p for log_p, _ in self._loglikelihood_tokens(parts))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations; greedy unless a task asks for a temperature."""
        results = [""] * len(requests)
        alike: dict[GenerationOptions, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._generation(request.args[1]), []).append(number)
        for options, numbers in alike.items():
            prompts = [self.tok_encode(requests[n].args[0]) or [self.eot_token_id] for n in numbers]
            for number, found in zip(numbers, generate(self.predictor, self.texts, prompts, options), strict=True):
                results[number] = found.text
                self.cache_hook.add_partial("generate_until", requests[number].args, found.text)
        self._say_losses()
        return results

    def _generation(self, asked: dict[str, Any]) -> GenerationOptions:
        """A task's generation arguments, as the harness normalises them for its own models."""
        given = normalize_gen_kwargs({k: v for k, v in asked.items() if v is not None}, 256)
        for name in sorted(given.keys() - _USED):
            if given[name] != _SAME.get(name):
                self._say(f"generation argument {name}={given[name]} is not supported, and left out")
        temperature = float(given.get("temperature", 0.0)) if given["do_sample"] else 0.0
        top_k, top_p = given.get("top_k"), float(given.get("top_p", 1.0))
        if top_p == 0:  # the fewest that have no probability: the most likely token
            temperature, top_p = 0.0, 1.0
        options = GenerationOptions(
            max_tokens=given["max_gen_toks"],
            stop=tuple(s for s in given["until"] if s),
            sampling=Sampling(temperature, None if top_k is None or int(top_k) < 1 else int(top_k), top_p),
            batch=self.batch,
        )
        options.check()
        return options
