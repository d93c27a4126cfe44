"""A study: several models trained with several seeds by the commands that anyone runs, and what they come to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from ebt_megatron.config import Recipe, load_recipe, to_yaml
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import machine
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.training.metrics import last_step

SEEDS: int = typer.Option(3, min=1, max=10, help="Runs of each model.")
OUTPUT: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs.")
_SHOWN = 2000  # characters of a failed command's errors
_ENDED = (130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1)  # codes of a command that was told to end
_commands: set[subprocess.Popen[str]] = set()  # those that run now


class Stopped(RuntimeError):
    """A command was told to end before it was done; a training that was goes on when it is started again."""


def folder_name(model: str) -> str:
    """The name of a model as its runs' folders have it."""
    return model.lower().replace("++", "pp").replace(",", "").replace(" ", "-")


def runs_option(folder: str) -> Any:
    """The option of where a study's runs go."""
    return typer.Option(Path(folder), help="Where the runs go; what is done there is not repeated.")


@dataclass(frozen=True)
class Model:
    """What is trained: a recipe by name with changes; flops_of: for as many FLOPs as that model."""

    recipe: str
    overrides: tuple[str, ...] = ()
    flops_of: str | None = None


class Study(ABC):
    """Models trained with several seeds each, evaluated, and shown in tables and a plot.

    Every run is trained on one process. A run that is done is not repeated, and one that was stopped goes on.

    Args:
        runs: where the runs go.
        steps: of models that are not trained for as many FLOPs as another; None: their recipes'.

    Attributes:
        name: of the results' files.
        title: what was done; begins the text above the tables.
        notes: end that text.
        models: by name.
        given: overrides of every model's recipe.
        first_seed: training.seed of the first run of a model.
    """

    name: str
    title: str
    models: Mapping[str, Model]
    notes: str = ""
    given: Sequence[str] = ()
    first_seed: int = 1234

    def __init__(self, runs: Path, steps: int | None = None):
        self.runs, self.steps, self.console = runs, steps, Console(width=160)

    @abstractmethod
    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Train and evaluate, unless that is done; returns what the summary needs."""

    @abstractmethod
    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """One model's numbers over its seeds.

        Args:
            name: of the model.
            results: of `run`, one for each seed.
            recipe: of the first seed's run.
        """

    @abstractmethod
    def tables(self, results: dict[str, Any]) -> list[Table]:
        """What `results` gives, for people."""

    @abstractmethod
    def plot(self, results: dict[str, Any]) -> bytes:
        """A PNG of what `results` gives."""

    def said(self, result: dict[str, Any]) -> str:
        """What is printed when a run is done."""
        return "done"

    def folder(self, name: str, seed: int) -> Path:
        """Return the folder of the run of a model with a seed."""
        return self.runs / f"{folder_name(name)}-{seed}"

    def flops(self, recipe: Recipe) -> float:
        """Return the FLOPs that a training takes."""
        from ebt_megatron.data.folder import ShardFolder
        from ebt_megatron.objectives.flops import training_flops
        from ebt_megatron.tasks import open_task

        task = open_task(recipe, ShardFolder(recipe.data.train[0]))
        return recipe.training.steps * training_flops(recipe, task.cost())

    def recipe(self, name: str, seed: int) -> Recipe:
        """The recipe of one run, its number of steps resolved."""
        model = self.models[name]

        def load(recipe: Model, steps: int | None) -> Recipe:
            more = [f"training.seed={self.first_seed + seed}", f"training.output_dir={self.folder(name, seed)}"]
            more += [] if steps is None else [f"training.steps={steps}"]
            return load_recipe(recipe.recipe, [*recipe.overrides, *self.given, *more])

        recipe = load(model, self.steps)
        if model.flops_of is None:
            return recipe
        budget = self.flops(load(self.models[model.flops_of], self.steps))
        return load(model, round(recipe.training.steps * budget / self.flops(recipe)))

    def train_all(self, names: Sequence[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
        """What `run` returns of each seed, by model; the first seed of all models comes first."""
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        jobs = [(name, seed) for seed in range(seeds) for name in names]
        for name, seed in track(jobs, description="train", console=self.console, transient=True):
            done[name].append(self.run(self.recipe(name, seed)))
            self.console.print(f"{name}, seed {seed}: {self.said(done[name][-1])}", markup=False, highlight=False)
        return done

    def results(self, names: Sequence[str], seeds: int) -> dict[str, Any]:
        """What was found, as JSON has it: the machine, and each model's summary."""
        done = self.train_all(names, seeds)
        models = [self.summary(name, of, self.recipe(name, 0)) for name, of in done.items()]
        return {"machine": machine(), "seeds": seeds, "models": models}

    def markdown(self, results: dict[str, Any]) -> str:
        """The tables, below what was measured where."""
        where = results["machine"]
        begin = (
            f"{self.title} on {where['machine']}, torch {where['torch']}, {where['date']}. Mean ± half-width of the "
            f"95 % interval over {results['seeds']} seeds.{self.notes and f' {self.notes}'}"
        )
        return "\n\n".join([begin, *(f"{t.title}:\n\n{t.markdown()}" for t in self.tables(results))]) + "\n"

    def chosen(self, asked: Sequence[str]) -> list[str]:
        """The models asked for; all, if none is.

        Raises:
            typer.BadParameter: if there is no such model.
        """
        if unknown := [name for name in asked if name not in self.models]:
            raise typer.BadParameter(f"no model '{unknown[0]}': choose of {'; '.join(self.models)}")
        return list(asked or self.models)

    def conduct(self, names: Sequence[str], seeds: int, output: Path | None) -> None:
        """Do it all, print the tables, and write NAME-cpu-DATE.json, .md and .png.

        Args:
            names: of models.
            seeds: runs of each model.
            output: folder for the results; None: where the runs are.
        """
        results = self.results(names, seeds)
        text = self.markdown(results)
        self.console.print(text, markup=False, highlight=False)
        write_results(output or self.runs, self.name, results, text, self.plot(results))


def write_results(folder: Path, name: str, results: Any, text: str, plot: bytes) -> None:
    """Write NAME-cpu-DATE.json, .md and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}-cpu-{date.today().isoformat()}"
    write_whole(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_whole(stem.with_suffix(".md"), text)
    write_whole(stem.with_suffix(".png"), plot)


def command(module: str, *arguments: str) -> None:
    """Run `python -m MODULE ...` on one thread.

    Raises:
        Stopped: if it was told to end.
        RuntimeError: if it fails; with the end of its errors.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        _commands.add(process)
        _, errors = process.communicate()
        _commands.discard(process)
    if process.returncode:
        kind = Stopped if process.returncode in _ENDED else RuntimeError
        raise kind(f"{' '.join(line[2:])} ended with code {process.returncode}:\n{errors[-_SHOWN:]}")


def stop_commands() -> None:
    """Tell all that run now to end; trainings save before they do."""
    for process in list(_commands):
        process.terminate()


def evaluated(result: Path, folder: Path, *arguments: str) -> Any:
    """What `ebt-evaluate FOLDER ...` writes to a JSON file; it is not run where that is there."""
    if not result.exists():
        command("ebt_megatron.evaluate", str(folder), *arguments)
    return json.loads(result.read_text())


def train(
    recipe: Recipe, *evaluation: str, result: str = "evaluation.json"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train and evaluate on one process; a run that is done is not repeated, one that was stopped goes on.

    Args:
        recipe: of the run, resolved.
        evaluation: more arguments of `ebt-evaluate`.
        result: the file that these make it write.

    Returns:
        (what the evaluation wrote, the rows of metrics.jsonl).

    Raises:
        Stopped: if the training was told to end before its last step.
        RuntimeError: if a command fails.
    """
    folder = Path(recipe.training.output_dir)
    if not (folder / result).exists():
        folder.mkdir(parents=True, exist_ok=True)
        asked = folder / "asked.yaml"
        asked.write_text(to_yaml(recipe))
        command("ebt_megatron.train", str(asked))
        if (step := last_step(folder)) < recipe.training.steps:
            raise Stopped(f"{folder} is at step {step} of {recipe.training.steps}")
    wrote = evaluated(folder / result, folder, *evaluation)
    return wrote, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
