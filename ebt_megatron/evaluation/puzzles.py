"""What thinking about puzzles is worth: solved against steps, whether the energy knows, and choosing among starts.

All of it is on one process, for an energy, its recurrent twin and a feed-forward network alike, where they have what is
asked: a recurrent network takes any number of passes, a feed-forward one takes one, and neither has an energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.loader import Loader, MicroBatch
from ebt_megatron.data.puzzles import Puzzle
from ebt_megatron.evaluation.statistics import auroc
from ebt_megatron.model.flops import Cost
from ebt_megatron.prediction.cells import GIVEN, cell_weights
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks.interface import Sample

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_SURE = 30.0  # a logit whose symbol has all of the probability, in fp32
_SETTLED = 1e-4  # of an energy: a change that is none


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


def of_symbols(grids: Tensor, symbols: int) -> Tensor:
    """Grids int64 [B, S] as logits [B, S, V] of certainty."""
    return torch.nn.functional.one_hot(grids, symbols) * _SURE


# --- measures over a folder -----------------------------------------------------------------------


def batches(run: TrainedRun, folder: str | None, count: int, size: int = 100) -> Iterator[tuple[MicroBatch, Sample]]:
    """The first puzzles of a folder (None: the run's validation), as its task sees them."""
    recipe = run.recipe
    if folder is not None:
        recipe = replace(recipe, data=replace(recipe.data, validation=[folder]))
    loader = Loader(recipe, "validation", 0, 1)
    manifest, own = loader.sources[0].manifest, run.task.puzzle  # type: ignore[attr-defined]
    if manifest.kind != "puzzles" or (puzzle := Puzzle.read(manifest.encoder, folder or "")) != own:
        what = puzzle.name if manifest.kind == "puzzles" else manifest.kind
        raise DataError(f"{folder} holds {what}, the run is of {own.name}: give a folder of its size")
    total = min(count, len(loader.blend))
    for first in range(0, total, size):
        batch = loader.read(list(range(first, min(first + size, total))))
        yield batch, run.task.sample(batch, run.state.device)


def against_steps(run: TrainedRun, found: Sequence[Thoughts], cost: Cost) -> list[dict[str, float]]:
    """Shares of puzzles solved and cells right, loss, energy and FLOPs per puzzle, after 1, 2, 3 ... steps."""
    solved, loss, energies = (
        torch.cat([getattr(t, name) for t in found], 1).double().mean(1) for name in ("solved", "losses", "energies")
    )
    asked = sum(int(t.asked.sum()) for t in found)
    right = sum(((t.right & t.asked).sum((1, 2)) for t in found), torch.zeros(len(solved)))
    out = []
    for i in (n - 1 for n in STEPS if n <= len(solved)):
        passes = 2 if run.objective.thinks else 1  # a step of an energy: forward, and back to the prediction
        out.append(
            {
                "steps": i + 1,
                "solved": float(solved[i]),
                "cells right": float(right[i]) / asked,
                "loss": float(loss[i]),
                "energy": float(energies[i]),
                "flops": passes * (i + 1) * (cost.layers + cost.vocabulary),
            }
        )
    return out


def stopping(found: Sequence[Thoughts]) -> dict[str, dict[str, float]]:
    """Where thinking ends by a rule, and what it has solved there.

    Args:
        found: after each of n steps; what no rule ends goes on to n.

    Returns:
        By rule the mean number of steps taken, and the share of puzzles solved. "grid stays": two steps in a row leave
        the decoded grid as it is. Of an energy, "energy rises": a step that raises the energy is refused, and as
        thinking would try it again, ends it; "energy settles": a step changes it by less than `_SETTLED` of itself.
    """
    rules: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for thoughts in found:
        same = ((thoughts.grids[1:] == thoughts.grids[:-1]) | ~thoughts.asked).all(-1)  # [n - 1, B]
        change = thoughts.energies[1:] - thoughts.energies[:-1]
        ends = {"grid stays": (same[1:] & same[:-1], 2)}  # after which of the steps: those from the third on
        if not thoughts.energies.isnan().any():
            ends["energy rises"] = change > 0, 0
            ends["energy settles"] = change.abs() < _SETTLED * thoughts.energies[1:].abs(), 1
        for rule, (ended, first) in ends.items():
            last = torch.where(ended.any(0), ended.int().argmax(0) + first, len(thoughts.grids) - 1)
            rules.setdefault(rule, []).append((last + 1, thoughts.solved.gather(0, last[None])[0]))
    out = {}
    for rule, by in rules.items():
        steps, solved = (torch.cat(of).double().mean() for of in zip(*by, strict=True))
        out[rule] = {"steps": float(steps), "solved": float(solved)}
    return out


def verification(run: TrainedRun, found: Sequence[tuple[Sample, Thoughts]], steps: int) -> dict[str, float]:
    """How well scores tell solved puzzles from others (AUROC) after so many steps.

    A grid's energy is a sum over all its cells, and so depends on what is given. Its mean over the cells that are
    asked for does less, and the highest of these says where the grid is wrong.
    """
    scores: dict[str, list[np.ndarray]] = {}
    solved = []

    def score(name: str, values: Tensor) -> None:
        scores.setdefault(name, []).append(values.numpy())

    for sample, thoughts in found:
        n = min(steps, len(thoughts.logits)) - 1
        asked = thoughts.asked.t()
        solved.append(thoughts.solved[n].numpy())
        score("confidence", thoughts.confidence[n])
        if run.objective.thinks:
            decoded = torch.where(thoughts.asked, thoughts.grids[n], sample.observed - 1)
            cells = energy(run, sample, thoughts.logits[n])
            of_decoded = energy(run, sample, of_symbols(decoded, thoughts.logits.shape[-1]))
            score("energy", -thoughts.energies[n])
            score("energy of a cell", -(cells * asked).sum(0) / asked.sum(0))
            score("highest energy of a cell", -cells.masked_fill(~asked, -torch.inf).amax(0))
            score("energy of a cell, decoded", -(of_decoded * asked).sum(0) / asked.sum(0))
    right = np.concatenate(solved)
    return {"solved": float(right.mean())} | {name: auroc(np.concatenate(of), right) for name, of in scores.items()}


def one_error(run: TrainedRun, samples: Sequence[Sample], seed: int = 0) -> dict[str, float]:
    """An error in one cell of the right grid: how often its energy is higher, and whether the cell's own is highest."""
    draw = torch.Generator().manual_seed(seed)
    symbols = run.task.puzzle.symbols  # type: ignore[attr-defined]
    higher, found = [], []
    for sample in samples:
        asked = sample.targets != GIVEN
        answer = torch.where(asked, sample.targets, sample.observed - 1)
        cell = (torch.rand(asked.shape, generator=draw) * asked).argmax(1)
        shift = torch.randint(1, symbols, (len(answer),), generator=draw)
        wrong = answer.clone()
        rows = torch.arange(len(answer))
        wrong[rows, cell] = (answer[rows, cell] + shift) % symbols
        right_energy, wrong_energy = (energy(run, sample, of_symbols(grid, symbols)) for grid in (answer, wrong))
        higher.append(wrong_energy.sum(0) > right_energy.sum(0))
        found.append(torch.where(asked.t(), wrong_energy, -torch.inf).argmax(0) == cell)
    return {"higher energy": float(torch.cat(higher).double().mean()), "cell": float(torch.cat(found).double().mean())}


def best_of(run: TrainedRun, samples: Sequence[Sample], steps: int, starts: int, std: float = 1.0) -> dict[str, float]:
    """Solved by one of several starts at noise: the first, that of lowest energy, of highest confidence, any."""
    draw = torch.Generator().manual_seed(0)
    symbols, out = run.task.puzzle.symbols, []  # type: ignore[attr-defined]
    for sample in samples:
        shape = (*sample.targets.shape, symbols)
        every = [think(run, sample, steps, std * torch.randn(shape, generator=draw)) for _ in range(starts)]
        solved = torch.stack([t.solved[-1] for t in every])
        energies, confidence = (torch.stack([getattr(t, n)[-1] for t in every]) for n in ("energies", "confidence"))
        pick = {"lowest energy": energies.argmin(0), "highest confidence": confidence.argmax(0)}
        row = {
            "one start": solved[0],
            **{k: solved.gather(0, i[None])[0] for k, i in pick.items()},
            "any": solved.any(0),
        }
        out.append(row)
    return {name: float(torch.cat([row[name] for row in out]).double().mean()) for name in out[0]}


def measure(
    run: TrainedRun,
    folder: str | None = None,
    count: int = 500,
    steps: int = 32,
    looked_at: int = 16,
    starts: int = 8,
) -> dict[str, Any]:
    """Measure everything above on the puzzles of one folder.

    Args:
        run: opened on one process.
        folder: of shards; None: the run's validation.
        count: of puzzles, at most.
        steps: the most.
        looked_at: the step after which verification and starts are looked at.
        starts: to choose among.
    """
    samples = [sample for _, sample in batches(run, folder, count)]
    found = [think(run, sample, most_steps(run, steps)) for sample in samples]
    out: dict[str, Any] = {
        "puzzles": sum(len(s.targets) for s in samples),
        "steps": against_steps(run, found, run.task.cost() if run.objective.thinks else _one_pass(run)),
        "verification": verification(run, list(zip(samples, found, strict=True)), looked_at),
    }
    if len(found[0].logits) > 2:
        out["stopping"] = stopping(found)
    if run.objective.thinks:
        out["one error"] = one_error(run, samples)
        out["starts"] = {"number": starts, **best_of(run, samples, looked_at, starts)}
    return out


def _one_pass(run: TrainedRun) -> Cost:
    """Return what one pass of a baseline costs; its task counts all passes that were trained."""
    whole, passes = run.task.cost(), run.recipe.puzzles.passes
    return Cost(whole.layers / passes, whole.vocabulary / (passes + (passes - 1) * 2 / 3))


def followed(run: TrainedRun, steps: int = 16) -> dict[str, Any]:
    """One puzzle filling in: of the first that are solved in the end, the one that takes longest.

    Returns:
        clues [S]; for each step the grid [S], the probability of every cell's symbol [S], and the energy.
    """
    _, sample = next(batches(run, None, 100))
    thoughts = think(run, sample, steps)
    first = torch.where(thoughts.solved[-1], thoughts.solved.int().argmax(0), -1)
    which = int(first.argmax())
    p, grid = thoughts.logits[:, which].softmax(-1).max(-1)
    return {
        "clues": sample.observed[which].tolist(),
        "answer": (thoughts.targets[which] + 1).tolist(),
        "grids": (grid + 1).tolist(),
        "probabilities": p.tolist(),
        "energies": thoughts.energies[:, which].tolist(),
    }
