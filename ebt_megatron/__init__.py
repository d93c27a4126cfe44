"""EBT-Megatron: pretraining of Energy-Based Transformers at scale, and trained models ready to be used.

    import ebt_megatron as ebt

    model = ebt.load("runs/x")
    print(model.generate("Return the", steps=8).text)

What is used is imported when it is first asked for, so that this import itself is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebt_megatron.api.loading import load as load
    from ebt_megatron.core.errors import DataError as DataError
    from ebt_megatron.core.errors import RecipeError as RecipeError
    from ebt_megatron.sharing.hub import push_to_hub as push_to_hub

_WHERE = {
    "load": "ebt_megatron.api.loading",
    "push_to_hub": "ebt_megatron.sharing.hub",
    "RecipeError": "ebt_megatron.core.errors",
    "DataError": "ebt_megatron.core.errors",
}

__all__ = ["DataError", "RecipeError", "__version__", "load", "push_to_hub"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from ebt_megatron.core.version import installed_version

        return installed_version()
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
