"""Recipes found by name: `text/s1_xxs` is recipes/text/s1_xxs.yaml, from any folder and where this is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

from ebt_megatron.core.errors import RecipeError

RECIPES = Path(__file__).parents[1] / "recipes"  # in a checkout a link to the folder beside the package


def recipe_names() -> dict[str, Path]:
    """The file of every recipe that comes with this project, by its name."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.yaml"))}


def find_recipe(given: str | Path) -> Path:
    """The file that is meant by a path, or by a name with or without `recipes/` and `.yaml`.

    Raises:
        RecipeError: with one line that names recipes like it.
    """
    if Path(given).is_file():
        return Path(given)
    names = recipe_names()
    name = Path(given).as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in names:
        return names[name]
    last = name.rpartition("/")[2]
    shorts = difflib.get_close_matches(last, sorted({full.rpartition("/")[2] for full in names}), n=3)
    near = (
        difflib.get_close_matches(name, names, n=3)
        or [full for short in shorts for full in names if full.rpartition("/")[2] == short][:3]
    )
    hint = f"; did you mean {' or '.join(near)}?" if near else "; ebt-train --list shows those that come with it"
    raise RecipeError(f"no recipe at {given}{hint}")


def describe_recipes() -> str:
    """Every recipe's name and the first line of its comment, and where they are."""
    names = recipe_names()
    width = max(map(len, names), default=0)
    lines = [f"{name:<{width}}  {path.read_text().splitlines()[0].lstrip('# ')}" for name, path in names.items()]
    return "\n".join([*lines, f"\nin {RECIPES}; a path works as well as a name"])
