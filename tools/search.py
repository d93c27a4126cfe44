"""Find layouts of a recipe on so many GPUs: those that fit, by predicted step time, and why others do not.

A formula (`plan.estimate`) looks at every candidate. Of each shape (tensor, pipeline, micro-batch size), the quickest
that it lets fit is kept, and the most promising shapes are simulated: the real step of a rank of the first and of the
last pipeline stage. What these hold says whether they fit, and what they do, how long they take.

A step of many micro-batches is simulated with few. Each of them does the same, so FLOPs, bytes and messages are exact.
On one stage the second micro-batch needs what all others do. On several, each one more that is live needs as much as
the one before, so the memory of two short steps is continued in a straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from rich.progress import Progress

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.tasks import Task
from ebt_megatron.tools.candidates import Candidate, Refusals, candidates, changed
from ebt_megatron.tools.hardware import Hardware
from ebt_megatron.tools.ledger import Account
from ebt_megatron.tools.plan import estimate, memory_of, most_of, verdict
from ebt_megatron.tools.simulation import Simulated, Simulator
from ebt_megatron.tools.step_time import StepTime, step_time

SHOWN = 5
_AT_FIRST, _AT_MOST = 8, 18  # shapes that are simulated
# Of a layer's pass, for the formula: operations, and hidden states that they read and write.
_OPERATIONS, _STATES = 30, 40


@dataclass(frozen=True)
class Found:
    """A candidate that was simulated.

    Attributes:
        candidate: what it is.
        time: of a step.
        states, activations: bytes at the peak of the stage that needs most: as `plan.memory_of`.
        counts: micro-batches of the short steps that were simulated.
    """

    candidate: Candidate
    time: StepTime
    states: float
    activations: float
    counts: list[int]


@dataclass
class Search:
    """What a search found.

    Attributes:
        found: what fits, the quickest first; one of each shape.
        refusals: why others do not.
        nearest: of what does not fit, what needs least: (bytes of states, of activations, the candidate).
        tried, simulated: candidates that a formula has seen; shapes that were simulated.
    """

    found: list[Found] = field(default_factory=list)
    refusals: Refusals = field(default_factory=Refusals)
    nearest: tuple[float, float, Candidate] | None = None
    tried: int = 0
    simulated: int = 0


def reached(candidate: Candidate, task: Task, hardware: Hardware) -> Hardware:
    """The hardware with the matrix rate that a layer of the candidate comes to, of its FLOPs, bytes and launches.

    Layers that are computed again take a forward pass of the context more, and, without reuse, 3 in each step.
    """
    recipe, cost = candidate.recipe, task.cost()
    model, training, tensor = recipe.model, recipe.training, recipe.parallel.tensor
    assert model.num_layers and model.hidden_size
    flops = training.micro_batch_size * cost.layers / model.num_layers / tensor
    width = 4 if training.precision == "fp32" else 2
    states = _STATES * training.micro_batch_size * task.length * model.hidden_size
    moved = width * (cost.parameters / model.num_layers + states) / tensor
    whole = flops / (hardware.tflops * 1e12)
    real = max(whole, moved / (hardware.hbm * 1e9), _OPERATIONS * hardware.launch * 1e-6)
    steps = recipe.thinking.max_steps if model.architecture == "ebt" else 0
    reuse = recipe.thinking.reuse
    again = 1 + model.recompute_layers * (1 + 3 * steps * (not reuse)) / (3 + steps * (6 if reuse else 8))
    return replace(hardware, tflops=hardware.tflops * whole / real / again)


class Searcher:
    """A search for layouts.

    Args:
        recipe: resolved.
        task_of: the task of a recipe: a task keeps the recipe that it is of.
        gpus: how many.
        node: GPUs of a node.
        hardware: the rates; between nodes there is no network if there is one node.
        memory: of a GPU, GB.
        fixed: keys that keep their values.
    """

    def __init__(
        self,
        recipe: Recipe,
        task_of: Callable[[Recipe], Task],
        gpus: int,
        node: int,
        hardware: Hardware,
        memory: float,
        fixed: Collection[str],
    ):
        self.recipe, self.task_of, self.gpus, self.node = recipe, task_of, gpus, node
        self.hardware = replace(hardware, network=hardware.bandwidth) if gpus <= node else hardware
        self.memory, self.fixed, self.out = memory, fixed, Search()

    def run(self, progress: Progress) -> Search:
        """Search; the bar shows what is being done."""
        shapes = self._promising(progress)
        bar = progress.add_task("simulating", total=min(_AT_FIRST, len(shapes)))
        with Simulator() as simulator:
            for begin, end in ((0, _AT_FIRST), *((i, i + SHOWN) for i in range(_AT_FIRST, _AT_MOST, SHOWN))):
                batch = shapes[begin:end]
                if len(self.out.found) >= SHOWN or not batch:
                    break
                progress.update(bar, total=begin + len(batch))
                begun = [(candidate, self._begin(simulator, candidate)) for candidate in batch]
                for candidate, steps in begun:
                    self._judge(self._measured(candidate, [[f.result().account for f in step] for step in steps]))
                    progress.advance(bar)
        self.out.found.sort(key=lambda found: found.time.seconds)
        return self.out

    def _promising(self, progress: Progress) -> list[Candidate]:
        """Of each shape the quickest that fits by the formula, the quickest shape first."""
        best: dict[tuple[int, int, int], tuple[float, Candidate]] = {}
        every = list(candidates(self.recipe, self.gpus, self.node, self.fixed, self.out.refusals))
        for candidate in progress.track(every, description="by the formula"):
            task = self.task_of(candidate.recipe)
            planned = estimate(candidate.recipe, task, self.gpus, reached(candidate, task, self.hardware))
            self.out.tried += 1
            if not verdict(planned.weight_bytes, planned.activation_bytes, self.memory)[0]:
                self._too_large(candidate, planned.weight_bytes, planned.activation_bytes, "by the formula")
                continue
            seconds = planned.step_seconds
            if candidate.shape not in best or seconds < best[candidate.shape][0]:
                best[candidate.shape] = seconds, candidate
        return [candidate for _, candidate in sorted(best.values(), key=lambda pair: pair[0])]

    def _begin(self, simulator: Simulator, candidate: Candidate) -> list[list[Future[Simulated]]]:
        """Begin to simulate the short steps of a candidate: of each, the first and the last stage."""
        recipe, begun = candidate.recipe, []
        for count in short_steps(candidate):
            size = count * candidate.data * recipe.training.micro_batch_size
            step = changed(recipe, {"training.global_batch_size": size})
            begun.append(simulator.begin(step, self.task_of(step), self.gpus, self._ends(candidate)))
        return begun

    def _ends(self, candidate: Candidate) -> list[int]:
        """A rank of the first and one of the last pipeline stage."""
        return sorted({0, self.gpus - self.gpus // candidate.recipe.parallel.pipeline})

    def _measured(self, candidate: Candidate, steps: list[list[Account]]) -> Found:
        """What short steps say of the whole one."""
        recipe, counts = candidate.recipe, short_steps(candidate)
        time = step_time(recipe, self.gpus, steps[-1], counts[-1], candidate.micro_batches, self.hardware)
        held = (time.live[0], time.live[-1])[: len(steps[0])]
        needs = [memory_of_many(a, counts, live) for a, live in zip(zip(*steps, strict=True), held, strict=True)]
        return Found(candidate, time, *max(needs, key=sum), counts)

    def _judge(self, found: Found) -> None:
        self.out.simulated += 1
        if verdict(found.states, found.activations, self.memory)[0]:
            self.out.found.append(found)
        else:
            self._too_large(found.candidate, found.states, found.activations, "simulated")

    def _too_large(self, candidate: Candidate, states: float, activations: float, how: str) -> None:
        needed, most = (states + activations) / 1e9, most_of(states, activations)
        example = f"{candidate.name} needs {needed:.1f} GB of {self.memory:g}"
        self.out.refusals.add(f"too large ({how}), most of it {most}", example, needed)
        if self.out.nearest is None or states + activations < sum(self.out.nearest[:2]):
            self.out.nearest = states, activations, candidate


def short_steps(candidate: Candidate) -> list[int]:
    """Numbers of micro-batches to simulate, which say what a step of all of them takes."""
    count, stages = candidate.micro_batches, candidate.recipe.parallel.pipeline
    if stages == 1:
        return [min(2, count)]
    live = min(count, candidate.recipe.parallel.micro_batches_in_flight or count)
    return [min(count, live + 1)] if live <= 2 * stages else [stages, 2 * stages]


def memory_of_many(steps: Sequence[Account], counts: Sequence[int], live: int) -> tuple[float, float]:
    """Bytes of states and activations (`plan.memory_of`) of a rank that holds so many micro-batches at once.

    Args:
        steps, counts: of one short step, or two that are continued in a straight line, and their micro-batches.
        live: micro-batches held in the whole step.
    """
    states, activations = memory_of(steps[-1])
    if len(steps) > 1:
        more = (activations - memory_of(steps[0])[1]) / (counts[1] - counts[0])
        activations += more * (live - counts[1])
    return states, activations


def nothing_fits(searched: Search, gpus: int, memory: float, fixed: Collection[str]) -> RecipeError:
    """One line that says what came closest, and what to change."""
    if searched.nearest is None:
        reasons = "; ".join(example for _, _, example in searched.refusals.rows())
        return RecipeError(f"no layout of {gpus} GPUs is possible: {reasons}")
    states, activations, candidate = searched.nearest
    smaller = {
        "activations": "a shorter data.sequence_length, of text thinking.regenerate, or thinking.logits_dtype=bfloat16",
        "weights, gradients and optimizer": "a smaller model, or training.precision=bf16",
    }[most_of(states, activations)]
    kept = f"; or let the search choose {', '.join(sorted(fixed))}" if fixed else ""
    return RecipeError(
        f"nothing fits {memory:g} GB on {gpus} GPUs; the nearest, {candidate.name}, needs "
        f"{(states + activations) / 1e9:.1f} GB, most of it {most_of(states, activations)}: more --gpus, "
        f"{smaller}{kept}"
    )
