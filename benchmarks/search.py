"""Does the order that `ebt-plan --search` predicts for layouts agree with measured steps of 2 and 4 processes here?

    python -m benchmarks.search                    # writes benchmarks/results/search-DATE.md and .json
    python -m benchmarks.search --rounds 5 --processes 2 --output /tmp

Every layout trains steps of a small S1 over gloo, in rounds over all layouts, so that a machine that gets slower or
faster meanwhile does so for all. The same layouts are simulated, and their time predicted by rates that are measured in
the same run. Time is told in two ways: on the clock, and of the processor, which other programs do not lengthen and
which has no waiting in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track
from scipy.stats import kendalltau, spearmanr

from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import machine
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.tasks.text import Text
from ebt_megatron.tools.hardware import Hardware
from ebt_megatron.tools.simulation import Simulator
from ebt_megatron.tools.step_time import step_time

VOCAB, WIDTH = 512, 128
TENSOR, PIPELINE = ("parallel.tensor=2", "parallel.sequence_parallel=true"), ("parallel.pipeline=2",)
LAYOUTS: dict[int, dict[str, Sequence[str]]] = {
    2: {"DP 2": (), "TP 2": TENSOR, "PP 2": PIPELINE},
    4: {
        "DP 4": (),
        "TP 2 x DP 2": TENSOR,
        "PP 2 x DP 2": PIPELINE,
        "TP 2 x PP 2": (*TENSOR, *PIPELINE),
        "PP 4": ("parallel.pipeline=4",),
    },
}
REUSE, RECOMPUTE = "thinking.reuse=true", "model.recompute_layers=true"
VARIANTS: dict[int, dict[str, Sequence[str]]] = {
    2: {
        **{f"micro-batches of {n}": (f"training.micro_batch_size={n}",) for n in (1, 2, 4)},
        "of 2, reuse": ("training.micro_batch_size=2", REUSE),
        "of 2, recomputed": ("training.micro_batch_size=2", RECOMPUTE),
    },
    4: {
        **{f"micro-batches of {n}": (f"training.micro_batch_size={n}",) for n in (1, 2)},
        "of 2, reuse": ("training.micro_batch_size=2", REUSE),
    },
}
RESULTS = Path("benchmarks/results")


def recipe_of(overrides: Sequence[str]) -> Recipe:
    """A small S1 with 8 samples a step."""
    return load_recipe(
        None,
        [
            "model.num_layers=4",
            f"model.hidden_size={WIDTH}",
            "model.num_attention_heads=4",
            "model.kernels=torch",
            "optimizer.lr=1e-3",
            "thinking.max_steps=2",
            "thinking.min_steps=2",
            "data.sequence_length=64",
            "training.global_batch_size=8",
            *overrides,
        ],
    )


def recipes(ranks: int) -> dict[str, Recipe]:
    """What is compared on so many ranks, by name."""
    return {
        f"{layout}, {variant}": recipe_of((*its, *more))
        for layout, its in LAYOUTS[ranks].items()
        for variant, more in VARIANTS[ranks].items()
    }


# --- measured, on ranks ---------------------------------------------------------------------------


def _per_call(work: Callable[[], Any], clock: Callable[[], float], calls: int) -> float:
    """Seconds of a call, the median of five times so many."""
    times = []
    for _ in range(5):
        begin = clock()
        for _ in range(calls):
            work()
        times.append((clock() - begin) / calls)
    return statistics.median(times)


def _rates() -> dict[str, float]:
    """This machine's, as `Hardware`'s figures; computing by the processor's time, messages by the clock."""
    import torch
    import torch.distributed as dist

    cpu, clock = time.process_time, time.perf_counter
    a, b = torch.randn(128, WIDTH), torch.randn(WIDTH, WIDTH)
    product = _per_call(lambda: a @ b, cpu, 300)
    large = torch.randn(1 << 18)
    add = _per_call(lambda: large + large, cpu, 300)
    few, many = torch.zeros(1), torch.zeros(1 << 20)
    latency = _per_call(lambda: dist.all_reduce(few), clock, 50)
    send = _per_call(lambda: dist.all_reduce(many), clock, 5) - latency
    ring = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    bandwidth = ring * many.nbytes / send / 1e9
    return {
        "tflops": 2 * a.shape[0] * WIDTH * WIDTH / product / 1e12,
        "bandwidth": bandwidth,
        "network": bandwidth,
        "hbm": 3 * large.nbytes / add / 1e9,
        "latency": latency * 1e6,
    }


def _launch() -> float:
    """Microseconds of the processor that an operation takes at least: of a step so small that it has no other work."""
    from functools import partial

    from ebt_megatron.parallel.setup import initialize, shutdown
    from ebt_megatron.tools.ledger import Ledger
    from ebt_megatron.tools.simulation import account_of_step, made_up_batches
    from ebt_megatron.training.trainer import Trainer

    recipe = recipe_of(["model.hidden_size=16", "data.sequence_length=4", "training.micro_batch_size=1"])
    task = Text(recipe, 16)
    state = initialize(recipe.parallel, 0)
    batches = made_up_batches(recipe, task, state.data_size)
    operations = sum(account_of_step(Ledger, recipe, task, state, batches).work.values())
    trainer = Trainer(recipe, task, state)
    step = partial(trainer.train_step, batches, 0)
    step()
    seconds = _per_call(step, time.process_time, 1)
    shutdown()
    return seconds / operations * 1e6


def _measure(out: Path, rounds: int) -> None:
    """On each rank: rates, and each layout's seconds of a step; rank 0 writes them."""
    import torch
    import torch.distributed as dist

    from ebt_megatron.parallel.setup import initialize, shutdown
    from ebt_megatron.tools.simulation import made_up_batches
    from ebt_megatron.training.trainer import Trainer

    torch.set_num_threads(1)
    launch = _launch()
    rates: dict[str, float] = {}
    size = int(os.environ["WORLD_SIZE"])
    steps: dict[str, list[Any]] = {name: [] for name in recipes(size)}
    for _ in range(rounds):
        for name, recipe in recipes(size).items():
            task = Text(recipe, VOCAB)
            state = initialize(recipe.parallel, recipe.training.seed)
            rates = rates or _rates()
            batches = made_up_batches(recipe, task, state.data_size)
            trainer = Trainer(recipe, task, state)
            trainer.train_step(batches, 0)
            for _ in range(2):
                dist.barrier()
                begin = time.perf_counter(), time.process_time()
                trainer.train_step(batches, 0)
                mine = time.perf_counter() - begin[0], time.process_time() - begin[1]
                every: list[Any] = [None] * size
                dist.all_gather_object(every, mine)
                steps[name].append(every)
            shutdown()
    if int(os.environ["RANK"]) == 0:
        write_whole(out, json.dumps({"rates": rates | {"launch": launch}, "steps": steps}))


def measured(ranks: int, rounds: int) -> dict[str, Any]:
    """What `_measure` finds on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "measured.json")
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.search", "--measure", str(out)]
        subprocess.run([*command, "--rounds", str(rounds)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text())


# --- predicted ------------------------------------------------------------------------------------


def predicted(ranks: int, hardware: Hardware) -> dict[str, dict[str, float]]:
    """Of each layout: seconds of the step, and the most that a rank computes.

    More processes than cores take turns: a step takes at least all their work, divided over the cores.
    """
    out, cores = {}, os.cpu_count() or 1
    with Simulator() as simulator:
        for name, recipe in track(recipes(ranks).items(), f"simulating {ranks} ranks", transient=True):
            stages = recipe.parallel.pipeline
            ends = sorted({0, ranks - ranks // stages})
            futures = simulator.begin(recipe, Text(recipe, VOCAB), ranks, ends)
            accounts = [future.result().account for future in futures]
            count = recipe.training.global_batch_size * recipe.parallel.tensor * stages
            count //= ranks * recipe.training.micro_batch_size
            step = step_time(recipe, ranks, accounts, count, count, hardware)
            work = [sum(hardware.compute_seconds(account).values()) for account in accounts]
            every = ranks // stages * (work[0] + (stages - 1) * work[-1])
            out[name] = {"step": max(step.seconds, every / cores), "work": max(work), "bubble": step.bubble}
    return out


def compare(found: dict[str, Any], told: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each layout: predicted and measured seconds, of the step and of its busiest rank's work."""
    rows = []
    for name, steps in found["steps"].items():
        clock = min(max(wall for wall, _ in step) for step in steps)
        work = min(max(cpu for _, cpu in step) for step in steps)
        rows.append({"layout": name, **told[name], "clock": clock, "cpu": work, "steps": len(steps)})
    return sorted(rows, key=lambda row: row["step"])


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of ranks of predicted and measured times: Spearman's and Kendall's, on the clock and of the processor."""
    out = {}
    for what, told, found in (("clock", "step", "clock"), ("processor", "work", "cpu")):
        pair = [row[told] for row in rows], [row[found] for row in rows]
        out[f"{what}, Spearman"] = float(spearmanr(*pair).statistic)
        out[f"{what}, Kendall"] = float(kendalltau(*pair).statistic)
    return out


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [f"# Predicted and measured order of layouts ({results['date']})", ""]
    lines += ["`python -m benchmarks.search`: " + (__doc__ or "").strip().splitlines()[0], ""]
    on = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines += [f"On: {on}. Seconds are the least of the steps measured. `work` is what the busiest"]
    lines += ["rank computes, in seconds of the processor; `step` is on the clock.", ""]
    for ranks, one in results["worlds"].items():
        rates = ", ".join(f"{key} {value:.4g}" for key, value in one["rates"].items())
        lines += [f"## {ranks} processes", "", f"Measured rates (units of `Hardware`): {rates}.", ""]
        rows = [
            [r["layout"], *(f"{r[key]:.3f}" for key in ("step", "clock", "work", "cpu")), f"{100 * r['bubble']:.0f} %"]
            for r in one["rows"]
        ]
        head = ["layout", "step, predicted", "step, measured", "work, predicted", "work, measured", "bubble"]
        lines += [Table("", head, rows).markdown(), ""]
        lines += [f"- {what}: {value:.2f}" for what, value in one["correlations"].items()]
        lines += [""]
    return "\n".join(lines)


app = typer.Typer()


@app.command(help=__doc__)
def main(
    rounds: int = typer.Option(3, min=1, help="Over all layouts; two steps are measured in each."),
    processes: list[int] = typer.Option(list(LAYOUTS), help="Numbers of them, of 2 and 4."),
    output: Path = typer.Option(RESULTS, help="Where the results go."),
    measure: Path | None = typer.Option(None, hidden=True),
) -> None:
    """See the module."""

    def work() -> None:
        quiet_libraries()
        if measure is not None:
            _measure(measure, rounds)
            return
        results: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(), "worlds": {}}
        output.mkdir(parents=True, exist_ok=True)
        for ranks in processes:
            found = measured(ranks, rounds)
            hardware = Hardware(**found["rates"])
            rows = compare(found, predicted(ranks, hardware))
            results["worlds"][ranks] = {
                "rates": asdict(hardware),
                "rows": rows,
                "correlations": correlations(rows),
                "steps": found["steps"],
            }
        stem = output / f"search-{results['date']}"
        write_whole(stem.with_suffix(".json"), json.dumps(results, indent=1))
        write_whole(stem.with_suffix(".md"), page(results))
        Console(highlight=False).print(page(results), markup=False)

    guarded(work)


if __name__ == "__main__":
    app()
