"""lm-evaluation-harness with runs as models: `ebt-lm-eval --model ebt --model_args run=RUN_DIR,steps=4 --tasks ...`."""

from __future__ import annotations

import os
import sys

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.errors import RecipeError

_AS_IT_IS = {"allow_extra_args": True, "ignore_unknown_options": True}
app = typer.Typer(add_completion=False)


@app.command(context_settings=_AS_IT_IS, add_help_option=False)
def main(context: typer.Context) -> None:
    """Run lm_eval's own command line, which finds no models of other packages by itself, with runs as `--model ebt`.

    Under torchrun the first rank alone prints.
    """

    def work() -> None:
        quiet_libraries()
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise RecipeError(
                f"lm-evaluation-harness is not installed ({error}): pip install 'ebt-megatron[lm-eval]'"
            ) from None
        from ebt_megatron.inference import lm_eval_adapter  # noqa: F401, registers the model

        if os.environ.get("RANK", "0") != "0":
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end
        sys.argv = ["ebt-lm-eval", *context.args]
        cli_evaluate()

    guarded(work)


if __name__ == "__main__":
    app()
