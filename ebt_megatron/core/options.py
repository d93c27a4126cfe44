"""Dataclasses as options of a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import typer


def option(default: Any = ..., *flags: str, **about: Any) -> Any:
    """A dataclass's field that is an option of a command, too.

    Args:
        default: of both; none: it must be given.
        flags: names of the option, where it is not the field's.
        about: what typer.Option is told: `help`, `min`, ...
    """
    start = dataclasses.MISSING if default is ... else default
    return dataclasses.field(default=start, metadata={"option": typer.Option(default, *flags, **about)})


def dataclass_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ask for the fields of a command's parameters that are dataclasses by an option each.

    The command is given the dataclasses, made of what the options say; fields that `option` does not declare keep
    their default.
    """
    types, parameters = typing.get_type_hints(command), []
    fields: dict[str, list[str]] = {}  # of each parameter that is a dataclass
    annotations: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = types[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            annotations[parameter.name] = kind
            continue
        ordered = sorted(dataclasses.fields(kind), key=lambda f: f.kw_only is True)  # as __init__ takes them
        declared = [f for f in ordered if "option" in f.metadata]
        fields[parameter.name] = [f.name for f in declared]
        field_types = typing.get_type_hints(kind)
        for f in declared:
            annotations[f.name] = field_types[f.name]
            parameters.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.metadata["option"]))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, names in fields.items():
            given[name] = types[name](**{n: given.pop(n) for n in names})
        return command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    return run
