"""Benchmark whole training steps: dual stream, double backward (the public code's way), Transformer++.

Every variant runs in a process of its own: once with fresh memory to read the peak, then once a
round to time a step after one to warm up. Rounds go over all variants, so that a machine that gets slower or
faster meanwhile does so for all. All numbers of a table come from one run on one machine.

    python -m benchmarks.step                       # the tables of docs/performance.md
    python -m benchmarks.step --case long --repeats 3
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import machine

if TYPE_CHECKING:
    from ebt_megatron.config import Recipe
    from ebt_megatron.tasks.interface import Task

CASES: dict[str, dict[str, Any]] = {
    "xxs": {
        "title": "xxs-like: 6 layers, width 384, V = 50,304, S = 256",
        "width": 50304,
        "overrides": [
            "model.size=xxs",
            "data.sequence_length=256",
            "training.micro_batch_size=4",
            "training.global_batch_size=4",
        ],
    },
    "long": {
        "title": "8 layers, width 512, V = 8,192, S = 1,024",
        "width": 8192,
        "overrides": [
            "model.num_layers=8",
            "model.hidden_size=512",
            "model.num_attention_heads=8",
            "optimizer.lr=1e-3",
            "data.sequence_length=1024",
            "training.micro_batch_size=1",
            "training.global_batch_size=1",
        ],
    },
    "images": {
        "title": "pictures: 6 layers, width 384, 256 patches of 16 numbers (Transformer++: a DiT)",
        "width": 16,
        "overrides": [
            "data.modality=images",
            "model.size=xxs",
            "model.conditioning=none",
            "thinking.initial=observed",
            "data.sequence_length=256",
            "training.micro_batch_size=8",
            "training.global_batch_size=8",
        ],
        "variants": ["Transformer++", "dual stream", "dual stream, reuse", "dual stream, 8 steps", "double backward"],
    },
}

VARIANTS: dict[str, dict[str, Any]] = {
    "Transformer++": {"overrides": ["model.architecture=baseline"]},
    "dual stream": {"overrides": []},
    "dual stream, reuse": {"overrides": ["thinking.reuse=true"]},
    "dual stream, reuse, one of two losses drawn": {"overrides": ["thinking.reuse=true", "thinking.learned_steps=1"]},
    "dual stream, reuse, one step from the context": {
        "overrides": [
            "thinking.reuse=true",
            "thinking.initial=context",
            "thinking.step_rule=mirror_descent",
            "thinking.min_steps=1",
            "thinking.max_steps=1",
        ]
    },
    "dual stream, logits in bf16": {"overrides": ["thinking.logits_dtype=bfloat16"]},
    "dual stream, regenerated logits": {"overrides": ["thinking.regenerate=256"]},
    "dual stream, 8 steps": {
        "overrides": ["thinking.min_steps=8", "thinking.max_steps=8"],
        "memory_only": True,
    },
    "dual stream, 2S": {"overrides": [], "double_length": True, "memory_only": True},
    "double backward": {"overrides": ["thinking.engine=double_backward"]},
}


def _peak_rss() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _task(recipe: Recipe, width: int) -> Task:
    """A task of text with `width` entries in its vocabulary, or of square pictures of `width` channels a patch."""
    from ebt_megatron.tasks.images import Images
    from ebt_megatron.tasks.text import Text

    if recipe.data.modality == "images":
        return Images(recipe, [recipe.data.sequence_length, width])
    return Text(recipe, width)


def training_step(recipe: Recipe, width: int) -> Callable[[int], float]:
    """A function of a seed that does forward and backward of one micro-batch of random data; it returns the loss.

    Args:
        recipe: of text or pictures.
        width: of a position: the vocabulary, or the numbers of a patch.
    """
    import torch

    from ebt_megatron.core.timing import Timers
    from ebt_megatron.data.loader import MicroBatch
    from ebt_megatron.objectives import build_objective
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.tasks.build import build_model

    state = initialize(recipe.parallel, recipe.training.seed)
    task = _task(recipe, width)
    model = build_model(recipe, task).to(state.device)
    objective = build_objective(model, recipe, task, state, Timers())
    batch, length = recipe.training.micro_batch_size, recipe.data.sequence_length

    def step(seed: int) -> float:
        for p in model.parameters():
            if p.grad is not None:  # in place: a CUDA graph writes where it was recorded
                p.grad.zero_()
        generator, ids = torch.Generator().manual_seed(seed), torch.arange(batch) + seed * batch
        if task.kind == "images":
            data = MicroBatch(ids, torch.randn(batch, length, width, generator=generator))
        else:
            data = MicroBatch(ids, torch.randint(width, (batch, length + 1), generator=generator))
        return float(objective.train_batch([data], seed).loss)  # float: the device is done

    return step


def draws(recipe: Recipe) -> list[tuple[float, int]]:
    """Steps that stand for all that training draws, as (probability, seed)."""
    from ebt_megatron.thinking.plan import Plan

    distribution = Plan.distribution(recipe.thinking)
    wanted, seed_of = {plan.steps for _, plan in distribution}, dict[int, int]()
    for seed in itertools.count():
        seed_of.setdefault(Plan.draw(recipe.thinking, recipe.training.seed, seed).steps, seed)
        if seed_of.keys() >= wanted:
            break
    return [(chance, seed_of[plan.steps]) for chance, plan in distribution]


def least_flops(recipe: Recipe, width: int) -> float:
    """Count what a first-order method needs at least for one micro-batch, in the mean over what training draws."""
    from ebt_megatron.objectives.flops import minimum_flops

    return recipe.training.micro_batch_size * minimum_flops(recipe, _task(recipe, width).cost())


class _Untracked(nullcontext):
    """Modules are not told apart."""

    parents = frozenset({"Global"})


def counted_flops(step: Callable[[int], float], seed: int = 0) -> int:
    """FLOPs of the matrix products of a step, as torch counts them while it runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def product(_: Any, a: Any, b: Any, **kwargs: Any) -> int:  # shapes of a product added in place
        return 2 * math.prod(a) * b[-1]

    aten = torch.ops.aten
    in_place = {aten.addmm_: product, aten.baddbmm_: product}  # torch counts their other forms only
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]  # its hooks do not bear gradients to an input alone
    with counter:
        step(seed)
    return counter.get_total_flops()


def median_seconds(step: Callable[[int], float], seeds: Iterable[int]) -> float:
    """Return the median time of steps with these seeds, after those that were run before."""
    seconds = []
    for seed in seeds:
        begin = time.perf_counter()
        step(seed)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


def _child(case: str, variant: str, timed: bool) -> dict[str, Any]:
    """Measure one variant in this process: memory of the first step, or time of the one after it."""
    import torch

    from ebt_megatron.config import load_recipe

    chosen = VARIANTS[variant]
    recipe = load_recipe(None, CASES[case]["overrides"] + chosen["overrides"])
    if chosen.get("double_length"):
        recipe.data.sequence_length *= 2
    width = CASES[case]["width"]
    step = training_step(recipe, width)
    out: dict[str, Any] = {"tokens": recipe.training.micro_batch_size * recipe.data.sequence_length}
    if not timed:
        if torch.cuda.is_available():
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(0)
            out["memory"] = torch.cuda.max_memory_allocated() - base
        else:
            Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
            base = _peak_rss()
            step(0)
            out["memory"] = _peak_rss() - base
        return out
    drawn = draws(recipe)
    out["flops"] = sum(chance * counted_flops(step, seed) for chance, seed in drawn)
    out["seconds"] = sum(chance * median_seconds(step, [seed]) for chance, seed in drawn)
    out["minimum_flops"] = least_flops(recipe, width)
    return out


def _spawn(case: str, variant: str, timed: bool, threads: int) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if not timed:  # freed memory goes back at once, so that the peak is what was in use
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.step",
        "--child",
        json.dumps([case, variant, timed]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant} on {case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _table(case: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=CASES[case]["title"], title_justify="left")
    for column in (
        "variant",
        "s / step",
        "tokens/s",
        "step memory MB",
        "TFLOP",
        "of minimum",
        "time vs double backward",
        "memory vs double backward",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    reference = rows.get("double backward", {})
    for variant, row in rows.items():
        seconds, memory = row.get("seconds"), row["memory"]
        table.add_row(
            variant,
            f"{seconds:.2f}" if seconds else "-",
            f"{row['tokens'] / seconds:,.0f}" if seconds else "-",
            f"{memory / 1e6:,.0f}",
            f"{row['flops'] / 1e12:.3f}" if seconds else "-",
            f"{row['flops'] / row['minimum_flops']:.2f}" if seconds else "-",
            f"{reference['seconds'] / seconds:.2f}x faster" if seconds and reference else "-",
            f"{memory / reference['memory']:.2f}" if reference else "-",
        )
    return table


def main(
    case: list[str] = typer.Option(list(CASES), help="Which sizes: " + ", ".join(CASES)),
    variant: list[str] = typer.Option(list(VARIANTS), help="Which variants: " + "; ".join(VARIANTS)),
    repeats: int = typer.Option(3, min=1, help="Rounds, of one timed step a variant; the median counts."),
    threads: int = typer.Option(os.cpu_count() or 1, help="CPU threads."),
    output: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
    child: str | None = typer.Option(None, hidden=True),
) -> None:
    """Time, memory and FLOPs of one training step (forward and backward of one micro-batch)."""
    if child:
        print(json.dumps(_child(*json.loads(child))))
        return
    console, facts, cases = Console(width=140), machine(), {}
    console.print(f"{facts}, {threads} threads")
    for name in case:
        rows: dict[str, dict[str, Any]] = {}
        variants = [v for v in variant if v in CASES[name].get("variants", VARIANTS)]
        rounds = [v for v in variants if not VARIANTS[v].get("memory_only")] * repeats
        seconds: dict[str, list[float]] = {v: [] for v in rounds}
        for i, v in enumerate(track([*variants, *rounds], description=name, console=console, transient=True)):
            timed = i >= len(variants)
            rows[v] = rows.get(v, {}) | _spawn(name, v, timed, threads)
            if timed:
                seconds[v].append(rows[v]["seconds"])
        for v, measured in seconds.items():
            rows[v] |= {"seconds": sorted(measured)[len(measured) // 2], "rounds": measured}
        console.print(_table(name, rows))
        cases[name] = rows
        for v, what in (("dual stream, 8 steps", "8 steps / 2 steps"), ("dual stream, 2S", "2S / S")):
            if {"dual stream", v} <= set(rows):
                console.print(f"memory, {what}: {rows[v]['memory'] / rows['dual stream']['memory']:.3f}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps({"machine": facts, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
