"""A dataclass's fields as options of a command."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any

import typer


def options_of(
    options: type, panel: str, without: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command an option for every field of a dataclass; it gets them by keyword, beside its own.

    Args:
        options: the dataclass; a field's metadata says its "help".
        panel: the heading in --help.
        without: fields that the command sets itself.
    """

    def added(command: Callable[..., Any]) -> Callable[..., Any]:
        types = typing.get_type_hints(options)
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields: Any = dataclasses.fields(options)
        extra = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, annotation=types[f.name],
                default=typer.Option(f.default, help=f.metadata["help"], rich_help_panel=panel),
            )
            for f in fields
            if f.name not in without
        ]  # fmt: skip
        command.__signature__ = signature.replace(parameters=[*own, *extra])  # type: ignore[attr-defined]
        command.__annotations__ |= types
        return command

    return added
