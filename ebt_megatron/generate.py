"""Continue texts: `python -m ebt_megatron.generate RUN_DIR --prompt ...`, alone or under torchrun."""

from __future__ import annotations

import codecs
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries, say
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.core.lines import encodable, lines_of, value_of
from ebt_megatron.core.options import dataclass_options
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.rows_file import RowsFile

if TYPE_CHECKING:
    from ebt_megatron.inference.generation import Continuation, GenerationOptions

app = typer.Typer()
_OUTPUT = "Output"
_DRAWING = "Drawing tokens"


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """Prompts of the command line, then those of a file, or of stdin ("-").

    A line that is a JSON object with a "prompt", or a JSON string, is that prompt; any other line is one as it is.
    Bytes that are no UTF-8 are surrogates, as the command line has them: `Texts` replaces and counts them.

    Raises:
        DataError: where there is none, a file cannot be read, or a line begins like JSON and is none.
    """
    prompts = list(given)
    if file is not None:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        lines = lines_of(data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"))
        prompts += [_prompt(line, f"--prompts {file}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError("no prompt: give --prompt TEXT, --prompts FILE, or lines to --prompts -")
    return prompts


def _prompt(line: str, where: str) -> str:
    value = value_of(line, where)
    if isinstance(value, dict):
        value = value.get("prompt")
        if not isinstance(value, str):
            raise DataError(f'{where}: a JSON object without a text "prompt"')
    if not isinstance(value, str):
        raise DataError(f"{where}: a JSON array: give a prompt a line")
    return value


def require_free(output: Path, prompts: str | None) -> None:
    """Raise RecipeError unless rows can be written to `output` without writing over the prompts."""
    if not output.absolute().parent.is_dir():
        raise RecipeError(f"--output {output}: {output.parent} is not a folder")
    if output.is_dir():
        raise RecipeError(f"--output {output} is a folder: name a file")
    read = None if prompts in (None, "-") else Path(str(prompts)).expanduser()
    if read is not None and read.exists():
        for written in (output, RowsFile.partial_of(output)):
            if written.exists() and written.samefile(read):
                raise RecipeError(f"--output {output} would be written over --prompts {prompts}: name another file")


def as_json(prompt: str, continuation: Continuation, energies: bool) -> dict[str, Any]:
    """A line of the output."""
    finite = [e if energies and math.isfinite(e) else None for e in continuation.energies]
    return {
        "prompt": encodable(prompt)[0],
        "text": continuation.text,
        "finish": continuation.finish,
        "tokens": continuation.tokens,
        "log_p": continuation.log_p,
        "energies": finite,
        "steps": continuation.steps,
        "flops": continuation.flops,
    }


@app.command()
@dataclass_options
def main(
    run_dir: Path = typer.Argument(..., help="A training.output_dir of text, of an EBT or a Transformer++."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. parallel.tensor=2 under torchrun."),
    prompt: list[str] = typer.Option([], help="A text to continue; give it again for more."),
    prompts: str | None = typer.Option(
        None, help='A file of prompts, or - for stdin: a prompt a line, or JSON with a "prompt" a line.'
    ),
    chat: bool = typer.Option(
        False,
        "--chat",
        help="Ask for prompts in the terminal, one after another, until Ctrl-D; each begins a new text.",
    ),
    max_tokens: int = typer.Option(64, help="The most tokens of a continuation."),
    stop: list[str] = typer.Option([], help="A string that ends a continuation; give it again for more."),
    temperature: float = typer.Option(1.0, help="0: always the most likely token.", rich_help_panel=_DRAWING),
    top_k: int | None = typer.Option(None, help="Draw among so many most likely tokens.", rich_help_panel=_DRAWING),
    top_p: float = typer.Option(
        1.0, help="Draw among the fewest most likely tokens of this probability together.", rich_help_panel=_DRAWING
    ),
    seed: int = typer.Option(0, help="Seed of draws and noise.", rich_help_panel=_DRAWING),
    continuations: int = typer.Option(
        1, help="N continuations of each prompt, of which one is kept.", rich_help_panel=_DRAWING
    ),
    keep: str | None = typer.Option(
        None,
        help="'energy': of the N, the lowest sum of energies; 'log_p': the highest log-probability. "
        "Default: energy if there is one.",
        rich_help_panel=_DRAWING,
    ),
    batch: int = typer.Option(16, help="Prompts at a time."),
    chunk: int = typer.Option(256, help="Tokens of each prompt that are read at a time."),
    output: Path | None = typer.Option(
        None,
        help="Write JSON lines (tokens, energies, steps, FLOPs) there, as they come to FILE.partial, which the same "
        "command goes on with; - for stdout.",
        rich_help_panel=_OUTPUT,
    ),
    stream: bool = typer.Option(
        False,
        "--stream",
        help="Show each token as it comes, its energy and steps, on stderr.",
        rich_help_panel=_OUTPUT,
    ),
    energies: bool = typer.Option(
        True, help="Take the energy of each prediction drawn from: one forward pass more.", rich_help_panel=_OUTPUT
    ),
    *,
    thinking: ThinkingOptions,
) -> None:
    """Continue texts.

    An EBT thinks about each token; by default as its run's evaluation does. Texts see the last positions only, as
    many as the run was trained with. The same seed gives the same text in any batch and on any layout.

    Examples:

      ebt-generate RUN_DIR --prompt "Return the" --steps 8 --stream

      ebt-generate RUN_DIR --chat --steps 8

      ebt-generate RUN_DIR --prompts prompts.jsonl --candidates 4 --choose energy --output out.jsonl
    """

    def work() -> None:
        thinking.check()
        quiet_libraries()
        from ebt_megatron.inference.generation import GenerationOptions
        from ebt_megatron.inference.sampling import Sampling

        how = GenerationOptions(
            max_tokens,
            tuple(stop),
            Sampling(temperature, top_k, top_p, seed),
            continuations,
            keep or "energy",
            batch,
            chunk,
        )
        how.check()
        _require_text(run_dir, overrides or [])
        if output is not None and str(output) != "-":
            require_free(output, prompts)
        if chat:
            if prompt or prompts or output is not None or stream:
                raise RecipeError(
                    "--chat asks for prompts and shows what follows: leave --prompt(s), --output, --stream out"
                )
            _chat(run_dir, overrides or [], thinking, how, keep, energies)
            return
        given = read_prompts(prompt, prompts)
        _generate(run_dir, overrides or [], given, thinking, how, keep, output, stream, energies)

    def stopped() -> str:
        if output is None or str(output) == "-":
            return "what was made is above; with --output FILE it is kept, and the same command goes on"
        return f"what is finished is in {RowsFile.partial_of(output)}: the same command goes on after it"

    guarded(work, stopped=stopped)


def _require_text(run_dir: Path, overrides: list[str]) -> None:
    """Raise RecipeError for a run that makes something else, and name the command that does."""
    from ebt_megatron.session import recipe_of

    modality = recipe_of(run_dir, overrides).data.modality
    commands = {"video": "ebt-films {} makes", "images": "ebt-pictures {} makes", "puzzles": "ebt-puzzles {} solves"}
    if (command := commands.get(modality)) is not None:
        raise RecipeError(f"{run_dir} is a run of {modality}: {command.format(run_dir)} them")


def _chat(
    run_dir: Path,
    overrides: list[str],
    options: ThinkingOptions,
    how: GenerationOptions,
    keep: str | None,
    energies: bool,
) -> None:
    from ebt_megatron.inference.predictor import predictor_of
    from ebt_megatron.inference.prompt_loop import prompt_loop
    from ebt_megatron.inference.texts import Texts
    from ebt_megatron.session import open_run

    with open_run(run_dir, overrides, splits=()) as run:
        if run.state.world_size > 1:
            raise RecipeError("--chat is for one process: leave torchrun out")
        options, how = _fitting(run.objective.thinks, options, how, keep, energies)
        predictor, texts = predictor_of(run, options), Texts(run)
        say(f"{run.recipe.name}, {run.step:,} steps: a line is continued. Ctrl-C ends a text, Ctrl-D the loop.")
        prompt_loop(predictor, texts, how)


def _fitting(
    thinks: bool, options: ThinkingOptions, how: GenerationOptions, keep: str | None, energies: bool
) -> tuple[ThinkingOptions, GenerationOptions]:
    """Options of a model that thinks, or does not."""
    from dataclasses import replace

    options = replace(options, final_energy=thinks and (energies or how.continuations > 1))
    return options, replace(how, keep=keep or ("energy" if thinks else "log_p"))


def _generate(
    run_dir: Path,
    overrides: list[str],
    given: list[str],
    options: ThinkingOptions,
    how: GenerationOptions,
    keep: str | None,
    output: Path | None,
    stream: bool,
    energies: bool,
) -> None:
    import torch.distributed as dist

    from ebt_megatron.inference.generation import generate
    from ebt_megatron.inference.predictor import predictor_of
    from ebt_megatron.inference.texts import Texts
    from ebt_megatron.session import open_run

    with open_run(run_dir, overrides, splits=()) as run:
        thinks = run.objective.thinks
        options, how = _fitting(thinks, options, how, keep, energies)
        predictor, texts = predictor_of(run, options), Texts(run)
        tokens = [texts.prompt(text, number) for number, text in enumerate(given, 1)]
        speaks = run.state.rank == 0
        longest = max(map(len, tokens)) + how.max_tokens
        if speaks and longest > predictor.window:
            say(
                f"texts get as long as {longest} tokens, the run was trained with {predictor.window}: a token is "
                f"predicted from the last {predictor.window} alone",
                "yellow",
                "note:",
            )

        def watch(draft: Continuation, text: str) -> None:
            energy = f"  energy {draft.energies[-1]:.4f}" if thinks and energies else ""
            steps = f"  {draft.steps[-1]} steps" if thinks else ""
            say(f"{draft.prompt + 1:>3}  {text!r:<16}  p {math.exp(draft.log_p[-1]):.3f}{energy}{steps}")

        for line in texts.losses() if speaks else []:
            say(line, "yellow", "note:")
        rows, first = None, 0
        if output is not None and str(output) != "-":
            made_of = repr([run_dir.resolve(), overrides, run.step, run.tokens, options, how, energies, given])
            rows = RowsFile(output, made_of, how.batch) if speaks else None
            done = [rows.done if rows else 0]
            dist.broadcast_object_list(done, src=0)
            first = done[0]
        if speaks and output is not None and first:
            say(f"{first} of {len(given)} prompts are done in {RowsFile.partial_of(output)}: going on after them")
        for one in generate(predictor, texts, tokens, how, watch if stream and speaks else None, first):
            if not speaks:
                continue
            row = as_json(given[one.prompt], one, energies and thinks)
            if rows is not None:
                rows.add(json.dumps(row))
            else:
                print(json.dumps(row) if output is not None else row["prompt"] + row["text"], flush=True)
        if rows is not None and speaks:
            rows.finish()


if __name__ == "__main__":
    app()
