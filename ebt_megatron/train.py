"""Train a recipe: `torchrun --nproc-per-node N -m ebt_megatron.train RECIPE key=value ...`, or `ebt-train RECIPE`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from ebt_megatron.config import all_keys, load_recipe, to_yaml
from ebt_megatron.config.catalog import describe_recipes, recipe_names
from ebt_megatron.core.cli import guarded, quiet_libraries

app = typer.Typer()


def _list_recipes(asked: bool) -> None:
    if asked:
        print(describe_recipes(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
        raise typer.Exit


def _explain(key: str | None) -> None:
    if key:
        from ebt_megatron.config.explain import explain

        guarded(lambda: print(explain(key)))
        raise typer.Exit


class _WithKeys(TyperCommand):
    """The command, whose help ends with a line for each key of a recipe."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # of click, or of typer's own copy of it
        from ebt_megatron.config.explain import explain

        super().format_help(ctx, formatter)
        lines = explain("all").replace("\n", "\n ")
        typer.echo(f" Keys, with their defaults; --explain KEY says more:\n\n {lines}")


def _recipes_like(incomplete: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(incomplete)]


def _keys_like(incomplete: str) -> list[str]:
    return [f"{key}=" for key in all_keys() if key.startswith(incomplete)]


@app.command(cls=_WithKeys)
def main(
    recipe: Path = typer.Argument(
        ..., help="A name of --list, e.g. text/s1_xxs, or a YAML file.", autocompletion=_recipes_like
    ),
    overrides: list[str] = typer.Argument(
        None, help="key=value pairs, e.g. model.hidden_size=256.", autocompletion=_keys_like
    ),
    show_list: bool = typer.Option(
        False, "--list", is_eager=True, callback=_list_recipes, help="Show the recipes that come with this, and stop."
    ),
    explained: str | None = typer.Option(
        None, "--explain", metavar="KEY", is_eager=True, callback=_explain, help="Say what a key, or 'all', means."
    ),
    print_config: bool = typer.Option(False, "--print-config", help="Print the resolved recipe and stop."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Build everything, check data and layout, take no step."),
    profile: int = typer.Option(0, help="Trace this many steps (torch profiler) into OUTPUT_DIR/trace."),
) -> None:
    """Pretrain an EBT or its baseline.

    The run goes on from its newest checkpoint, if there is one; SIGTERM and Ctrl-C save and stop.
    """

    def work() -> None:
        asked = [f"training.profile_steps={profile}"] if profile else []
        resolved = load_recipe(recipe, [*(overrides or []), *asked])
        if print_config:
            print(to_yaml(resolved), end="")
            return
        quiet_libraries()
        from ebt_megatron.parallel.setup import shutdown
        from ebt_megatron.training.hooks import train_to_end
        from ebt_megatron.training.metrics import require_writers
        from ebt_megatron.training.run import Run, StoppedRun

        require_writers(resolved.training.metrics)
        run = Run(resolved)
        if dry_run:
            run.say(f"{resolved.name}: recipe, data and layout fit; nothing was trained")
        else:
            try:
                train_to_end(run)
            except StoppedRun as error:
                run.say(f"stopped: {error}", "red")
                sys.exit(3)
        shutdown()

    guarded(work)


if __name__ == "__main__":
    app()
