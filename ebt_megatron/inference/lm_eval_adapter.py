"""A run as lm-evaluation-harness sees it: `ebt-lm-eval --model ebt --model_args run=RUN_DIR,steps=4 --tasks ...`."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.generation import GenerationOptions, generate
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import Predictor, predictor_of
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.scoring import Request, score
from ebt_megatron.inference.texts import Texts
from ebt_megatron.session import open_run

_HARNESS = ("device", "max_batch_size", "trust_remote_code")  # what the harness says besides


@register_model("ebt")
class RunLM(TemplateLM):
    """An EBT or Transformer++ of a run directory.

    Args:
        run: a training.output_dir.
        batch_size: requests at a time.
        options: fields of `ThinkingOptions`, and keys of the recipe (parallel.tensor=2, under torchrun).

    Raises:
        RecipeError: for a run that cannot be used, or an option that there is not.
    """

    def __init__(self, run: str = "", batch_size: int | str = 16, **options: Any):
        super().__init__()
        if not run:
            raise RecipeError("--model_args run=RUN_DIR is missing")
        overrides = [f"{name}={value}" for name, value in options.items() if "." in name]
        given = {name: value for name, value in options.items() if "." not in name and name not in _HARNESS}
        thinking = ThinkingOptions.of(given)
        self._open = ExitStack()
        atexit.register(self._open.close)
        opened = self._open.enter_context(open_run(Path(run).expanduser(), overrides, splits=()))
        self._use(predictor_of(opened, thinking), Texts(opened), batch_size)

    def _use(self, predictor: Predictor, texts: Texts, batch_size: int | str) -> None:
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise RecipeError(f"batch_size={batch_size}: must be a number of at least 1")
        self.predictor, self.texts, self.batch = predictor, texts, int(batch_size)
        self._device = predictor.device

    @classmethod
    def of(cls, predictor: Predictor, texts: Texts, batch_size: int = 16) -> RunLM:
        """The same of a run that is open."""
        lm = cls.__new__(cls)
        TemplateLM.__init__(lm)
        lm._use(predictor, texts, batch_size)
        return lm

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which is also what one without a context begins after."""
        return self.texts.end

    @property
    def tokenizer_name(self) -> str:
        """What requests that the harness keeps are told apart by."""
        return f"{len(self.texts.tokenizer.get_vocab())} entries"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text."""
        return self.texts.encode(string, f"the text {string[:40]!r}")

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        window = self.predictor.window
        cut: list[Request] = []
        for _, context, rest in requests:  # as the harness does: what counts is the last window and a token
            tokens = [*context, *rest][-window - 1 :]
            split = max(1, len(tokens) - len(rest))
            cut.append((tokens[:split], tokens[split:]))
        results = []
        for (asked, *_), scored in zip(requests, score(self.predictor, cut, self.batch), strict=True):
            results.append((sum(scored.log_p), scored.greedy))
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each after the end of a text, in windows of the trained length."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.predictor.window, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(log_p for log_p, _ in self._loglikelihood_tokens(parts)))
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
        return results

    def _generation(self, asked: dict[str, Any]) -> GenerationOptions:
        until = asked.get("until") or []
        temperature = float(asked.get("temperature") or 0.0) if asked.get("do_sample", True) else 0.0
        sampling = Sampling(temperature, asked.get("top_k"), float(asked.get("top_p") or 1.0))
        options = GenerationOptions(
            max_tokens=int(asked.get("max_gen_toks", 256)),
            stop=(until,) if isinstance(until, str) else tuple(until),
            sampling=sampling,
            batch=self.batch,
        )
        options.check()
        return options
