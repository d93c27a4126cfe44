"""Where modules of a user's own are found: beside the recipe that names them, in the working folder, on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def look_in(*folders: Path) -> None:
    """Let modules of folders be imported, those of the path first."""
    for folder in map(str, (folder.resolve() for folder in folders)):
        if folder not in sys.path:
            sys.path.append(folder)


def folder_of(module: str) -> Path | None:
    """The folder on the path that a module, of a package or not, is imported from; None: it cannot be found."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).resolve().parents[module.count(".") + (Path(spec.origin).name == "__init__.py")]
