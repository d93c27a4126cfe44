"""Puzzles solved: thinking for any number of steps, ended by a rule, from one start or several.

All of it is on one process, for an energy, its recurrent twin and a feed-forward network alike, where they have what is
asked: a recurrent network takes any number of passes, a feed-forward one takes one, and neither has an energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.data.puzzles import BLANK
from ebt_megatron.prediction.cells import GIVEN, cell_weights
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks.interface import Sample

RULES = ("grid stays", "energy rises", "energy settles")  # that end thinking, see `last_steps`
_SURE = 30.0  # a logit whose symbol has all of the probability, in fp32
_SETTLED = 1e-4  # of an energy: a change that is none
_IDS = 1 << 51  # of samples, apart from training's and validation's


@dataclass
class Thoughts:
    """What became of a micro-batch, after each of n steps.

    Attributes:
        logits: [n, B, S, V].
        energies: [n, B] of the prediction after each step, on the last landscape that was trained; none: nan.
        targets: int64 [B, S], `GIVEN` where nothing is asked.
    """

    logits: Tensor
    energies: Tensor
    targets: Tensor

    @property
    def asked(self) -> Tensor:
        """Which cells are asked for, bool [B, S]."""
        return self.targets != GIVEN

    @property
    def grids(self) -> Tensor:
        """The most likely symbol of every cell, int64 [n, B, S]; of a given cell it means nothing."""
        return self.logits.argmax(-1)

    @property
    def right(self) -> Tensor:
        """Which cells are as the answer says, or given; bool [n, B, S]."""
        return (self.grids == self.targets) | ~self.asked

    @property
    def solved(self) -> Tensor:
        """Which puzzles have every cell right, bool [n, B]."""
        return self.right.all(-1)

    @property
    def losses(self) -> Tensor:
        """The loss in nats per asked cell, [n, B]."""
        log_p = self.logits.log_softmax(-1)
        target = self.targets.clamp_min(0).expand(len(log_p), -1, -1)
        return (-log_p.gather(-1, target[..., None])[..., 0] * cell_weights(self.targets).t()).mean(-1)

    @property
    def confidence(self) -> Tensor:
        """The mean over asked cells of the log-probability of what is most likely, [n, B]."""
        return (self.logits.log_softmax(-1).amax(-1) * cell_weights(self.targets).t()).mean(-1)


def most_steps(run: TrainedRun, wanted: int) -> int:
    """Return how many of the wanted steps a model can take: a feed-forward one takes one."""
    return wanted if run.objective.thinks or run.recipe.puzzles.passes > 1 else 1


@torch.no_grad()
def think(run: TrainedRun, sample: Sample, steps: int, start: Tensor | None = None) -> Thoughts:
    """Think about puzzles for so many steps.

    Args:
        run: on one process.
        sample: of its task.
        steps: at least 1.
        start: [B, S, V] logits to start at; None: as the recipe says.
    """
    model: Any = run.model
    symbols = run.task.puzzle.symbols  # type: ignore[attr-defined]
    if not run.objective.thinks:
        logits = torch.stack(model.trajectory(sample.observed, steps))[..., :symbols]
        nothing = logits.new_full((len(logits), len(sample.targets)), torch.nan)
        return Thoughts(logits.transpose(1, 2), nothing, sample.targets)
    if start is not None:
        sample = replace(sample, start=_padded(run, start).transpose(0, 1))
    after: list[Tensor] = []  # copies: a step may write over what it starts from

    def observe(prediction: Any) -> None:
        after.append(prediction.logits[..., :symbols].clone())

    before = run.objective.evaluate(sample, steps, observe).energies.sum(1)
    logits = torch.stack(after).transpose(1, 2)
    # A step begins with the energy of what the one before it ended with; on the last landscape from some step on.
    known = range(max(1, run.recipe.thinking.max_steps - 1), steps)
    energies = [before[i] if i in known else energy(run, sample, logits[i - 1]).sum(0) for i in range(1, steps + 1)]
    return Thoughts(logits, torch.stack(energies), sample.targets)


def _padded(run: TrainedRun, logits: Tensor) -> Tensor:
    """[..., V] -> [..., V padded]."""
    model: Any = run.model
    rows = len(model.modality.prediction_embedding.weight)
    return torch.nn.functional.pad(logits, (0, rows - logits.shape[-1]))


def energy(run: TrainedRun, sample: Sample, logits: Tensor) -> Tensor:
    """Each cell's share [S, B] of the energy of grids, given as logits [B, S, V], on the last landscape."""
    thinker = run.objective.thinker(replace(sample, start=_padded(run, logits).transpose(0, 1)))  # type: ignore
    thinker.context_forward(0)
    last = run.recipe.thinking.max_steps - 1
    with torch.no_grad():
        x = thinker.descent.propose_input(last)
        return thinker.model.predict(x, thinker.key_values(constant=True), thinker.length, None, last, tangent=False)


def mean_of_asked(cells: Tensor, asked: Tensor) -> Tensor:
    """The mean [B], over the cells that are asked for (bool [B, S]), of what each cell has [S, B]; 0 where none is."""
    return (cells * asked.t()).sum(0) / asked.sum(1).clamp_min(1)


def from_noise(run: TrainedRun, sample: Sample, steps: int, starts: int, draw: torch.Generator) -> Iterator[Thoughts]:
    """Think so many steps from so many starts at noise of deviation 1.

    Args:
        run, sample, steps: as `think`.
        starts: how many.
        draw: the noise, on the CPU.
    """
    shape = (*sample.targets.shape, run.task.puzzle.symbols)  # type: ignore[attr-defined]
    for _ in range(starts):
        yield think(run, sample, steps, torch.randn(shape, generator=draw).to(sample.targets.device))


def of_symbols(grids: Tensor, symbols: int) -> Tensor:
    """Grids int64 [B, S] as logits [B, S, V] of certainty."""
    return torch.nn.functional.one_hot(grids, symbols) * _SURE


def last_steps(thoughts: Thoughts, rule: str) -> Tensor:
    """After which step, counted from 0, thinking ends by a rule, int64 [B]; what no rule ends goes on to the last.

    "grid stays": two steps in a row leave the decoded grid as it is. "energy rises": the next step would raise the
    energy; it is refused, and as thinking would try it again, that ends it. "energy settles": a step changes the energy
    by less than `_SETTLED` of itself.

    Raises:
        RecipeError: for a rule there is not, or one about energies where there are none.
    """
    if rule not in RULES:
        raise RecipeError(f"until={rule}: choose one of {', '.join(RULES)}")
    if rule == "grid stays":
        same = ((thoughts.grids[1:] == thoughts.grids[:-1]) | ~thoughts.asked).all(-1)  # [n - 1, B]
        ended, first = same[1:] & same[:-1], 2
    elif thoughts.energies.isnan().any():
        raise RecipeError(f"until={rule}: the model has no energy, only 'grid stays' does")
    else:
        change = thoughts.energies[1:] - thoughts.energies[:-1]
        settled = change.abs() < _SETTLED * thoughts.energies[1:].abs()
        ended, first = (change > 0, 0) if rule == "energy rises" else (settled, 1)
    never = torch.full_like(thoughts.targets[:, 0], len(thoughts.grids) - 1)
    return torch.where(ended.any(0), ended.int().argmax(0) + first, never) if len(ended) else never


@dataclass
class Solved:
    """What thinking made of puzzles.

    Attributes:
        grids: symbols 1 .. V, int64 [B, S]; cells that were given are as given.
        steps: that each took, int64 [B].
        energies: the mean energy of the cells that were asked for, [B]; nan of a model without energies.
        confidence: the mean over those cells of the log-probability of the symbol, [B].
    """

    grids: Tensor
    steps: Tensor
    energies: Tensor
    confidence: Tensor


def asked(questions: Tensor) -> Sample:
    """Questions int64 [B, S], 0 where they ask, as a model sees them; their answers are not known."""
    targets = torch.where(questions == BLANK, 0, GIVEN)
    return Sample(questions, targets, torch.arange(len(questions), device=questions.device) + _IDS)


def solve(
    run: TrainedRun, questions: Tensor, steps: int = 16, starts: int = 1, until: str | None = None, seed: int = 0
) -> Solved:
    """Solve puzzles.

    Args:
        run: of puzzles, on one process.
        questions: int64 [B, S], symbols 1 .. V, and 0 where it asks.
        steps: the most that are taken.
        starts: 1: as the recipe starts. More: from so many starts at noise of deviation 1, and the result of the
            lowest mean energy is kept.
        until: of RULES, see `last_steps`; None: all steps are taken.
        seed: of the starts.

    Raises:
        RecipeError: for several starts, steps or rules that the model does not have.
    """
    if starts > 1 and not run.objective.thinks:
        raise RecipeError(f"starts={starts}: {run.recipe.name} has no energy to choose by, and no start: give 1")
    sample = asked(questions.to(run.state.device))
    if starts == 1:
        return _ended(run, sample, think(run, sample, most_steps(run, steps)), until)
    draw = torch.Generator().manual_seed(seed)
    found = [_ended(run, sample, thoughts, until) for thoughts in from_noise(run, sample, steps, starts, draw)]
    best = torch.stack([each.energies for each in found]).argmin(0)
    rows = torch.arange(len(best), device=best.device)
    return Solved(*(torch.stack([getattr(each, name) for each in found])[best, rows] for name in vars(found[0])))


def _ended(run: TrainedRun, sample: Sample, thoughts: Thoughts, until: str | None) -> Solved:
    """What each puzzle came to after its own last step."""
    rows = torch.arange(len(sample.targets), device=sample.targets.device)
    last = last_steps(thoughts, until) if until else torch.full_like(rows, len(thoughts.grids) - 1)
    grids = torch.where(thoughts.asked, thoughts.grids[last, rows] + 1, sample.observed)
    energies = thoughts.energies[last, rows]
    if run.objective.thinks:
        energies = mean_of_asked(energy(run, sample, thoughts.logits[last, rows]), thoughts.asked)
    return Solved(grids, last + 1, energies, thoughts.confidence[last, rows])
