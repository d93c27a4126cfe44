"""Benchmark generation: the time of a new token against the prefix, the candidates, and Transformer++.

Weights and tokens are random: the time depends on neither. Every number is the median over rounds, which go over all
measurements, so that a machine that gets slower or faster meanwhile does so for all.

    python -m benchmarks.inference             # three sizes
    python -m benchmarks.inference --size tiny --rounds 2
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ebt_megatron.core.machine import machine

if TYPE_CHECKING:
    from ebt_megatron.inference.predictor import Predictor

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"title": "tiny: 2 layers, width 96, V = 1,024", "vocab": 1024, "overrides": ["model.size=tiny"]},
    "xxs": {"title": "xxs: 6 layers, width 384, V = 50,304", "vocab": 50304, "overrides": ["model.size=xxs"]},
    "grouped": {
        "title": "xxs with 2 key groups for its 6 heads",
        "vocab": 50304,
        "overrides": ["model.size=xxs", "model.num_query_groups=2"],
    },
    "wide": {
        "title": "8 layers, width 1,024, 4 key groups for 16 heads, V = 50,304",
        "vocab": 50304,
        "overrides": [
            "model.num_layers=8",
            "model.hidden_size=1024",
            "model.num_attention_heads=16",
            "model.num_query_groups=4",
            "optimizer.lr=1e-3",
        ],
    },
}
# Name -> architecture, prefix, candidates.
MEASURED = {
    "EBT, prefix 128": ("ebt", 128, 1),
    "EBT, prefix 1,024": ("ebt", 1024, 1),
    "EBT, prefix 2,048": ("ebt", 2048, 1),
    "EBT, prefix 1,024, 8 candidates": ("ebt", 1024, 8),
    "Transformer++, prefix 128": ("baseline", 128, 1),
    "Transformer++, prefix 1,024": ("baseline", 1024, 1),
    "Transformer++, prefix 2,048": ("baseline", 2048, 1),
}
# What is divided by what, and the most it may be.
RATIOS = (
    ("EBT, prefix 2,048", "EBT, prefix 128", 1.3),
    ("EBT, prefix 1,024, 8 candidates", "EBT, prefix 1,024", 4.0),
    ("EBT, prefix 1,024", "Transformer++, prefix 1,024", 6.0),
)


def build(size: str, architecture: str, candidates: int, steps: int) -> Predictor:
    """A model of random weights, ready to generate."""
    import torch

    from ebt_megatron.config import load_recipe
    from ebt_megatron.inference.options import ThinkingOptions
    from ebt_megatron.inference.predictor import build_predictor
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.tasks.build import build_model
    from ebt_megatron.tasks.text import Text

    case = SIZES[size]
    recipe = load_recipe(
        None,
        [
            *case["overrides"],
            "data.sequence_length=4096",
            f"model.architecture={architecture}",
            "training.micro_batch_size=1",
            "training.global_batch_size=1",
        ],
    )
    state, task = initialize(recipe.parallel, 1), Text(recipe, case["vocab"])
    model = build_model(recipe, task).to(state.device, torch.bfloat16 if state.device.type == "cuda" else torch.float32)
    options = ThinkingOptions(steps=steps, candidates=candidates) if architecture == "ebt" else ThinkingOptions()
    return build_predictor(model, recipe, task, state, options)


class Decoding:
    """One text that grows by a token at a time, from a prefix."""

    def __init__(self, predictor: Predictor, prefix: int, tokens: int):
        import torch

        from ebt_megatron.inference.reader import chunks
        from ebt_megatron.inference.sampling import Sampling

        self.predictor, self.at, self.sampling = predictor, prefix, Sampling()
        self.context = predictor.context(1, prefix + tokens, 256)
        self.zero = torch.zeros(1, dtype=torch.int64, device=predictor.device)
        text = torch.randint(predictor.vocab_size, (1, prefix), generator=torch.Generator().manual_seed(1)).tolist()
        for rows, positions, values in chunks(text, 256, predictor.device):
            nothing = torch.zeros_like(rows, dtype=torch.bool)
            predictor(self.context, rows, positions, values, nothing, self.zero)

    def token(self) -> tuple[float, float]:
        """Read a token, predict the next and draw it: seconds and FLOPs."""
        begin = time.perf_counter()
        done = self.predictor(self.context, self.zero, self.zero + self.at, self.zero, self.zero == 0, self.zero)
        self.sampling.draw(done.log_p, self.zero, self.zero + self.at).item()  # the device is done
        self.at += 1
        return time.perf_counter() - begin, done.flops


def measure(size: str, steps: int, rounds: int) -> dict[str, Any]:
    """Median seconds, seconds of every round, and FLOPs of each of MEASURED; and the RATIOS of medians."""
    predictors: dict[tuple[str, int], Predictor] = {}
    texts: dict[str, Decoding] = {}
    for name, (architecture, prefix, candidates) in track(MEASURED.items(), "reading prefixes", transient=True):
        if (architecture, candidates) not in predictors:
            predictors[architecture, candidates] = build(size, architecture, candidates, steps)
        texts[name] = Decoding(predictors[architecture, candidates], prefix, rounds + 1)
    rows: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in texts}
    for i in track(range(rounds + 1), "tokens", transient=True):
        for name, text in texts.items():
            taken, rows[name]["flops"] = text.token()
            if i:  # the first warms up
                rows[name]["rounds"].append(taken)
    for row in rows.values():
        row["seconds"] = statistics.median(row["rounds"])
    ratios = {f"{a} / {b}": (rows[a]["seconds"] / rows[b]["seconds"], most) for a, b, most in RATIOS}
    return {"tokens": rows, "ratios": ratios}


def main(
    size: list[str] = typer.Option(["xxs", "grouped", "wide"], help="Which sizes: " + ", ".join(SIZES)),
    steps: int = typer.Option(3, min=1, help="Thinking steps."),
    rounds: int = typer.Option(20, min=1, help="Rounds of one token each; the median counts."),
    threads: int = typer.Option(os.cpu_count() or 1, help="CPU threads."),
    output: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
) -> None:
    """Time and FLOPs of a new token: an EBT's against the prefix and the candidates, and Transformer++'s."""
    import torch

    torch.set_num_threads(threads)
    console, facts, found = Console(width=140), machine(), {}
    console.print(f"{facts}, {threads} threads, {steps} steps")
    for name in size:
        found[name] = measure(name, steps, rounds)
        table = Table("a new token", "ms", "GFLOP", title=SIZES[name]["title"], title_justify="left")
        for what, row in found[name]["tokens"].items():
            table.add_row(what, f"{1e3 * row['seconds']:.1f}", f"{row['flops'] / 1e9:.3f}")
        console.print(table)
        for what, (ratio, most) in found[name]["ratios"].items():
            console.print(f"{what}: {ratio:.2f} (at most {most:g})", style="" if ratio <= most else "red")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": facts, "steps": steps, "threads": threads, "sizes": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
