"""A prompt loop for a terminal: a line is continued as it is, token by token, and forgotten."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

from ebt_megatron.core.cli import say
from ebt_megatron.core.errors import DataError
from ebt_megatron.inference.generation import Continuation, GenerationOptions, generate
from ebt_megatron.inference.predictor import Predictor
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.inference.texts import Texts

ASK = "> "


def prompt_loop(
    predictor: Predictor, texts: Texts, options: GenerationOptions, ask: Callable[[str], str] = input
) -> None:
    """Ask for lines, and write what follows each to stdout as it comes, until the end of input.

    Ctrl-C ends a text, and at the question the loop. The seed goes up by one from text to text.

    Args:
        predictor: the model, on one process.
        texts: its tokenizer.
        options: how texts are continued.
        ask: gives a line; raises EOFError at the end of input.
    """
    asked = 0
    while True:
        try:
            line = ask(ASK)
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if not line:
            continue
        sampling: Sampling = replace(options.sampling, seed=options.sampling.seed + asked)
        asked += 1
        try:
            _continue(predictor, texts, line, replace(options, sampling=sampling))
        except DataError as error:
            say(str(error), "yellow", "note:")
        except KeyboardInterrupt:
            print(flush=True)


def _continue(predictor: Predictor, texts: Texts, line: str, options: GenerationOptions) -> None:
    tokens = texts.prompt(line, 1)
    begin = time.monotonic()

    def watch(_: Continuation, new: str) -> None:
        sys.stdout.write(new)
        sys.stdout.flush()

    sys.stdout.write(line)
    (made,) = generate(predictor, texts, [tokens], options, watch if options.continuations == 1 else None)
    print(made.text if options.continuations > 1 else "", flush=True)
    count, seconds = len(made.tokens), time.monotonic() - begin
    parts = [f"{count} tokens", f"{seconds / count:.2g} s each"]
    if predictor.thinks:
        parts.append(f"{sum(made.steps) / count:.3g} steps each")
        parts.append(f"mean energy {sum(made.energies) / count:.4f}")
    say(", ".join(parts), "dim")
