"""The order in which pipeline stages work on micro-batches of thinking.

A micro-batch is a chain of *sweeps*: the context goes forward through the stages, then for
each step a proposal goes forward and its gradient comes back, a learning pass goes forward
and its gradients come back; at last the context's gradients come back. Each sweep visits
every stage, in order or in reverse, but for what is between the context and where thinking starts, which is the
first stage's alone. There is no flush between sweeps: a stage takes
whichever ready piece of work has the longest way still to go, so micro-batches at different
steps fill the pipe together.

`simulate` plays this out with given durations. Every rank computes the same order from it
and executes exactly that, so sends and receives match without negotiation; the planner
prints the same simulation's bubble.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

FORWARD = ("context_forward", "propose_forward", "learn_forward")

# Durations of one stage's part of a sweep in units of one forward pass of the layers.
FLOP_DURATIONS = {
    "context_forward": 1.0,
    "context_backward": 2.0,
    "propose_forward": 1.0,
    "propose_backward": 1.0,
    "learn_forward": 2.0,
    "learn_backward": 4.0,
    "initial_forward": 0.0,  # the vocabulary's alone
    "initial_backward": 0.0,
}


@dataclass(frozen=True, order=True)
class StagePass:
    """One stage's part of a sweep of one micro-batch."""

    micro_batch: int
    index: int  # of the sweep in the micro-batch's chain
    kind: str
    step: int
    stage: int


@dataclass
class Schedule:
    """A simulated run.

    Attributes:
        order: for each stage, its tasks in the order they start.
        start, end: times of each task, in the durations' unit.
        makespan: when the last task ends.
        live: for each stage, the most micro-batches whose context it held at once.
    """

    order: list[list[StagePass]]
    start: dict[StagePass, float] = field(default_factory=dict)
    end: dict[StagePass, float] = field(default_factory=dict)
    makespan: float = 0.0
    live: list[int] = field(default_factory=list)

    @property
    def bubble(self) -> float:
        """The fraction of all stages' time spent waiting."""
        busy = sum(self.end[t] - self.start[t] for t in self.start)
        return 1 - busy / (self.makespan * len(self.order))


_IN_FLIGHT = 5  # of `simulate`, for each stage


def feed_forward_sweeps() -> list[tuple[str, int]]:
    """The sweeps of a feed-forward model, for comparison: one forward, one backward."""
    return [("context_forward", 0), ("context_backward", 0)]


def simulate(
    stages: int,
    micro_batches: int,
    sweeps: Sequence[tuple[str, int]],
    durations: dict[str, float] | None = None,
    first_stage_extra: dict[str, float] | None = None,
    latency: float = 0.0,
    in_flight: int | None = None,
) -> Schedule:
    """Play the schedule out.

    Args:
        stages: number of pipeline stages.
        micro_batches: per optimizer step.
        sweeps: of a micro-batch, e.g. from `Plan.sweeps`.
        durations: of one stage's part of each kind of sweep; default: FLOP_DURATIONS.
        first_stage_extra: what the first stage does besides (the vocabulary), by kind.
        latency: from the end of a task to the start of what it enables on another stage.
        in_flight: the most micro-batches begun and not finished, which bounds memory; default: five times the stages,
            beyond which the bubble shrinks by less than a point.
    """
    durations = durations or FLOP_DURATIONS
    extra = first_stage_extra or {}
    in_flight = min(in_flight or _IN_FLIGHT * stages, micro_batches)
    tasks: list[tuple[str, int, int]] = []  # (kind, step, stage) of a whole micro-batch, in order
    sweep_of: list[int] = []
    for i, (kind, step) in enumerate(sweeps):
        visited = range(1 if kind.startswith("initial") else stages)
        tasks += [(kind, step, stage) for stage in (visited if kind in FORWARD else reversed(visited))]
        sweep_of += [i] * len(visited)
    cost = [durations[kind] + (extra.get(kind, 0.0) if stage == 0 else 0.0) for kind, _, stage in tasks]
    remaining = [0.0] * (len(tasks) + 1)
    for i in reversed(range(len(tasks))):
        remaining[i] = remaining[i + 1] + cost[i]

    schedule = Schedule(order=[[] for _ in range(stages)], live=[0] * stages)
    waiting: list[list[tuple]] = [[] for _ in range(stages)]  # ready tasks by stage
    free_at = [0.0] * stages
    events: list[tuple[float, int, int, int]] = []  # (time, what, micro_batch, position): 0 ready, 1 done
    begun = finished = 0

    def begin(now: float) -> None:
        nonlocal begun
        while begun < micro_batches and begun - finished < in_flight:
            heapq.heappush(events, (now, 0, begun, 0))
            begun += 1

    def dispatch(stage: int, now: float) -> None:
        if free_at[stage] > now or not waiting[stage]:
            return
        _, micro_batch, position = heapq.heappop(waiting[stage])
        kind, step, _ = tasks[position]
        task = StagePass(micro_batch, sweep_of[position], kind, step, stage)
        schedule.order[stage].append(task)
        schedule.start[task], schedule.end[task] = now, now + cost[position]
        free_at[stage] = now + cost[position]
        heapq.heappush(events, (free_at[stage], 1, micro_batch, position))

    begin(0.0)
    while events:
        now = events[0][0]
        touched = set()
        while events and events[0][0] == now:
            _, done, micro_batch, position = heapq.heappop(events)
            if not done:
                stage = tasks[position][2]
                heapq.heappush(waiting[stage], (-remaining[position], micro_batch, position))
                touched.add(stage)
                continue
            touched.add(tasks[position][2])
            if position + 1 == len(tasks):
                finished += 1
                begin(now)
            else:
                hop = latency if tasks[position + 1][2] != tasks[position][2] else 0.0
                heapq.heappush(events, (now + hop, 0, micro_batch, position + 1))
        for stage in sorted(touched):
            dispatch(stage, now)
    schedule.makespan = max(schedule.end.values())
    for stage in range(stages):
        schedule.live[stage] = _most_live(schedule, stage)
    return schedule


def _most_live(schedule: Schedule, stage: int) -> int:
    """The most micro-batches between their first and their last task on a stage, at any time."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for task in schedule.order[stage]:
        first.setdefault(task.micro_batch, schedule.start[task])
        last[task.micro_batch] = schedule.end[task]
    moments = sorted([(t, 1) for t in first.values()] + [(t, -1) for t in last.values()])
    live = most = 0
    for _, change in moments:
        live += change
        most = max(most, live)
    return most


def gpt_bubble(stages: int, micro_batches: int) -> float:
    """The bubble fraction of one-forward-one-backward (arXiv 2104.04473, section 2.2)."""
    return (stages - 1) / (micro_batches + stages - 1)
