"""What `pip install .` gives works from any folder, and finds recipes by name."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
    "films",
    "puzzles",
    "report",
    "serve",
    "generate",
    "lm-eval",
)
# What a checkout has beside the package: not installed, or under another name.
NOT_INSTALLED = {"benchmarks", "examples", "tests", "tools", "data_prep", "recipes"}
A_MODULE = re.compile(rf"({'|'.join(NOT_INSTALLED)}|ebt_megatron)(\.[A-Za-z_]\w*)+")


def copied(folder: Path) -> Path:
    """The folder, with what a package is built from: building leaves things where it is done."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("ebt_megatron", "data_prep", "tools", "recipes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what pip installs (its dependencies are this environment's)."""
    source, target = copied(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("installed")
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


def imports(path, module):
    """The names that a file imports anywhere, in functions too, and the modules it names in strings."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and A_MODULE.fullmatch(node.value):
            yield node.value


def modules(root, package):
    """(file, name) of every module of a package below a folder; links are followed."""
    for folder, _, names in os.walk(root / package, followlinks=True):
        for path in (Path(folder) / name for name in names if name.endswith(".py")):
            yield path, ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module")
def alone(installed, tmp_path_factory):
    """What tests/installed.py says of what is installed, run where no checkout can be imported."""
    named = {n for path, module in modules(installed, "ebt_megatron") for n in imports(path, module)}
    ours = sorted(n for n in named if n.startswith("ebt_megatron."))
    # -S and these folders: packages, but not what .pth files add (an editable install of this checkout).
    paths = dict.fromkeys([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-P", "-S", "-W", "ignore", str(ROOT / "tests" / "installed.py"), str(installed), *ours]
    folder = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"named": named}


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


def test_every_installed_module_imports(installed, alone):
    assert {n for _, n in modules(installed, "ebt_megatron") if not n.endswith("__main__")} <= set(alone["modules"])
    assert {"ebt_megatron.data_prep.text", "ebt_megatron.tools.shards"} <= set(alone["modules"])


def test_nothing_installed_imports_what_is_not(alone):
    assert len(alone["named"]) > 300, "those in functions, too"
    assert not {name for name in alone["named"] if name.split(".")[0] in NOT_INSTALLED}
    assert not alone["absent"]


def test_every_installed_command_says_what_it_does(alone):
    assert alone["help"].keys() >= {f"ebt-{name}" for name in COMMANDS} | {"ebt-prepare text", "ebt-shards verify"}
    assert all("usage: " in text.lower() for text in alone["help"].values())


def test_a_module_has_one_name():
    other = {"tools", "data_prep", "recipes"}
    for package in ("ebt_megatron", "benchmarks", "examples", "tests"):
        for path, module in modules(ROOT, package):
            twice = {n for n in imports(path, module) if n.split(".")[0] in other}
            assert not twice, f"{path} imports {twice}: ebt_megatron.tools and ebt_megatron.data_prep are their names"


@pytest.mark.slow
def test_commands_work_from_any_folder(installed, tmp_path):
    def command(name, *arguments):
        done = run(installed, tmp_path, installed / "bin" / f"ebt-{name}", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"in {installed}" in command("train", "--list")
    assert "hidden_size: 384" in command("train", "text/s1_xxs", "--print-config")
    (tmp_path / "raw.txt").write_text("Some words to learn from. " * 50)
    options = ["--train-bpe", "300", "--sequence-length", "8", "--validation-fraction", "0", "--workers", "2"]
    command("prepare", "text", "--input", "raw.txt", "--output", "data", *options)
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
    assert "told the pooled output of CLIP-large." in text, "a sentence of two lines is not cut"
    narrow = describe_recipes(70).split("\n\n")[0]
    assert max(map(len, narrow.splitlines())) <= 70
    assert " ".join(narrow.split()) == " ".join(text.split("\n\n")[0].split())
