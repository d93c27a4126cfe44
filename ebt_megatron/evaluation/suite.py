"""The evaluation suite of a text model: what thinking, energy and Transformer++ each give, measured beside each other.

Every part is a function of per-position scores (`ebt_megatron.evaluation.token_scores`) and returns plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.loader import Loader, MicroBatch
from ebt_megatron.evaluation import statistics
from ebt_megatron.evaluation.interface import SuiteOptions
from ebt_megatron.evaluation.token_scores import CORRUPTIONS, TokenScores, corrupted, score
from ebt_megatron.evaluation.token_trace import token_trace
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.session import TrainedRun, open_run
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.text import Text, perplexity

Numbers = dict[str, Any]
CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
TOLERANCES = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
_CORRUPTED_SHARE, _SEED = 0.15, 0


def _perplexity(losses: np.ndarray) -> float:
    """Return the perplexity of a mean over positions."""
    return perplexity(float(losses.mean()))


# --- the parts ----------------------------------------------------------------------------------------


def thinking(scores: TokenScores) -> list[Numbers]:
    """Loss, perplexity, accuracy and changed answers after each step."""
    rows = []
    for i, loss in enumerate(scores.loss):
        flips = float((scores.answer[i] != scores.answer[i - 1]).mean()) if i else None
        rows.append(
            {
                "steps": scores.first + i,
                "loss": float(loss.mean()),
                "perplexity": _perplexity(loss),
                "accuracy": float(scores.right[i].mean()),
                "changed": flips,
            }
        )
    return rows


def starts(each: Sequence[TokenScores], step: int, baselines: Mapping[str, Sequence[TokenScores]]) -> list[Numbers]:
    """Perplexity and accuracy of M starts by what chooses among them, for M = 1, 2, 4 ... all.

    A feed-forward model starts nowhere: its M candidates are tokens drawn, and the likeliest by itself is kept.

    Args:
        each: scores from different starts.
        step: thinking steps that all take.
        baselines: by name, theirs with different draws.
    """
    loss = np.stack([s.loss[s.row(step)] for s in each])
    right = np.stack([s.right[s.row(step)] for s in each])
    final = np.stack([s.energy[step] for s in each])
    drop = np.stack([s.energy[0] - s.energy[step] for s in each])
    counts = [m for m in (2**i for i in range(10)) if m < len(each)] + [len(each)]
    rows = []
    for m in counts:
        of, at = slice(0, m), np.arange(loss.shape[1])
        temperature = max(float(final[of].std(0).mean()), 1e-12)
        weight = np.exp(-(final[of] - final[of].min(0)) / temperature)
        chosen = {
            "lowest energy": final[of].argmin(0),
            "largest drop": drop[of].argmax(0),
            "best loss (an oracle)": loss[of].argmin(0),
        }
        by = {
            name: {"perplexity": _perplexity(loss[k, at]), "accuracy": float(right[k, at].mean())}
            for name, k in chosen.items()
        }
        for name, w in (("mixture by exp(-E / tau)", weight), ("even mixture", np.ones_like(weight))):
            by[name] = {"perplexity": _perplexity(-np.log((w / w.sum(0) * np.exp(-loss[of])).sum(0)))}
        for name, draws in {"": each, **baselines}.items():
            log_p, token = (np.stack([getattr(d, key) for d in draws[:m]]) for key in ("drawn_log_p", "drawn"))
            likeliest = token[log_p.argmax(0), at]
            by[f"likeliest of the tokens drawn{name and ', ' + name}"] = {
                "accuracy": float((likeliest == each[0].target).mean())
            }
        rows.append({"starts": m, "by": by})
    return rows


def corruption(
    scores: Callable[[str], tuple[TokenScores, np.ndarray]], baselines: Mapping[str, Callable[[str], TokenScores]]
) -> list[Numbers]:
    """AUROC of "was this token corrupted" by the token's energy, by its improbability, and by baselines' improbability.

    Args:
        scores: of a kind of corruption, and which positions it made wrong.
        baselines: by name, theirs on the same text.
    """
    rows = []
    for kind in CORRUPTIONS:
        ours, wrong = scores(kind)
        row = {
            "kind": kind,
            "token energy": statistics.auroc(ours.token_energy, wrong),
            "-log p": statistics.auroc(ours.loss[-1], wrong),
        }
        rows.append(
            row | {f"-log p, {name}": statistics.auroc(of(kind).loss[-1], wrong) for name, of in baselines.items()}
        )
    return rows


def uncertainty(scores: TokenScores, step: int) -> Numbers:
    """How well a model knows what it does not know: its energy, entropy and confidence against loss and errors."""
    i = scores.row(step)
    doubts = {"entropy": scores.entropy[i], "1 - confidence": 1 - scores.confidence[i]}
    if len(scores.energy):
        doubts = {"energy": scores.energy[step], **doubts}
    return {
        "error rate": float(1 - scores.right[i].mean()),
        "calibration error": statistics.calibration_error(scores.confidence[i], scores.right[i]),
        "by": {
            name: {
                "rank correlation with loss": statistics.rank_correlation(doubt, scores.loss[i]),
                "AUROC of an error": statistics.auroc(doubt, ~scores.right[i]),
                "area under risk-coverage": statistics.area_under_risk_coverage(doubt, scores.right[i]),
                "curve": statistics.risk_coverage(doubt, scores.right[i])[:: max(1, len(doubt) // 100)].tolist(),
            }
            for name, doubt in doubts.items()
        },
    }


def dynamic_compute(scores: TokenScores, trained: int, flops: Callable[[float], float]) -> Numbers:
    """Perplexity against mean steps: the same for all positions, or as many as each needs.

    A position stops when its prediction hardly moves. Where thinking starts at the context's prediction it needs no
    step to stop: it does when it is confident, after as many as trained at the latest.

    Args:
        scores: of n steps.
        trained: the steps trained with, whose perplexity adaptive stopping is to reach.
        flops: of a position that thinks so many steps.
    """
    fixed = [
        {"steps": taken, "perplexity": _perplexity(loss), "flops": flops(taken)}
        for taken, loss in enumerate(scores.loss, scores.first)
    ]
    if scores.first:
        ways = [({"tolerance": tolerance}, scores.moved <= tolerance) for tolerance in TOLERANCES]
    else:
        confidence = scores.confidence[: scores.row(trained) + 1]
        ways = [({"confidence": enough}, confidence >= enough) for enough in CONFIDENCES]
    adaptive = []
    for way, still in ways:
        taken = np.where(still.any(0), still.argmax(0), len(still) - 1)
        loss = scores.loss[taken, np.arange(scores.loss.shape[1])]
        mean = float(taken.mean()) + scores.first
        adaptive.append({**way, "steps": mean, "perplexity": _perplexity(loss), "flops": flops(mean)})
    wanted = fixed[scores.row(trained)]
    enough = [row for row in adaptive if row["perplexity"] <= 1.005 * wanted["perplexity"]]
    cheapest = min(enough, key=lambda row: row["flops"], default=None)
    share = None if cheapest is None else cheapest["flops"] / wanted["flops"]
    return {"fixed": fixed, "adaptive": adaptive, "flops to reach the trained steps' perplexity": share}


def shift(inside: dict[str, TokenScores], outside: dict[str, TokenScores], reference: str, step: int) -> Numbers:
    """How far other text is, and what thinking gives there.

    Args:
        inside, outside: of every model, on validation and on the other text; the model that thinks is "".
        reference: the baseline by whose perplexities the shift is measured.
        step: thinking steps.
    """
    ours = outside[""]
    return {
        "shift": _perplexity(outside[reference].loss[-1]) / _perplexity(inside[reference].loss[-1]),
        "perplexity": {name: _perplexity(s.loss[s.row(step) if not name else -1]) for name, s in outside.items()},
        "gain over the first step": 1 - _perplexity(ours.loss[ours.row(step)]) / _perplexity(ours.loss[0]),
        "energy": float(ours.energy[step].mean()),
        "AUROC of being other text, by energy": statistics.auroc(
            np.concatenate([inside[""].energy[step], ours.energy[step]]),
            np.arange(len(inside[""].target) + len(ours.target)) >= len(inside[""].target),
        ),
    }


# --- all of them -----------------------------------------------------------------------------------------


def evaluate_suite(run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> Numbers:
    """Every part, for a run and its baselines; one process.

    Raises:
        RecipeError: for options that mean nothing, a run that is no text model, or a baseline that thinks.
        DataError: for other text that was made with another tokenizer.
    """
    options.check()
    with Progress(transient=True) as progress:
        bar = progress.add_task("suite", total=None)

        def doing(what: str) -> None:
            progress.update(bar, description=what)

        doing(f"{run_dir}")
        with open_run(run_dir, overrides) as run:
            if run.state.world_size > 1:
                raise RecipeError(f"{run_dir}: the suite is for one process")
            ours = _collect(run, options, doing)
        baselines: dict[str, _Collected] = {}
        for folder in options.baselines:
            doing(f"{folder}")
            with open_run(folder, overrides) as baseline:
                if baseline.objective.thinks or baseline.task.identity != ours.identity:
                    raise RecipeError(f"{folder}: a baseline is a feed-forward model with the tokenizer of {run_dir}")
                baselines[_name(folder, {ours.about["name"], *baselines})] = _collect(baseline, options, doing)
    return _results(ours, baselines)


def _name(folder: Path, taken: Collection[str]) -> str:
    """What a baseline is called: by its folder, and by all of its path where that is taken."""
    return folder.name if folder.name not in taken else str(folder)


@dataclass
class _Collected:
    """A model's scores on everything, and what it cost.

    Attributes:
        trained: thinking steps it was trained with; 1 for a feed-forward model.
    """

    trained: int
    identity: dict[str, Any]
    about: Numbers
    plain: TokenScores
    starts: list[TokenScores]
    corrupted: dict[str, tuple[TokenScores, np.ndarray]]
    shifts: dict[str, TokenScores]
    flops_of: Callable[[float], float]
    token_trace: Numbers | None


def _collect(run: TrainedRun, options: SuiteOptions, doing: Callable[[str], None]) -> _Collected:
    task = task_as(run.task, Text)
    trained = run.recipe.thinking.max_steps if run.objective.thinks else 1
    starts = run.objective.starts_at_context  # more steps than trained lead such a prediction away
    looked_at = max(options.steps or (1 if starts else 3) * trained, trained) if run.objective.thinks else 1

    def scores(micro_batches: Sequence[MicroBatch], most: int = looked_at, start: int = 0) -> TokenScores:
        return score(run.objective, [task.sample(b, run.state.device) for b in micro_batches], most, start)

    validation = _whole(run.data["validation"])
    doing(f"{run.recipe.name}: thinking")
    plain = scores(validation)
    more = []
    for start in range(1, options.starts):  # without noise they think alike, but draw other tokens
        doing(f"{run.recipe.name}: start {start + 1} of {options.starts}")
        more.append(scores(validation, trained, start))
    wrong = {}
    for kind in CORRUPTIONS:
        doing(f"{run.recipe.name}: {kind} tokens")
        changed = [
            corrupted(b.samples, kind, _CORRUPTED_SHARE, task.vocab_size, _SEED + i) for i, b in enumerate(validation)
        ]
        batches = [replace(b, samples=tokens) for b, (tokens, _) in zip(validation, changed, strict=True)]
        masks = np.concatenate([mask[:, 1:].t().reshape(-1).numpy() for _, mask in changed])
        wrong[kind] = scores(batches, trained), masks
    other = {}
    for name, folder in (options.shifts or {}).items():
        doing(f"{run.recipe.name}: {name}")
        recipe = replace(run.recipe, data=replace(run.recipe.data, validation=[folder]))
        loader = Loader(recipe, "validation", 0, 1)
        if loader.sources[0].manifest.tokenizer["sha256"] != task.identity["tokenizer"]:
            raise DataError(
                f"{folder} was made with another tokenizer than the run: prepare it with --tokenizer "
                "TRAIN_FOLDER/tokenizer.json"
            )
        other[name] = scores(_whole(loader), trained)
    cost, length = task.cost(), task.length

    def flops_of(taken: float) -> float:
        """Return the FLOPs of a position, which are linear in the steps it takes."""
        if not run.objective.thinks:
            return cost.inference() / length
        one, two = (cost.inference(steps, starts) for steps in (1, 2))
        return (one + (taken - 1) * (two - one)) / length

    about = {
        "name": run.recipe.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": run.step,
        "tokens": run.tokens,
        "training flops": run.step * training_flops(run.recipe, cost),
        "inference flops a token": flops_of(trained),
    }
    shown = None
    if run.objective.thinks:
        doing(f"{run.recipe.name}: token_trace")
        shown = token_trace(run, task.sample(validation[0], run.state.device))
    return _Collected(trained, run.task.identity, about, plain, [plain, *more], wrong, other, flops_of, shown)


def _of_kind(collected: _Collected, kind: str) -> TokenScores:
    return collected.corrupted[kind][0]


def _whole(loader: Loader) -> list[MicroBatch]:
    """Every sample of validation that counts, once."""
    out = []
    for batch in loader:
        kept = len(batch.sample_ids) if batch.counts is None else int(batch.counts.sum())
        if kept:
            out.append(replace(batch.part(0, kept), counts=None))
    return out


def _results(ours: _Collected, baselines: dict[str, _Collected]) -> Numbers:
    models = {ours.about["name"]: ours, **baselines}
    kinds = {name: partial(_of_kind, of) for name, of in baselines.items()}
    about = []
    for name, of in models.items():
        row = of.plain.row(of.trained)
        loss, right = of.plain.loss[row], of.plain.right[row]
        about.append(
            {
                **of.about,
                "name": name,
                "baseline": of is not ours,
                "loss": float(loss.mean()),
                "perplexity": _perplexity(loss),
                "accuracy": float(right.mean()),
            }
        )
    out: Numbers = {
        "positions": len(ours.plain.target),
        "trained steps": ours.trained,
        "models": about,
        "thinking": thinking(ours.plain),
        "uncertainty": {name: uncertainty(of.plain, of.trained) for name, of in models.items()},
    }
    if len(ours.plain.energy):
        out["token_trace"] = ours.token_trace
        out["starts"] = starts(ours.starts, ours.trained, {name: of.starts for name, of in baselines.items()})
        out["dynamic compute"] = dynamic_compute(ours.plain, ours.trained, ours.flops_of)
        out["corruption"] = corruption(lambda kind: ours.corrupted[kind], kinds)
        if reference := next(iter(baselines), None):
            inside = {"": ours.plain} | {name: of.plain for name, of in baselines.items()}
            out["shifts"] = {
                text: shift(
                    inside,
                    {"": there} | {name: of.shifts[text] for name, of in baselines.items()},
                    reference,
                    ours.trained,
                )
                for text, there in ours.shifts.items()
            }
    return out
