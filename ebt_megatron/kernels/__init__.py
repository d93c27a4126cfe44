"""How the hot parts run. `select` is the one dispatch table; `interface` says what is offered.

Backends: `reference` (plain formulas, the judge), `torch` (tiled, for CPU, and wherever
there is no Triton).
"""

from __future__ import annotations

from dataclasses import fields

from ebt_megatron.kernels import noise, reference, tiled
from ebt_megatron.kernels.interface import Kernels, RefineStats

__all__ = ["Kernels", "RefineStats", "select"]

# Where each backend's operations come from: the first module that has them.
_MODULES = {
    "reference": (reference, noise),
    "torch": (tiled, noise, reference),
}


def select(name: str = "auto") -> Kernels:
    """The operations of a backend.

    Args:
        name: "reference", "torch" or "auto".

    Raises:
        ValueError: for any other name.
    """
    if name == "auto":
        name = "torch"
    if name not in _MODULES:
        raise ValueError(f"no kernels '{name}': choose auto or one of {', '.join(_MODULES)}")
    modules = _MODULES[name]
    names = [f.name for f in fields(Kernels) if f.name != "name"]
    return Kernels(name, **{op: next(getattr(m, op) for m in modules if hasattr(m, op)) for op in names})
