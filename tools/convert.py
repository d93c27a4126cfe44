"""Weights out of and into runs: `ebt-convert export RUN OUT.safetensors`, `ebt-convert import IN.safetensors`.

What is written is plain: every weight whole, whatever layout the run has, with its recipe as metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ebt_megatron.config import ParallelConfig, RecipeError, load_recipe, to_yaml
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

_ONE_PROCESS = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence_parallel=false",
    "parallel.distributed_optimizer=false",
]


def export_weights(source: Path, output: Path) -> tuple[Path, int]:
    """Write a checkpoint's weights as safetensors.

    Args:
        source: a run's folder (its newest good checkpoint is taken), or a checkpoint's.
        output: the file to write.

    Returns:
        The checkpoint's folder, and how many weights (numbers) were written.

    Raises:
        RecipeError: if there is no good checkpoint, or no recipe beside it.
    """
    from megatron.core import dist_checkpointing

    from ebt_megatron.checkpoint.checkpoints import Checkpoints
    from ebt_megatron.checkpoint.history import CheckpointError, verify
    from ebt_megatron.checkpoint.weights import checkpoint_weights, write_weights
    from ebt_megatron.parallel.setup import initialize

    source = source.resolve()
    is_checkpoint = (source / "checksums.json").exists()
    run = source.parents[1] if is_checkpoint else source
    if not (run / "checkpoints").is_dir() or not (run / "recipe.yaml").exists():
        raise RecipeError(f"{source} is neither a run (recipe.yaml, checkpoints/) nor a checkpoint inside one")
    initialize(ParallelConfig(), seed=0)
    if is_checkpoint:
        try:
            verify(source)
        except CheckpointError as error:
            raise RecipeError(f"damaged checkpoint: {error}") from None
        folder = source
    else:
        newest = Checkpoints(run / "checkpoints", 1, {}).newest_good()
        if newest is None:
            raise RecipeError(f"{run} holds no good checkpoint: train it first")
        folder = newest
    common = dist_checkpointing.load_common_state_dict(str(folder))
    weights = checkpoint_weights(folder)
    recipe = to_yaml(load_recipe(run / "recipe.yaml"))
    write_weights(output, weights, recipe, common["fingerprint"], common["step"])
    return folder, sum(w.numel() for w in weights.values())


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
    output: Path = typer.Argument(..., help="The safetensors file to write."),
) -> None:
    """Write a run's weights as one safetensors file."""

    def work() -> None:
        quiet_libraries()
        from ebt_megatron.parallel.setup import shutdown

        folder, count = export_weights(source, output)
        Console(soft_wrap=True, highlight=False).print(f"{folder}: {count:,} weights written to {output}")
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
