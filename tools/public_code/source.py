"""A checkpoint file of the public code, and its weights, each of which is taken once."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebt_megatron.config import RecipeError

_WRAPPERS = {"module", "_orig_mod"}  # what DistributedDataParallel and torch.compile put into names


def read_checkpoint(path: Path, trust: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a Lightning checkpoint holds by name, without the names of wrappers, and its hyper-parameters.

    Args:
        path: a .ckpt file.
        trust: unpickle whatever it holds, which may run code of whoever made it.

    Raises:
        RecipeError: if it cannot be read, or is not such a checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=not trust)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "" if trust else "; if you trust its maker, --trust reads objects other than tensors"
        raise RecipeError(f"{path} cannot be read: {reason}{hint}") from None
    for key in ("state_dict", "hyper_parameters"):
        if not isinstance(stored, dict) or key not in stored:
            raise RecipeError(f"{path}: {key} is missing: not a Lightning checkpoint of the public code")
    given = stored["hyper_parameters"]
    hyper = vars(given) if isinstance(given, argparse.Namespace) else given
    if not isinstance(hyper, dict):
        raise RecipeError(f"{path}: hyper_parameters is {type(hyper).__name__}, not names and values")
    state = stored["state_dict"].items()
    return {".".join(p for p in key.split(".") if p not in _WRAPPERS): value for key, value in state}, dict(hyper)


class Source:
    """Weights of the public code, each to be taken once and in the expected shape.

    Args:
        weights: from `read_checkpoint`.
    """

    def __init__(self, weights: dict[str, Tensor]):
        self.left = dict(weights)

    def shape(self, key: str) -> torch.Size:
        """The shape of the weight `key`; raises RecipeError if it is missing."""
        if key not in self.left:
            raise RecipeError(f"{key} is missing")
        return self.left[key].shape

    def take(self, key: str, *shape: int) -> Tensor:
        """The weight `key`; raises RecipeError if it is missing or of another shape."""
        if tuple(self.shape(key)) != shape:
            raise RecipeError(f"{key} is {list(self.left[key].shape)}, expected {list(shape)}")
        return self.left.pop(key)

    def linear(self, theirs: str, ours: str, rows: int, columns: int) -> dict[str, Tensor]:
        """A linear layer's weight [rows, columns] and bias, under our names."""
        return {
            f"{ours}.weight": self.take(f"{theirs}.weight", rows, columns),
            f"{ours}.bias": self.take(f"{theirs}.bias", rows),
        }

    def modulation(self, theirs: str, ours: str, parts: int, width: int) -> dict[str, Tensor]:
        """What turns a condition into `parts` of an adaptive normalisation."""
        return self.linear(f"{theirs}.adaLN_modulation.1", ours, parts * width, width)

    def count(self, prefix: str) -> int:
        """How many numbered modules there are under a name."""
        pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
        return 1 + max((int(found[1]) for key in self.left if (found := pattern.match(key))), default=-1)

    def finish(self) -> None:
        """Raise RecipeError if a weight was not taken."""
        if self.left:
            raise RecipeError(f"{next(iter(self.left))} is not a weight of the models that are supported")


def interleaved(parts: Iterable[Tensor], blocks: int) -> Tensor:
    """Cut the rows of each part into `blocks`, and alternate: block 0 of each part, block 1 of each part, ..."""
    return torch.stack([part.unflatten(0, (blocks, -1)) for part in parts], 1).flatten(0, 2)
