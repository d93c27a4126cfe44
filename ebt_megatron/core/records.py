"""Numbers as JSON: written so that every reader takes them, and read although a killed run left half a row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebt_megatron.core.errors import DataError


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of numbers, names, lists and dictionaries; what is not finite, which JSON does not have, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def rows_of(path: Path) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """The rows of a file of JSON lines, each with its line; None for a line that is no row, such as half a one."""
    for line in path.read_text("utf-8", "replace").split("\n"):
        if line.strip("\0 \r"):
            row = None
            with suppress(ValueError):
                row = json.loads(line)
            yield row if isinstance(row, dict) else None, line


def record_of(path: Path) -> dict[str, Any]:
    """A JSON file's object; raises DataError, naming the file, where it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}): write it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object: write it again")
    return found
