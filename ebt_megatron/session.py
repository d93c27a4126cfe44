"""Opens a recipe or a run: the one bring-up of training, evaluation, inference and tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ebt_megatron.checkpoint.checkpoints import Checkpoints, chosen, fingerprint
from ebt_megatron.checkpoint.exported import is_exported, load_weights
from ebt_megatron.checkpoint.history import located
from ebt_megatron.config import Recipe, RecipeError, check, load_recipe
from ebt_megatron.core.machine import MACHINE
from ebt_megatron.core.own_modules import look_in
from ebt_megatron.core.records import record_of
from ebt_megatron.core.timing import Timers
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import Loader
from ebt_megatron.model.sharding import StageModule
from ebt_megatron.objectives import build_objective
from ebt_megatron.objectives.interface import Objective
from ebt_megatron.parallel.setup import ALONE, ParallelState, initialize, shutdown
from ebt_megatron.tasks import Task, open_task
from ebt_megatron.tasks.build import build_model

DATA = "data_description"  # in a run directory: manifest without shards, and the tokenizer or encoder
# A run is opened on a layout of its own: one process, unless started by torchrun with overrides.
_ONE_PROCESS = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence_parallel=false",
    "parallel.distributed_optimizer=false",
    "training.cuda_graphs=false",
)


def bring_up(recipe: Recipe) -> ParallelState:
    """Join the other ranks in the recipe's layout; once for each session.

    Raises:
        RecipeError: where layout and recipe do not fit the number of ranks.
    """
    state = initialize(recipe.parallel, recipe.training.seed)
    check(recipe, state.world_size)
    return state


@dataclass
class Session:
    """A recipe on its ranks, with its data.

    Attributes:
        recipe: resolved, and checked against the number of ranks.
        state: this rank's place in the layout.
        data: this data-parallel rank's loader of each split that was asked for.
        source: what describes the data.
        task: the modality.
    """

    recipe: Recipe
    state: ParallelState
    data: dict[str, Loader]
    source: Description
    task: Task

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        splits: Sequence[str],
        source: Description | None = None,
        state: ParallelState | None = None,
    ) -> Session:
        """Join the other ranks and open the data.

        Args:
            recipe: resolved.
            splits: "train", "validation"; at least one without `source`.
            source: what describes the data; default: the first split.
            state: what `bring_up` gave, where that is done.

        Raises:
            RecipeError, DataError: where layout or data do not do.
        """
        state = state or bring_up(recipe)
        data = {split: Loader(recipe, split, state.data_rank, state.data_size) for split in splits}
        source = source or data[splits[0]].sources[0]
        task = open_task(recipe, source)
        for split, loader in data.items():
            identity = task.identity if loader.sources[0] is source else open_task(recipe, loader.sources[0]).identity
            if differs := [key for key, value in task.identity.items() if identity[key] != value]:
                raise RecipeError(
                    f"data.{split} was not prepared like {source.folder} (another {', '.join(differs)}): "
                    "prepare one again"
                )
        return cls(recipe, state, data, source, task)

    @property
    def identity(self) -> dict[str, object]:
        """What a checkpoint must have in common with this recipe and data."""
        return fingerprint(self.recipe, self.task.identity)


@dataclass
class TrainedRun(Session):
    """A run directory opened to be used: its model with the newest good weights.

    Attributes:
        model: this pipeline stage.
        objective: evaluates it.
        step, tokens: how far it was trained.
    """

    model: StageModule
    objective: Objective
    step: int
    tokens: int


def recipe_of(run_dir: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, on one process.

    Raises:
        RecipeError: where it is no run directory, or an override does not do.
    """
    saved = located(run_dir)[0] / "recipe.yaml"
    if not saved.exists():
        raise RecipeError(f"{run_dir} is not a run directory: recipe.yaml is missing")
    recorded = saved.with_name(MACHINE)
    if recorded.exists() and (modules := record_of(recorded).get("modules")):
        look_in(Path(modules))
    return load_recipe(saved, [*_ONE_PROCESS, *overrides])


def load_run(
    run_dir: Path, overrides: Sequence[str] = (), splits: Sequence[str] = ("validation",), alone: bool = False
) -> TrainedRun:
    """A run's model, ready to be used; the process groups stay.

    Args:
        run_dir, overrides, splits: see `open_run`.
        alone: this process is all there is, whatever a launcher says.
    """
    recipe = recipe_of(run_dir, overrides)
    source, run_dir = run_dir, located(run_dir)[0]
    if alone:
        initialize(recipe.parallel, recipe.training.seed, ALONE)
    described = run_dir if is_exported(run_dir) else run_dir / DATA
    if described == run_dir:
        recipe.training.output_dir = str(run_dir)  # what messages call it
    if splits or not (described / "manifest.json").exists():  # runs of earlier versions keep nothing
        session = Session.open(recipe, splits or ["validation"])
    else:
        session = Session.open(recipe, [], Description(str(described)))
    model = build_model(recipe, session.task).to(session.state.device)
    if described == run_dir:
        step, tokens = load_weights(run_dir, model, recipe, session.identity)
    else:
        checkpoints = Checkpoints(run_dir / "checkpoints", 1, session.identity)
        step, extra, _ = checkpoints.load(chosen(source), model)
        tokens = extra["tokens"]
    model.eval()
    objective = build_objective(model, recipe, session.task, session.state, Timers())
    return TrainedRun(**vars(session), model=model, objective=objective, step=step, tokens=tokens)


@contextmanager
def open_run(
    run_dir: Path, overrides: Sequence[str] = (), splits: Sequence[str] = ("validation",)
) -> Iterator[TrainedRun]:
    """A run's model, ready to be used, until the context ends.

    Args:
        run_dir: a training.output_dir, a checkpoint in it (see `checkpoint.history.located`), or a folder of
            `ebt-convert export`.
        overrides: of its recipe: key=value.
        splits: which data to open besides; with none, what the run keeps of its data does, and the run directory is
            all that is needed.

    Raises:
        RecipeError: where it is no run directory, or holds no checkpoint.
        DataError: where the data does not fit.
    """
    yield load_run(run_dir, overrides, splits)
    shutdown()
