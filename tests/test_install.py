"""What `pip install .` gives works from any folder, and finds recipes by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ebt_megatron.config import RecipeError, load_recipe
from ebt_megatron.config.catalog import RECIPES, describe_recipes, find_recipe, recipe_names

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "train",
    "evaluate",
    "prepare",
    "shards",
    "plan",
    "convert",
    "import",
    "pictures",
    "report",
    "generate",
    "lm-eval",
)
IMPORT_ALL = """
import importlib, pkgutil, sys, ebt_megatron.data_prep, ebt_megatron.tools
for package in (ebt_megatron.data_prep, ebt_megatron.tools):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
assert not {"data_prep", "tools", "benchmarks", "examples"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what pip installs (its dependencies are this environment's)."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("ebt_megatron", "data_prep", "tools", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-compile",
            "--disable-pip-version-check",
            "--target",
            target,
            source,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return target


def run(installed, folder, *command):
    env = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), cwd=folder, env=env, check=False, capture_output=True, text=True)


def test_what_is_installed(installed, tmp_path):
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"bin", "ebt_megatron"}
    assert {p.name for p in (installed / "bin").iterdir()} == {f"ebt-{name}" for name in COMMANDS}
    here = {p.relative_to(RECIPES) for p in RECIPES.rglob("*") if p.is_file()}
    there = installed / "ebt_megatron" / "recipes"
    assert {p.relative_to(there) for p in there.rglob("*") if p.is_file()} == here
    done = run(installed, tmp_path, sys.executable, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert "ebt_megatron.data_prep.text" in done.stdout and "ebt_megatron.tools.shards" in done.stdout


def test_commands_work_from_any_folder(installed, tmp_path):
    def command(name, *arguments):
        done = run(installed, tmp_path, installed / "bin" / f"ebt-{name}", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"in {installed}" in command("train", "--list")
    assert "hidden_size: 384" in command("train", "text/s1_xxs", "--print-config")
    (tmp_path / "raw.txt").write_text("Some words to learn from. " * 50)
    command(
        "prepare",
        "text",
        "--input",
        "raw.txt",
        "--train-bpe",
        "300",
        "--sequence-length",
        "8",
        "--output",
        "data",
        "--validation-fraction",
        "0",
        "--workers",
        "2",
    )
    assert "all good" in command("shards", "verify", "data/train")


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    s1 = RECIPES / "text" / "s1_xxs.yaml"
    for given in ("text/s1_xxs", "text/s1_xxs.yaml", "recipes/text/s1_xxs.yaml", str(s1), s1):
        assert find_recipe(given).samefile(s1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "s1_xxs.yaml").write_text("name: mine\nmodel: {size: xs}\n")
    assert load_recipe("text/s1_xxs").name == "ebt-s1-xxs", "a name"
    assert load_recipe("text/s1_xxs.yaml").name == "mine", "a path of the folder one is in comes first"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("text/s1_xs", "did you mean text/s1_xxs"),
        ("s1_xxs", "did you mean text/s1_xxs"),
        ("elsewhere/s2_xxs.yaml", "did you mean text/s2_xxs"),
        ("qqq", "ebt-train --list"),
    ],
)
def test_an_unknown_recipe_gives_its_like(given, hint):
    with pytest.raises(RecipeError, match=hint) as error:
        load_recipe(given)
    assert given in str(error.value) and "\n" not in str(error.value)


def test_the_list_says_what_each_recipe_is():
    text = describe_recipes()
    for name, path in recipe_names().items():
        assert path.read_text().startswith("# "), f"{path} says in its first line what it is"
        assert f"{name} " in text
