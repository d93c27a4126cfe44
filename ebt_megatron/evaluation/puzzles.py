"""What thinking about puzzles is worth: solved against steps, whether the energy knows, and choosing among starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.loader import Loader, MicroBatch
from ebt_megatron.data.puzzles import Puzzle
from ebt_megatron.evaluation.statistics import auroc
from ebt_megatron.inference.puzzles import (
    RULES,
    Thoughts,
    energy,
    from_noise,
    last_steps,
    mean_of_asked,
    most_steps,
    of_symbols,
    think,
)
from ebt_megatron.model.flops import Cost
from ebt_megatron.prediction.cells import GIVEN
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks.interface import Sample

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


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
        By rule (`inference.puzzles.last_steps`) the mean number of steps taken, and the share of puzzles solved.
    """
    rules: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for thoughts in found:
        for rule in RULES[: 1 if thoughts.energies.isnan().any() else None]:
            last = last_steps(thoughts, rule)
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
        asked = thoughts.asked
        solved.append(thoughts.solved[n].numpy())
        score("confidence", thoughts.confidence[n])
        if run.objective.thinks:
            decoded = torch.where(asked, thoughts.grids[n], sample.observed - 1)
            cells = energy(run, sample, thoughts.logits[n])
            of_decoded = energy(run, sample, of_symbols(decoded, thoughts.logits.shape[-1]))
            score("energy", -thoughts.energies[n])
            score("energy of a cell", -mean_of_asked(cells, asked))
            score("highest energy of a cell", -cells.masked_fill(~asked.t(), -torch.inf).amax(0))
            score("energy of a cell, decoded", -mean_of_asked(of_decoded, asked))
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


def best_of(run: TrainedRun, samples: Sequence[Sample], steps: int, starts: int) -> dict[str, float]:
    """Solved by one of several starts at noise: the first, that of lowest energy, of highest confidence, any."""
    draw, out = torch.Generator().manual_seed(0), []
    for sample in samples:
        every = list(from_noise(run, sample, steps, starts, draw))
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
