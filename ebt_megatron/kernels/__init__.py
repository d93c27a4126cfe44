"""Has the operations that take most of the time. `interface` says which, and `select` chooses a backend.

There are three backends. `reference` has plain formulas and is the judge of the others. `torch` is tiled, for CPU and
wherever there is no Triton. `triton` is for GPUs; the vocabulary's products stay with cuBLAS.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch

from ebt_megatron.kernels.interface import Kernels, RefineStats, StepRule

__all__ = ["Kernels", "RefineStats", "StepRule", "select"]

# Where each backend's operations come from: the first module that has them.
_MODULES = {
    "reference": ("reference", "rotary", "noise", "fp8"),
    "torch": ("tiled", "tiled_joint", "cached", "rotary", "noise", "fp8", "reference"),
    "triton": (
        "triton_attention",
        "triton_elementwise",
        "triton_vocabulary",
        "triton_fp8",
        "tiled",
        "tiled_joint",
        "cached",
        "noise",
        "reference",
    ),
}


def _offered(module: ModuleType, operation: str) -> Callable[..., Any] | None:
    """A module's operation, if it has it; those of the vocabulary are methods of its `vocabulary`, if it has that."""
    if operation.startswith("vocab_") and hasattr(module, "vocabulary"):
        return getattr(module.vocabulary, operation.removeprefix("vocab_"))
    return getattr(module, operation, None)


def select(name: str = "auto") -> Kernels:
    """The operations of a backend.

    Args:
        name: "reference", "torch", "triton" or "auto" (triton where there is CUDA, else torch).

    Raises:
        ValueError: for any other name, or triton where it is not installed.
    """
    if name == "auto":
        name = "triton" if torch.cuda.is_available() else "torch"
    if name not in _MODULES:
        raise ValueError(f"no kernels '{name}': choose auto or one of {', '.join(_MODULES)}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("kernels 'triton' need the triton package: install it, or choose torch")
    modules = [importlib.import_module(f"{__name__}.{module}") for module in _MODULES[name]]
    names = [f.name for f in fields(Kernels) if f.name != "name"]
    return Kernels(name, **{op: next(f for m in modules if (f := _offered(m, op)) is not None) for op in names})
