"""The model card of an exported folder: README.md, with the YAML header that the Hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ebt_megatron.config import Recipe, to_yaml
from ebt_megatron.core.records import record_of
from ebt_megatron.data.manifest import Manifest
from ebt_megatron.evaluation.figures import of_a_run, png_of
from ebt_megatron.evaluation.run_files import RunFiles, metrics_of

FIGURE = "losses.png"
_USE = {
    "text": 'print(model.generate("Return the", max_tokens=32).text)',
    "video": "clip = model.rollout(frames, 4)  # uint8 [frames, height, width, 3], and four frames more",
}


def _use(recipe: Recipe, manifest: Manifest) -> str:
    """A line of Python that does what the model is for."""
    if manifest.kind != "images":
        return _USE.get(manifest.kind, "model.run  # a modality of its own: see its task")
    if recipe.model.architecture == "ebt" and recipe.thinking.initial == "observed":
        return (
            "pictures = model.denoise(pictures, level=100)  # uint8 [pictures, height, width, 3]; noised, then denoised"
        )
    told = '["a caption"]' if recipe.images.captions else "[0, 1, 2]" if recipe.images.classes else "4"
    return f"pictures = model.make({told})  # uint8 [pictures, height, width, 3]"


def _losses(evaluation: dict[str, Any]) -> list[str]:
    """A table of the loss at every number of steps, as `ebt-evaluate` wrote it."""
    rows = evaluation["thinking"]
    names = [n for n in ("loss", "perplexity", "psnr", "energy", "accuracy") if rows[0].get(n) is not None]
    lines = [f"| steps | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for row in rows:
        values = ("" if row.get(n) is None else f"{row[n]:.4g}" for n in names)
        mark = " (trained with)" if row["steps"] == evaluation["trained_steps"] and len(rows) > 1 else ""
        lines.append(f"| {row['steps']}{mark} | {' | '.join(values)} |")
    return lines


def evaluated(run: Path, step: int) -> dict[str, Any]:
    """What `ebt-evaluate` said of a run at a step, or {}."""
    path = run / "evaluation.json"
    evaluation = record_of(path) if path.exists() else {}
    return evaluation if evaluation.get("step") == step else {}


def figure(run: Path, recipe: Recipe, step: int) -> bytes:
    """The card's figure, a PNG: losses in training up to a step, and against thinking; b"" where nothing was logged."""
    rows = metrics_of(run) if (run / "metrics.jsonl").exists() else []
    rows = [row for row in rows if row["step"] <= step]
    if not rows:
        return b""
    thinks = recipe.model.architecture == "ebt"
    evaluation = {"architecture": recipe.model.architecture} | (evaluated(run, step) if thinks else {})
    return png_of(of_a_run(RunFiles(recipe.name, run, rows, evaluation, {})))


def model_card(run: Path, recipe: Recipe, manifest: Manifest, step: int, tokens: int, shows: bool) -> str:
    """The card as Markdown.

    Args:
        run: the run's folder: its evaluation.json is read, if there is one.
        recipe: without paths.
        manifest: of its data.
        step, tokens: how far it was trained.
        shows: whether the folder has the figure, as `FIGURE`.
    """
    ebt = recipe.model.architecture == "ebt"
    kind = "An Energy-Based Transformer" if ebt else "A Transformer++" if manifest.kind != "images" else "A DiT"
    text = manifest.kind == "text"
    header: dict[str, Any] = {
        "library_name": "ebt-megatron" if ebt or not text else "transformers",
        "tags": ["ebt-megatron", *(["energy-based-transformer"] if ebt else []), manifest.kind],
    }
    if text:
        header["pipeline_tag"] = "text-generation"
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {recipe.name}", ""]
    counted = "tokens" if text else "positions"
    lines.append(
        f"{kind} ([arXiv 2507.02092](https://arxiv.org/abs/2507.02092)) of {recipe.model.num_layers} layers, width "
        f"{recipe.model.hidden_size}, for {manifest.kind}; trained by EBT-Megatron for {step:,} steps on "
        f"{tokens:,} {counted}."
    )
    lines += ["", "## Use", "", "```python", "import ebt_megatron as ebt", "", 'model = ebt.load("this folder")']
    lines += [_use(recipe, manifest), "```"]
    if text:
        lines += ["", "With transformers:", "", "```python"]
        lines += ["import ebt_megatron.hf  # registers the architecture"] if ebt else []
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this folder")',
            "```",
        ]
    lines += ["", "## Data", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in manifest.provenance.items()]
    lines += ["", "## Losses", ""]
    if shows:
        lines += [f"![Losses of {recipe.name} in training, and against thinking]({FIGURE})", ""]
    evaluation = evaluated(run, step)
    if evaluation:
        lines += [f"On {evaluation['positions']:,} held-out positions, by `ebt-evaluate`.", "", *_losses(evaluation)]
    else:
        lines.append("Not evaluated at this step: `ebt-evaluate RUN`, then export again.")
    lines += ["", "## Recipe", "", "```yaml", to_yaml(recipe).strip(), "```", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())
