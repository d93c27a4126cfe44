"""How long a training step takes by stated rates: what simulated ranks do, in the order that a pipeline does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebt_megatron.config import Recipe
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.schedule import FLOP_DURATIONS, feed_forward_sweeps, simulate
from ebt_megatron.tools.hardware import Hardware
from ebt_megatron.tools.ledger import Account

_ONCE = ("optimizer", "communication", "other")  # phases that a step has once, however many micro-batches it has


@dataclass(frozen=True)
class StepTime:
    """A step in seconds.

    Attributes:
        seconds: all of it.
        bubble: share of the pipeline's time in which stages wait.
        once: seconds of what a step does once: the data-parallel ranks' exchange and the optimizer.
        live: of each pipeline stage, the most micro-batches that it holds at once.
    """

    seconds: float
    bubble: float
    once: float
    live: list[int]


def sweeps_of(recipe: Recipe) -> list[tuple[str, int]]:
    """The passes of a micro-batch in iteration 0, which is the one that is simulated."""
    if recipe.model.architecture != "ebt":
        return feed_forward_sweeps()
    plan = Plan.draw(recipe.thinking, recipe.training.seed, 0)
    return plan.sweeps(recipe.model.conditioning.endswith("_sequence"))


def step_time(
    recipe: Recipe, gpus: int, stages: Sequence[Account], simulated: int, micro_batches: int, hardware: Hardware
) -> StepTime:
    """Time of a step, nothing of whose communication overlaps with computing.

    Args:
        recipe: the run.
        gpus: its ranks.
        stages: what a rank of the first and one of the last pipeline stage does; of one stage, that one.
        simulated: micro-batches that the accounts have.
        micro_batches: of the step.
        hardware: the rates.
    """
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    sizes = {"tensor": tensor, "pipeline": pipeline, "data": gpus // (tensor * pipeline)}
    sweeps = sweeps_of(recipe)
    passes, once = [], 0.0
    for account in (stages[0], stages[-1]):
        by_phase = hardware.compute_seconds(account)
        collectives = hardware.collective_seconds(account, sizes)
        working = sum(seconds for phase, seconds in by_phase.items() if phase not in _ONCE)
        slower = 1 + collectives.pop("tensor", 0.0) / working  # tensor-parallel ranks exchange inside the passes
        passes.append(_durations(sweeps, {p: s * slower / simulated for p, s in by_phase.items()}))
        once = max(once, sum(by_phase.get(phase, 0.0) for phase in _ONCE) + sum(collectives.values()))
    first, last = passes
    # What the ends of the pipeline do more than other stages is one stage's: of an EBT the first's. (A Transformer++'s
    # output is the last's: the bubble is the same the other way round.)
    each = {kind: min(first[kind], last[kind]) for kind in first}
    more = {kind: max(first[kind], last[kind]) - each[kind] for kind in first}
    latency = hardware.message_seconds(stages[0])
    schedule = simulate(pipeline, micro_batches, sweeps, each, more, latency, recipe.parallel.micro_batches_in_flight)
    return StepTime(schedule.makespan + once, schedule.bubble, once, schedule.live)


def _durations(sweeps: Sequence[tuple[str, int]], by_phase: dict[str, float]) -> dict[str, float]:
    """Seconds of each kind of pass on one stage, from those of its phase ("learn": forward and backward together)."""
    kinds = [kind for kind, _ in sweeps]
    weight = {kind: FLOP_DURATIONS[kind] or 1.0 for kind in kinds}
    whole = {kind.partition("_")[0]: 0.0 for kind in kinds}
    for kind in kinds:
        whole[kind.partition("_")[0]] += weight[kind]
    return {kind: by_phase.get(phase := kind.partition("_")[0], 0.0) * weight[kind] / whole[phase] for kind in kinds}
