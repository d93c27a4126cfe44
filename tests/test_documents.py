"""Every command that the documents show is one that works, from any folder.

Commands are read from the documents. What trains, prepares or converts for real goes as far as its options being
taken; recipes are resolved and checked against the number of ranks, `make` says what it would do, the planner runs.
"""

import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ebt_megatron.config import check, load_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = (
    "python ",
    "torchrun ",
    "make ",
    "mpirun ",
    "ebt-",
    "pip ",
    "tensorboard ",
    "bash ",
    "sbatch ",
    "recipes/launch/",
)


def commands(text: str) -> list[str]:
    """Of fenced and indented blocks, line by line; of inline code, which may leave arguments out, with --help."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.S | re.M)
    blocks = [*fenced, "\n".join(line[4:] for line in rest.splitlines() if line.startswith("    "))]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    inline = [c + " --help" if c.startswith(("python ", "ebt-")) and "--help" not in c else c for c in inline]
    return [c for c in (*lines, *inline) if c.startswith(STARTS) and not c.endswith("/")]


SHOWN = sorted({(d.name, c) for d in DOCUMENTS for c in commands(d.read_text())})


def test_the_documents_show_commands():
    assert len(SHOWN) > 20
    assert {name for name, _ in SHOWN} >= {"README.md", "CONTRIBUTING.md", "data-format.md", "reproducing.md"}


def script_of(command: str) -> str:
    """MODULE:ATTRIBUTE of a command that setup.py installs."""
    found = re.search(rf'"{command} = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text())
    assert found, f"setup.py installs no {command}"
    return found[1]


def invoke(module: str, attribute: str, arguments: list[str], patch: pytest.MonkeyPatch, run: bool) -> str:
    """Give a command its arguments; without `run` it does nothing once it has taken them."""
    loaded = importlib.import_module(module)
    if not hasattr(loaded, attribute) and not hasattr(loaded, "main"):  # a package
        loaded = importlib.import_module(f"{module}.__main__")
    app = getattr(loaded, attribute, None)
    if not isinstance(app, typer.Typer):
        app = typer.Typer()
        app.command()(loaded.main)
    if not run:
        for name, other in list(sys.modules.items()):
            if name.startswith(("ebt_megatron", "benchmarks", "examples")) and hasattr(other, "guarded"):
                patch.setattr(other, "guarded", lambda *_, **__: None)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def trains(arguments: list[str], ranks: int) -> None:
    """The recipe and its overrides fit so many ranks."""
    check(load_recipe(arguments[0], [a for a in arguments[1:] if not a.startswith("-")]), ranks)


def try_command(words: list[str], patch: pytest.MonkeyPatch) -> None:
    words = [str(ROOT / w) if w.startswith("recipes/") else "8" if w == "N" else w for w in words]
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        subprocess.run(["make", "-C", ROOT, "-n", *targets], check=True, capture_output=True)
    elif program == "pip":
        extras = {e for word in rest for found in re.findall(r"\[([\w,]+)\]", word) for e in found.split(",")}
        assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
    elif program == "tensorboard":
        assert shutil.which(program) or importlib.util.find_spec(program)
    elif program == "mpirun":
        try_command(rest[next(i for i, w in enumerate(rest) if w == "python" or w.startswith("ebt-")) :], patch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(rest)
        if parsed.training_script != "ebt_megatron.train":
            try_command(["python", "-m", parsed.training_script, *parsed.training_script_args], patch)
            return
        trains(parsed.training_script_args, int(parsed.nnodes.split(":")[-1]) * int(parsed.nproc_per_node))
    elif program in ("bash", "sbatch") or "/launch/" in program:
        subprocess.run(
            ["bash", *(words[1:] if program in ("bash", "sbatch") else words), "--dry-run"],
            check=True,
            capture_output=True,
        )
    else:
        module, attribute, rest = (
            (rest[1], "app", rest[2:]) if program == "python" else (*script_of(program).split(":"), rest)
        )
        if module == "ebt_megatron.train" and rest and not rest[0].startswith("-") and "--help" not in rest:
            trains(rest, 1)
        run = "plan" in module or "--list" in rest
        for choice in itertools.product(*(word.split("|") for word in rest)):
            invoke(module, attribute, list(choice), patch, run)


@pytest.mark.parametrize(("document", "command"), SHOWN, ids=str)
def test_a_command_of_the_documents(document, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_command(shlex.split(command, comments=True), monkeypatch)
    assert not list(tmp_path.iterdir()), "nothing is made where the command was given"


LINKING = [*DOCUMENTS, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks/results").glob("*.md"))]


@pytest.mark.parametrize("document", LINKING, ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert not missing
