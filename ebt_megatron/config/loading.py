"""Reading recipes: files, overrides, and errors of one line.

A recipe is one YAML file whose keys are the fields of `Recipe`; `base` names another recipe that it changes.
`load_recipe` merges, in this order, the defaults, the base, the file, and `key=value` overrides, resolves the model
size, and checks that everything fits together before anything else starts.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ebt_megatron.config.catalog import find_recipe
from ebt_megatron.config.recipe import Recipe, resolve
from ebt_megatron.core.cli import say
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.own_modules import look_in


def all_keys(cls: type = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key a recipe may contain, e.g. 'model.hidden_size'."""
    keys = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            keys += all_keys(type(default), f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def _check_keys(given: Any, where: str) -> None:
    """Raise RecipeError on the first key of a nested mapping that no recipe has."""
    known = set(all_keys())

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            is_group = any(k.startswith(path + ".") for k in known)
            if isinstance(value, dict) and is_group:
                walk(value, path + ".")
            elif path not in known:
                near = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.5)
                hint = f"; did you mean '{near[0]}'?" if near else "; --help lists the keys"
                raise RecipeError(f"{where}: unknown key '{path}'{hint}")
            elif is_group:
                raise RecipeError(f"{where}: '{path}' is a group of keys, not a value")

    walk(given, "")


def _values(given: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a layer and their values."""
    for key, value in given.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_meant(given: dict[Any, Any], cls: type) -> dict[str, Any]:
    """A layer of a recipe with `1e3` where a whole number belongs as 1000, and one name as a list of one.

    Args:
        given: what a file or the command line says.
        cls: the dataclass it fills.
    """
    hints, out = get_type_hints(cls), {}
    for key, value in given.items():
        hint = hints.get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(hint):
            value = _as_meant(value, hint)  # type: ignore[arg-type]
        elif isinstance(value, float) and value.is_integer() and hint in (int, int | None):
            value = int(value)
        elif isinstance(value, str) and hint == list[str] and not value.startswith("${"):
            value = [value]
        out[key] = value
    return out


def _with_today_names(given: dict[Any, Any], where: str) -> dict[Any, Any]:
    """A recipe of an earlier version, with its settings under today's names; e.g. the recipe.yaml of an old run."""
    model = given.get("model")
    if isinstance(model, dict) and model.get("architecture") == "transformer":
        say(f"warning: {where}: model.architecture=transformer is baseline since 0.2; the old name goes with 0.3")
        model["architecture"] = "baseline"
    thinking = given.get("thinking")
    if not isinstance(thinking, dict):
        return given
    if "descend_on" in thinking:
        rules = {"logits": "logit_descent", "probabilities": "probability_descent"}
        before = thinking.pop("descend_on")
        thinking["step_rule"] = rules.get(before, before)
    if thinking.get("initial") == "zeros":
        thinking |= {"initial": "noise", "initial_std": 0.0}
    return given


def _value_error(where: str, error: OmegaConfBaseException) -> RecipeError:
    hint = "; environment variables are ${oc.env:NAME}" if isinstance(error, InterpolationKeyError) else ""
    reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
    return RecipeError(f"{where}: {getattr(error, 'full_key', '')}: {reason}{hint}")


def _files(path: str | Path, inside: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """A recipe file and, before it, the recipe it names as its `base`, with that one's."""
    file = find_recipe(path)
    if file in inside:
        raise RecipeError(f"{path}: its base comes back to it: {' -> '.join(map(str, (*inside, file)))}")
    try:
        layer: Any = OmegaConf.load(file)
    except Exception as error:  # yaml raises its own family of errors
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    base = layer.pop("base", None) if OmegaConf.is_dict(layer) else None
    before: list[tuple[str, Any]] = []
    if base is not None:
        beside = file.parent / str(base)
        before = _files(beside if beside.is_file() else str(base), (*inside, file))
    return [*before, (str(path), layer)]


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, resolve sizes and check it.

    Args:
        path: a YAML file, or the name of one in recipes/ ("text/s1_xxs"), or None for the defaults alone.
        overrides: e.g. ["model.hidden_size=256", "parallel.tensor=2"].

    Raises:
        RecipeError: with one line naming what is wrong and the fix.
    """
    layers = _files(path, ()) if path is not None else []
    for item in overrides:
        if "=" not in item:
            raise RecipeError(f"override '{item}' is not key=value")
        try:
            layers.append(("command line", OmegaConf.from_dotlist([item])))
        except Exception as error:
            reason = getattr(error, "problem", None) or error
            raise RecipeError(f"override '{item}' is not a YAML value ({reason}): quote it") from None

    merged: Any = OmegaConf.structured(Recipe)
    missing: dict[str, str] = {}  # keys whose last value is ???, which OmegaConf takes for no value at all; and where
    for where, layer in layers:
        given = OmegaConf.to_container(layer)
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: a recipe is a mapping of keys to values")
        given = _with_today_names(given, where)
        _check_keys(given, where)
        for key, value in _values(given):
            missing.pop(key, None)
            if "???" in (value if isinstance(value, list) else [value]):
                missing[key] = where
        try:
            merged = OmegaConf.unsafe_merge(merged, OmegaConf.create(_as_meant(given, Recipe)))  # no copy each time
        except OmegaConfBaseException as error:
            raise _value_error(where, error) from None
    for key, where in missing.items():
        raise RecipeError(f"{where}: {key}=??? is a value that is still missing: give it")
    try:
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _value_error(str(path or "recipe"), error) from None
    assert isinstance(recipe, Recipe)
    resolve(recipe)
    if ":" in recipe.data.modality:
        look_in(*([] if path is None else [find_recipe(path).parent]), Path.cwd())
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML, loadable again."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))
