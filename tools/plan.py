"""Plan a run: bubble, memory, communication and step time of a recipe on a layout, estimated or simulated.

    ebt-plan text/s1_xxs parallel.tensor=2 parallel.pipeline=2 --gpus 16
    ebt-plan text/s1_xl --gpus 64 --tflops 400 --bandwidth 400 --network 50
    ebt-plan text/s1_xxs parallel.pipeline=2 --gpus 8 --simulate
    ebt-plan text/s1_xl --gpus 64 --memory 80 --search

Without --simulate everything printed is an estimate from the figures given; the pipeline part is the simulation that
real runs execute (`ebt_megatron.thinking.schedule`). With it, ranks train a step on tensors without numbers
(`ebt_megatron.tools.simulation`), and what they hold, compute and send is counted. --search finds the layout
(`ebt_megatron.tools.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ebt_megatron.config import Recipe, RecipeError, check, load_recipe
from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.tasks import Task, task_class
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.schedule import FLOP_DURATIONS, feed_forward_sweeps, gpt_bubble, simulate
from ebt_megatron.tools.hardware import Hardware

if TYPE_CHECKING:
    from ebt_megatron.tools.ledger import Account
    from ebt_megatron.tools.simulation import Simulated

_SPARE = 0.1  # of a GPU's memory: what libraries and fragments take


@dataclass(frozen=True)
class Estimate:
    """What a layout costs; seconds and bytes per rank and optimizer step."""

    data_parallel: int
    micro_batches: int
    bubble: float
    gpt_bubble: float
    parameters: float
    weight_bytes: float
    activation_bytes: float
    tensor_traffic: float
    pipeline_traffic: float
    data_traffic: float
    step_seconds: float
    tokens_per_second: float


def estimate(recipe: Recipe, task: Task, gpus: int, hardware: Hardware) -> Estimate:
    """Cost of the recipe's layout on `gpus` ranks.

    Args:
        recipe: resolved.
        task: its modality, which says what the parts cost (`Task.of_size`).
        gpus: how many.
        hardware: its figures.

    Raises:
        RecipeError: if the layout does not fit.
    """
    check(recipe, gpus)
    m, p, t, options = recipe.model, recipe.parallel, recipe.training, recipe.thinking
    assert m.hidden_size and m.num_layers
    data = gpus // (p.tensor * p.pipeline)
    micro_batches = t.global_batch_size // (t.micro_batch_size * data)
    ebt = m.architecture == "ebt"
    sees_step = m.conditioning.endswith("_sequence")
    chains = (
        [(chance, plan.sweeps(sees_step)) for chance, plan in Plan.distribution(options)]
        if ebt
        else [(1.0, feed_forward_sweeps())]
    )
    parts = task.cost()
    unit = t.micro_batch_size * parts.layers / (p.tensor * p.pipeline) / (hardware.tflops * 1e12)  # C on one stage
    product = t.micro_batch_size * parts.vocabulary / p.tensor / (hardware.tflops * 1e12)  # U
    reuse, through = options.reuse, options.gradient != "detached"
    extra = {
        "propose_forward": 1.0,
        "propose_backward": 2.0,
        "learn_forward": 0.0,
        "learn_backward": 2.0 if reuse else 3.0,
    }
    if options.regenerate:  # on average half of the other steps are taken again in every pass over the vocabulary
        extra = {kind: u + (options.max_steps - 1) / 2 * (u > 0) for kind, u in extra.items()}
    if options.starts_at_context:
        extra["initial_forward"] = 3.0 + 2 * bool(options.regenerate)
    units = FLOP_DURATIONS | ({"learn_forward": 1.0, "learn_backward": 3.0} if reuse else {})
    durations = {kind: d * unit for kind, d in units.items()}
    vocabulary = {kind: u * product for kind, u in extra.items()} if ebt else {}
    schedules = [
        simulate(p.pipeline, micro_batches, sweeps, durations, vocabulary, in_flight=p.micro_batches_in_flight)
        for _, sweeps in chains
    ]

    def mean(values: Iterable[float]) -> float:
        """Over the steps that an iteration may draw."""
        return sum(chance * value for (chance, _), value in zip(chains, values, strict=True))

    width_bytes = 4 if t.precision == "fp32" else 2
    tokens = t.micro_batch_size * task.length
    hidden = tokens * m.hidden_size * width_bytes
    layers = m.num_layers / p.pipeline
    # A layer all-reduces twice forward and twice backward (ring: 2 (n-1)/n of the size) for each stream.
    taken = {"learn": 2, "initial": 0}
    streams = mean(sum(taken.get(kind.partition("_")[0], 1) for kind, _ in sweeps) for _, sweeps in chains)
    ring = 2 * (p.tensor - 1) / p.tensor
    tensor_traffic = micro_batches * layers * 2 * streams * hidden * ring
    pipeline_traffic = micro_batches * streams * hidden if p.pipeline > 1 else 0.0
    local = parts.parameters / (p.tensor * p.pipeline)
    data_traffic = 4 * local * 2 * (data - 1) / data
    optimizer_bytes = 8 * local / (data if p.distributed_optimizer else 1)
    master = 4 * local / (data if p.distributed_optimizer else 1) if width_bytes == 2 else 0.0
    # Context keys, values and the graph behind them (about 16 hidden states a layer), and what a pass of one or two
    # streams keeps for its way back, and logits, for every live micro-batch: on one stage one at a time.
    live = max(max(schedule.live) for schedule in schedules) if p.pipeline > 1 else 1
    per_layer = 16 * hidden / p.tensor
    kept = (2 if m.recompute_layers else 16) * hidden / p.tensor
    activations = live * layers * (kept + 2 * (kept if m.recompute_layers else per_layer))
    if m.recompute_layers:
        activations += 2 * per_layer  # of the layer that is computed again
    if ebt:
        split = p.tensor if parts.distribution else 1
        row = parts.width / split * (2 if options.logits_dtype == "bfloat16" else 4)
        if options.regenerate:
            activations += min(options.regenerate, tokens) * row + live * tokens * row * through
        else:
            activations += live * tokens * row * (1 + reuse + through)  # y; y' kept beside it; the adjoint
        activations += live * layers * 11 * hidden / p.tensor * reuse  # each linear layer's output and input gradient
    seconds = (
        mean(schedule.makespan for schedule in schedules)
        + tensor_traffic / (hardware.bandwidth * 1e9)
        + pipeline_traffic / (hardware.network * 1e9)
        + data_traffic / (hardware.network * 1e9)
    )
    return Estimate(
        data,
        micro_batches,
        mean(s.bubble for s in schedules),
        gpt_bubble(p.pipeline, micro_batches),
        parts.parameters,
        (width_bytes + 4) * local + optimizer_bytes + master,
        activations,
        tensor_traffic,
        pipeline_traffic,
        data_traffic,
        seconds,
        t.global_batch_size * task.length / seconds,
    )


def rows(e: Estimate) -> list[tuple[str, str]]:
    """An estimate as a table."""
    return [
        ("parameters", f"{e.parameters / 1e9:.3f} B"),
        ("data parallel x micro-batches", f"{e.data_parallel} x {e.micro_batches}"),
        ("pipeline bubble (1F1B of a GPT)", f"{100 * e.bubble:.1f} % ({100 * e.gpt_bubble:.1f} %)"),
        ("weights, gradients, optimizer per rank", f"{e.weight_bytes / 1e9:.2f} GB"),
        ("activations per rank", f"{e.activation_bytes / 1e9:.2f} GB"),
        ("tensor-parallel traffic per rank", f"{e.tensor_traffic / 1e9:.2f} GB"),
        ("pipeline traffic per rank", f"{e.pipeline_traffic / 1e9:.3f} GB"),
        ("gradient traffic per rank", f"{e.data_traffic / 1e9:.2f} GB"),
        ("step", f"{e.step_seconds:.3f} s"),
        ("positions per second", f"{e.tokens_per_second:,.0f}"),
    ]


def verdict(states: float, activations: float, memory: float) -> tuple[bool, str]:
    """Whether a layout fits a GPU, with a tenth of its memory to spare; and a line on it, with what makes it smaller.

    Args:
        states: bytes of weights, gradients and the optimizer's state.
        activations: bytes of everything else.
        memory: of a GPU, GB.
    """
    needed, most = (states + activations) / 1e9, most_of(states, activations)
    said = f"{needed:.1f} GB of {memory:g} GB a GPU"
    if needed <= (1 - _SPARE) * memory:
        return True, f"fits: {said}"
    smaller = {
        "activations": "a smaller training.micro_batch_size, model.recompute_layers=true, parallel.tensor or pipeline",
        "weights, gradients and optimizer": "parallel.distributed_optimizer=true, parallel.tensor or pipeline",
    }[most]
    near = "may not fit" if needed <= memory else "does not fit"
    return needed <= memory, f"{near}: {said}, most of it {most}; smaller by {smaller}"


def most_of(states: float, activations: float) -> str:
    """What most of a layout's memory is."""
    return "activations" if activations > states else "weights, gradients and optimizer"


def memory_of(account: Account) -> tuple[float, float]:
    """Bytes at the peak: of weights, gradients and the optimizer's state; and of everything else."""
    states = sum(account.peak[part] for part in ("weights", "gradients", "optimizer state"))
    return states, account.peak_bytes - states


def simulated_rows(by_stage: Mapping[str, Simulated]) -> Iterable[tuple[str, ...]]:
    """What was simulated, a column for each rank: memory in GB, FLOPs in TFLOP, messages as calls and GB."""
    accounts = [s.account for s in by_stage.values()]

    def line(what: str, values: Iterable[str]) -> tuple[str, ...]:
        return what, *values

    yield line("peak memory, GB", (f"{a.peak_bytes / 1e9:.2f}" for a in accounts))
    for part in accounts[0].peak:
        yield line(f"  {part}", (f"{a.peak[part] / 1e9:.2f}" for a in accounts))
    for phase in dict.fromkeys(phase for a in accounts for phase in a.phase_peaks):
        yield line(f"most in {phase}, GB", (f"{a.phase_peaks.get(phase, 0) / 1e9:.2f}" for a in accounts))
    yield line("TFLOP", (f"{a.flops.total() / 1e12:.1f}" for a in accounts))
    for phase in dict.fromkeys(phase for a in accounts for phase in a.flops):
        yield line(f"  {phase}", (f"{a.flops[phase] / 1e12:.1f}" for a in accounts))
    for key in sorted({key for a in accounts for key in a.collectives}):
        found = [a.collectives.get(key) for a in accounts]
        yield line(f"{key[0]} over {key[1]}", (f"{t.calls} x, {t.size / 1e9:.3f} GB" if t else "-" for t in found))
    for way in ("send", "receive"):
        ranks = sorted({rank for a in accounts for kind, rank in a.messages if kind == way})
        for rank in ranks:
            found = [a.messages.get((way, rank)) for a in accounts]
            word = f"{way} {'to' if way == 'send' else 'from'} rank {rank}"
            yield line(word, (f"{t.calls} x, {t.size / 1e9:.3f} GB" if t else "-" for t in found))
    yield line("simulated in, s", (f"{s.seconds:.0f} ({s.cpu_seconds:.0f} of a core)" for s in by_stage.values()))
    yield line("  memory of that, GB", (f"{s.memory / 1e9:.2f}" for s in by_stage.values()))


def _print_simulated(recipe: Recipe, task: Task, gpus: int, ranks: list[int], memory: float) -> None:
    """Simulate ranks and show them beside each other; raises RecipeError where one does not fit."""
    from ebt_megatron.tools.simulation import ranks_of_stages, simulate

    check(recipe, gpus)
    shown = {f"rank {rank}": rank for rank in ranks} or ranks_of_stages(recipe, gpus)
    if wrong := [rank for rank in ranks if not 0 <= rank < gpus]:
        raise RecipeError(f"--rank {wrong[0]}: there are ranks 0 to {gpus - 1}")
    by_stage = dict(zip(shown, simulate(recipe, task, gpus, list(shown.values())), strict=True))
    table = Table(title=f"simulated: {recipe.name} on {gpus} GPUs, a rank and step", title_justify="left")
    table.add_column("what")
    for name in by_stage:
        table.add_column(name, justify="right")
    for row in simulated_rows(by_stage):
        table.add_row(*row)
    Console().print(table)
    largest = max(by_stage.values(), key=lambda s: s.account.peak_bytes)
    fits, said = verdict(*memory_of(largest.account), memory)
    if not fits:
        raise RecipeError(said)
    Console(soft_wrap=True, highlight=False).print(said)


def _print_search(
    recipe: Recipe,
    task_of: Callable[[Recipe], Task],
    gpus: int,
    node: int,
    hardware: Hardware,
    memory: float,
    overrides: list[str],
) -> None:
    """Search for layouts and show the best; raises RecipeError where nothing fits."""
    from ebt_megatron.tools.candidates import fixed_by
    from ebt_megatron.tools.search import SHOWN, Searcher, nothing_fits

    fixed = fixed_by(overrides)
    with Progress(transient=True) as progress:
        found = Searcher(recipe, task_of, gpus, node, hardware, memory, fixed).run(progress)
    if not found.found:
        raise nothing_fits(found, gpus, memory, fixed)
    table = Table(title=f"found: {recipe.name} on {gpus} GPUs of {memory:g} GB", title_justify="left")
    for column in ("", "TP x PP x DP", "micro-batches", "step", "positions/s", "bubble", "memory"):
        table.add_column(column, justify="right")
    best = found.found[:SHOWN]
    for place, one in enumerate(best, 1):
        (tensor, pipeline, size), candidate = one.candidate.shape, one.candidate
        table.add_row(
            str(place),
            f"{tensor} x {pipeline} x {candidate.data}",
            f"{candidate.micro_batches} of {size}",
            f"{one.time.seconds:.3g} s",
            f"{recipe.training.global_batch_size * task_of(recipe).length / one.time.seconds:,.0f}",
            f"{100 * one.time.bubble:.1f} %",
            f"{(one.states + one.activations) / 1e9:.1f} GB",
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for place, one in enumerate(best, 1):
        console.print(f"{place}: {' '.join([*overrides, *one.candidate.overrides(recipe)])}", markup=False)
    refused = list(found.refusals.rows())
    console.print(
        f"simulated {found.simulated} shapes, the best of {found.tried} settings by the formula; "
        + ("why not others:" if refused else "the others fit and are slower by it")
    )
    for count, reason, example in refused:
        console.print(f"  {count} {reason}; the nearest: {example}", markup=False)


app = typer.Typer()


@app.command()
def main(
    recipe: Path = typer.Argument(..., help="A recipe: a name, e.g. text/s1_xl, or a YAML file."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. parallel.pipeline=4."),
    gpus: int = typer.Option(8, help="Number of ranks."),
    vocab_size: int = typer.Option(50277, help="Entries of the tokenizer (GPT-NeoX-20B has 50,277)."),
    channels: int = typer.Option(
        768, min=1, help="Where there is no vocabulary: numbers of a position (16 x 16 pixels have 768)."
    ),
    tflops: float = typer.Option(400.0, help="Matrix rate one GPU reaches, TFLOP/s."),
    bandwidth: float = typer.Option(300.0, help="GB/s between tensor-parallel ranks."),
    network: float = typer.Option(40.0, help="GB/s per GPU between nodes."),
    hbm: float = typer.Option(3000.0, min=0.001, help="With --search: GB/s of a GPU's own memory."),
    launch: float = typer.Option(5.0, min=0, help="With --search: the least that an operation takes, microseconds."),
    latency: float = typer.Option(20.0, min=0, help="With --search: of a message or collective, microseconds."),
    node: int = typer.Option(8, min=1, help="With --search: GPUs of a node, in which tensor-parallel ranks stay."),
    memory: float = typer.Option(80.0, min=0, help="GB of a GPU: whether the recipe fits."),
    simulated: bool = typer.Option(
        False, "--simulate", help="Train a step on tensors without numbers, and count: nothing is estimated."
    ),
    search: bool = typer.Option(
        False,
        "--search",
        help="Find the layout, the micro-batch size, thinking.reuse and model.recompute_layers by step time: the five "
        "best that fit, as overrides, and why others do not. What an override here says stays as it is.",
    ),
    rank: list[int] = typer.Option(
        [], help="With --simulate: a rank; default: of the first, a middle and the last pipeline stage."
    ),
) -> None:
    """Estimate bubble, memory, communication and step time (no overlap of communication assumed)."""

    def work() -> None:
        quiet_libraries()
        resolved = load_recipe(recipe, overrides or [])
        hardware = Hardware(tflops, bandwidth, network, hbm, launch, latency)

        def task_of(recipe: Recipe) -> Task:
            return task_class(recipe.data.modality).of_size(recipe, vocab_size, channels)

        if simulated and search:
            raise RecipeError("--search simulates what it finds: leave --simulate out")
        if search:
            _print_search(resolved, task_of, gpus, node, hardware, memory, overrides or [])
            return
        task = task_of(resolved)
        if simulated:
            _print_simulated(resolved, task, gpus, rank, memory)
            return
        rates = f"{tflops:g} TFLOP/s, {bandwidth:g} GB/s in a node, {network:g} GB/s between nodes"
        table = Table(title=f"estimate: {resolved.name} on {gpus} GPUs, {rates}", title_justify="left")
        table.add_column("what")
        table.add_column("value", justify="right")
        planned = estimate(resolved, task, gpus, hardware)
        for row in rows(planned):
            table.add_row(*row)
        Console().print(table)
        _, said = verdict(planned.weight_bytes, planned.activation_bytes, memory)
        Console(soft_wrap=True, highlight=False).print(said)

    guarded(work)


if __name__ == "__main__":
    app()
