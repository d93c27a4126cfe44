"""Has the modalities, a module each: what a batch means to a model, the models, and what their evaluation is."""

from __future__ import annotations

import importlib
from typing import TypeVar

from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.data.description import Description
from ebt_megatron.tasks.interface import Meter, NoMeter, Sample, Task

__all__ = ["TASKS", "Meter", "NoMeter", "Sample", "Task", "open_task", "task_as", "task_class"]

T = TypeVar("T")
TASKS = {
    "text": "ebt_megatron.tasks.text:Text",
    "images": "ebt_megatron.tasks.images:Images",
    "video": "ebt_megatron.tasks.video:Video",
    "puzzles": "ebt_megatron.tasks.puzzles:Puzzles",
}


def task_class(modality: str) -> type[Task]:
    """The class that data.modality names: a name of TASKS, or package.module:Class.

    Raises:
        RecipeError: if there is none.
    """
    path = TASKS.get(modality, modality)
    module, colon, name = path.partition(":")
    try:
        if not colon:
            raise ImportError
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        why = f" ({error})" if str(error) else ""
        raise RecipeError(
            f"data.modality={modality}: choose one of {', '.join(TASKS)}, or package.module:Class of your own{why}"
        ) from None


def task_as(task: Task, wanted: type[T]) -> T:
    """The task, where it is a `wanted`.

    Raises:
        RecipeError: where it is about something else.
    """
    if not isinstance(task, wanted):
        raise RecipeError(f"this is about {wanted.__name__.lower()}, and the run about {type(task).__name__.lower()}")
    return task


def open_task(recipe: Recipe, source: Description) -> Task:
    """The recipe's task on the data of `source`.

    Raises:
        RecipeError: for a modality there is not.
        DataError: for data of another kind.
    """
    task = task_class(recipe.data.modality)
    if source.manifest.kind != task.kind:
        raise DataError(
            f"{source.folder} holds {source.manifest.kind}, data.modality={recipe.data.modality} reads "
            f"{task.kind}: change one"
        )
    return task.from_data(recipe, source)
