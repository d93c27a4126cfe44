"""`ebt_megatron.load`: a run, an exported folder or a model of the Hub, ready to be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ebt_megatron.core.errors import RecipeError

if TYPE_CHECKING:
    from ebt_megatron.api.model import Model
    from ebt_megatron.session import TrainedRun

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp32"}


@contextmanager
def without_a_trace() -> Iterator[None]:
    """Leave the caller's random numbers and warnings as they are; libraries warn of what nobody asked for."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and dtype not in _PRECISIONS:
        names = ", ".join(str(d).removeprefix("torch.") for d in _PRECISIONS)
        raise RecipeError(f"dtype={given}: choose one of {names}, or None for what it was trained in")
    return dtype


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Any:
    """A trained model, ready to be used.

    Several models may be loaded in one process. The first one starts a process group of one rank, which Megatron's
    layers ask for; nothing is to be set up, and nothing is reached over the network but the Hub.

    Args:
        name: a run's folder (its newest good checkpoint), a folder of `ebt-convert export`, or USER/MODEL on the Hub.
        device: "cpu", "cuda", "cuda:1"; default: the GPU, if there is one.
        dtype: float32, bfloat16 or float64, as a torch.dtype or by name; default: what it was trained in.
        revision: of a model on the Hub.

    Returns:
        A `TextModel`, `VideoModel`, `ImageModel` or `PuzzleModel`; a `Model` for a modality of your own.

    Raises:
        RecipeError: in one line, where there is no such model or it cannot be used here.
        DataError: where what it keeps of its data is damaged.
    """
    chosen = _dtype(dtype)
    target = None if device is None else torch.device(device)
    if target is not None and target.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device={device}: torch sees no GPU here; leave it out, or say cpu")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RecipeError(
            f"torch.distributed has {dist.get_world_size()} ranks here, and a loaded model is one process's: load it "
            "before the process group, or use ebt-generate under torchrun"
        )
    warnings.filterwarnings("ignore", module=r"megatron\.")  # for good: it warns at every pass of things to come
    with without_a_trace():
        from ebt_megatron.session import load_run
        from ebt_megatron.sharing.hub import local_folder

        folder = local_folder(name, revision)
        overrides = [] if chosen is None else [f"training.precision={_PRECISIONS[chosen]}"]
        if target is not None and target.type == "cpu":
            overrides.append("model.kernels=torch")
        run = load_run(folder, overrides, splits=(), alone=True)
        if target is not None:
            run.model.to(target)
            run.state = replace(run.state, device=target)
            run.objective.state = run.state
        if chosen is torch.float64:
            run.model.double()
        return model_of(run)


def model_of(run: TrainedRun) -> Model:
    """The model of a run, by its modality."""
    from ebt_megatron.api.images import ImageModel
    from ebt_megatron.api.model import Model
    from ebt_megatron.api.puzzles import PuzzleModel
    from ebt_megatron.api.text import TextModel
    from ebt_megatron.api.video import VideoModel
    from ebt_megatron.tasks.images import Images
    from ebt_megatron.tasks.puzzles import Puzzles
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.tasks.video import Video

    kinds: list[tuple[type, type[Model]]] = [
        (Text, TextModel),
        (Video, VideoModel),
        (Images, ImageModel),
        (Puzzles, PuzzleModel),
    ]
    return next((model for task, model in kinds if isinstance(run.task, task)), Model)(run)
