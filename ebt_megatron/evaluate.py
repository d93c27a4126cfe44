"""Evaluate a run: `python -m ebt_megatron.evaluate RUN_DIR`, alone or under torchrun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.cli import guarded, quiet_libraries
from ebt_megatron.config import Recipe, RecipeError, load_recipe

app = typer.Typer(add_completion=False)


def evaluate(recipe: Recipe, run_dir: Path, steps: int | None, example: bool) -> dict[str, Any]:
    """Validation loss, perplexity, energy, and what the most likely token does, at every number of thinking steps.

    Args:
        recipe: the run's, possibly with another layout.
        run_dir: holds checkpoints/.
        steps: the most thinking steps; default: twice those trained with.
        example: also work out one token (one process only).

    Raises:
        RecipeError: if the run has no checkpoint.
    """
    from tokenizers import Tokenizer

    from ebt_megatron.data.loader import Loader
    from ebt_megatron.evaluation.example import worked_example
    from ebt_megatron.evaluation.perplexity import perplexity, validate
    from ebt_megatron.model.build import SampleShape, build_model
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.training.checkpoint import Checkpoints
    from ebt_megatron.training.loop import fingerprint
    from ebt_megatron.training.metrics import Timers
    from ebt_megatron.training.objective import build_objective

    state = initialize(recipe.parallel, recipe.training.seed)
    data = Loader(recipe, "validation", state.data_rank, state.data_size)
    manifest = data.sources[0].manifest
    model = build_model(recipe, SampleShape(vocab_size=manifest.vocab_size)).to(state.device)
    checkpoints = Checkpoints(run_dir / "checkpoints", 1, fingerprint(recipe, manifest.tokenizer["sha256"]))
    newest = checkpoints.newest_good()
    if newest is None:
        raise RecipeError(f"{run_dir} holds no good checkpoint: train it first")
    step, extra, _ = checkpoints.load(newest, model)
    objective = build_objective(model, recipe, state, Timers())
    thinks = recipe.model.architecture == "ebt"
    trained = recipe.thinking.max_steps if thinks else 1
    most = (steps or 2 * trained) if thinks else 1
    result = validate(objective, data, most, manifest.vocab_size, state.data_group, state.pipeline_group)
    rows = [
        {
            "steps": i + 1,
            "loss": result.losses[i].item(),
            "perplexity": perplexity(result.losses[i].item()),
            "energy": result.energies[i].item() if thinks else None,
            "accuracy": result.right[i].item() if thinks else None,
            "changed": result.changed[i].item() if thinks and i else None,
        }
        for i in range(most)
    ]
    out: dict[str, Any] = {
        "name": recipe.name, "architecture": recipe.model.architecture, "step": step, "tokens": extra["tokens"],
        "positions": result.positions, "trained_steps": trained, "unigram_entropy": result.unigram_entropy(),
        "thinking": rows,
    }  # fmt: skip
    if thinks and example and state.world_size == 1:
        source = data.sources[0]
        tokenizer = Tokenizer.from_file(str(source.sidecar()))
        out["example"] = worked_example(objective, next(iter(data)), most, tokenizer)
    return out


@app.command()
def main(
    run_dir: Path = typer.Argument(..., help="A training.output_dir."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. training.validation_samples=1024."),
    steps: int | None = typer.Option(None, help="The most thinking steps; default: twice those trained with."),
    output: Path | None = typer.Option(None, help="Where to write; default: RUN_DIR/evaluation.json."),
    example: bool = typer.Option(True, help="Work out one token, too."),
) -> None:
    """Write validation loss, perplexity, energy and accuracy against thinking steps as JSON.

    The layout of the evaluation is its own: one process unless started by torchrun with
    parallel.* overrides.
    """

    def work() -> None:
        saved = run_dir / "recipe.yaml"
        if not saved.exists():
            raise RecipeError(f"{run_dir} is not a run directory: recipe.yaml is missing")
        layout = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false",
                  "parallel.distributed_optimizer=false", "training.cuda_graphs=false"]  # fmt: skip
        recipe = load_recipe(saved, layout + (overrides or []))
        quiet_libraries()
        import torch.distributed as dist

        from ebt_megatron.parallel.setup import shutdown

        target = output or run_dir / "evaluation.json"
        if not target.absolute().parent.is_dir():
            raise RecipeError(f"--output {target}: {target.parent} is not a folder")
        result = evaluate(recipe, run_dir, steps, example)
        if dist.get_rank() == 0:
            target.write_text(json.dumps(result, indent=1) + "\n")
            for row in result["thinking"]:
                changed = "" if row["changed"] is None else f", most likely token changed {100 * row['changed']:.1f} %"
                print(f"{row['steps']:>3} steps: loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}{changed}")
            print(f"unigram entropy of the targets {result['unigram_entropy']:.4f}")
        shutdown()

    guarded(work)


if __name__ == "__main__":
    app()
