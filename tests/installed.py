"""What tests/test_install.py runs where only what pip installs is there; prints JSON.

python -P -S tests/installed.py FOLDER MODULE ...: FOLDER is where the package is installed, MODULE what is looked for.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import pkgutil
import sys
from importlib.metadata import distributions

import click
import typer.main

import ebt_megatron


def import_all() -> list[str]:
    """Import every module of the package, all of them from the folder; returns their names."""
    for module in pkgutil.walk_packages(ebt_megatron.__path__, "ebt_megatron."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = [name for name in sys.modules if name.split(".")[0] == "ebt_megatron"]
    elsewhere = [n for n in ours if not (getattr(sys.modules[n], "__file__", None) or folder).startswith(folder)]
    assert not elsewhere, elsewhere
    return ours


def is_there(name: str) -> bool:
    """Whether a module, or a name in one, can be imported."""
    parent, _, last = name.rpartition(".")
    if not parent:
        return importlib.util.find_spec(name) is not None
    if not is_there(parent):
        return False
    of = importlib.import_module(parent)
    return hasattr(of, last) or (hasattr(of, "__path__") and importlib.util.find_spec(name) is not None)


def helps(entry: str, command: click.Command, *names: str) -> dict[str, str]:
    """What a command and those in it print for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            command.main([*names, "--help"], prog_name=entry)
        except SystemExit as end:
            assert not end.code, f"{entry} {names}: exit code {end.code}"
    inner = command
    for name in names:
        inner = inner.commands[name]
    said = {" ".join([entry, *names]): printed.getvalue()}
    for name in getattr(inner, "commands", {}):
        said |= helps(entry, command, *names, name)
    return said


folder, *wanted = sys.argv[1:]
(ours,) = (d for d in distributions(path=[folder]) if "ebt" in d.name)
print(
    json.dumps(
        {
            "modules": import_all(),
            "absent": [name for name in wanted if not is_there(name)],
            "help": {
                name: text
                for entry in ours.entry_points
                for name, text in helps(entry.name, typer.main.get_command(entry.load())).items()
            },
        }
    )
)
