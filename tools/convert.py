"""Models out of runs, weights into them: `ebt-convert export RUN FOLDER`, `ebt-convert import IN.safetensors`.

What is written is plain: every weight whole, whatever layout the run has, with its recipe as metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ebt_megatron.config import RecipeError, load_recipe, to_yaml
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole

app = typer.Typer(help=__doc__, no_args_is_help=True)

_ONE_PROCESS = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence_parallel=false",
    "parallel.distributed_optimizer=false",
]


def export_weights(source: Path, output: Path) -> tuple[Path, int]:
    """Write a checkpoint's weights as one safetensors file.

    Args:
        source: a run's folder (its newest good checkpoint is taken), or a checkpoint's.
        output: the file to write.

    Returns:
        The checkpoint's folder, and how many weights (numbers) were written.

    Raises:
        RecipeError: if there is no good checkpoint, or no recipe beside it.
    """
    from ebt_megatron.checkpoint.weights import write_weights
    from ebt_megatron.sharing.export import Saved

    saved = Saved.read(source)
    write_weights(output, saved.weights, to_yaml(saved.recipe), saved.fingerprint, saved.step)
    return saved.checkpoint, sum(w.numel() for w in saved.weights.values())


def latent_scale(encoder: dict[str, Any]) -> float | None:
    """What latents were multiplied by, of a manifest's encoder; None: normalised by statistics."""
    first = encoder["std"][0]
    constant = not any(encoder["mean"]) and all(std == first for std in encoder["std"])
    return float(f"{1 / first:.6g}") if constant else None


def import_weights(source: Path, recipe: Path, output: Path, overrides: list[str]) -> None:
    """Make a run that starts, at step 0 with a fresh optimizer, from a file's weights.

    Args:
        source: a file from `export_weights` or `ebt_megatron.tools.import_ebt_checkpoint`.
        recipe: of the new run; its data says which tokenizer is used.
        output: the new run's folder, whatever the recipe says.
        overrides: key=value pairs.

    Raises:
        RecipeError: if the weights are not of the recipe's model, or the folder has checkpoints already, or a run
            is using it.
    """
    if list((output / "checkpoints").glob("step-????????")):
        raise RecipeError(f"{output} holds checkpoints already: choose another --output")
    overrides = [*overrides, f"training.output_dir={output}"]
    resolved = load_recipe(recipe, overrides)
    from ebt_megatron.checkpoint.checkpoints import fingerprint
    from ebt_megatron.checkpoint.weights import check_fingerprint, read_weights, set_weights
    from ebt_megatron.training.lock import RunLock
    from ebt_megatron.training.run import Run

    weights, metadata = read_weights(source)
    # A checkpoint fits every layout, so one process writes it; the run keeps the recipe's layout.
    run = Run(load_recipe(recipe, [*overrides, *_ONE_PROCESS]))
    manifest = run.train_data.sources[0].manifest
    needed = fingerprint(resolved, run.session.task.identity) | {"vocab_size": manifest.vocab_size}
    if manifest.encoder:
        needed["latent_scale"] = latent_scale(manifest.encoder) or "none (the train split's statistics)"
    check_fingerprint(source, metadata, needed)
    set_weights(source, run.trainer.model, weights)
    lock = RunLock(output)
    try:
        lock.acquire()
        if error := run.write_checkpoint(None) or run.checkpoints.wait():
            raise RecipeError(f"{output}: no checkpoint could be written: {error}")
        write_whole(output / "recipe.yaml", to_yaml(resolved))
    finally:
        lock.release()


@app.command("export")
def export_command(
    source: Path = typer.Argument(..., help="A training.output_dir, or one of its checkpoints/step-NNNNNNNN."),
    output: Path = typer.Argument(..., help="The folder to write, or a file NAME.safetensors of the weights alone."),
    push: str | None = typer.Option(None, help="Also upload the folder to the Hub as USER/MODEL, private."),
) -> None:
    """Write a run's model as a folder that others can use: weights, config, tokenizer or encoder, model card."""

    def work() -> None:
        quiet_libraries()
        from ebt_megatron.parallel.setup import shutdown

        console = Console(soft_wrap=True, highlight=False)
        if output.suffix == ".safetensors":
            if push:
                raise RecipeError(f"--push uploads a folder, {output} is a file: give a folder")
            folder, count = export_weights(source, output)
            console.print(f"{folder}: {count:,} weights written to {output}")
        else:
            from ebt_megatron.sharing.export import export_folder
            from ebt_megatron.sharing.hub import push_to_hub

            saved = export_folder(source, output)
            console.print(f"{saved.checkpoint}: model of {saved.step:,} steps written to {output}")
            if push:
                console.print(f"uploaded to {push_to_hub(output, push)}")
        shutdown()

    guarded(work)


@app.command("import")
def import_command(
    source: Path = typer.Argument(..., help="A safetensors file."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. data.train=[data/text/train]."),
    recipe: Path = typer.Option(..., help="The recipe of the new run: a name or a YAML file."),
    output: Path = typer.Option(..., help="The new run's folder."),
) -> None:
    """Make a run that starts from a file's weights, at step 0 with a fresh optimizer."""

    def work() -> None:
        quiet_libraries()
        from ebt_megatron.parallel.setup import shutdown

        import_weights(source, recipe, output, overrides or [])
        Console(soft_wrap=True, highlight=False).print(
            f"{output} starts from {source}: train {recipe} with training.output_dir={output}, or evaluate {output}"
        )
        shutdown()

    guarded(work)


if __name__ == "__main__":
    app()
