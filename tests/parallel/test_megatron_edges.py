"""An upgrade of megatron-core that moves what this package reaches into is named, with the module that needs it."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from ebt_megatron.parallel import megatron_edges
from ebt_megatron.parallel.megatron_edges import EDGES, VERSION, Edge, moved

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"from megatron\.core(?:\.([\w.]+))? import[^\n]*\b_\w+")


def test_the_version_is_one():
    assert f'"megatron-core=={VERSION}"' in (ROOT / "setup.py").read_text()
    assert version("megatron-core") == VERSION, "another megatron-core: megatron_edges.py says how to move to it"


def test_what_is_relied_on_is_there():
    assert moved() == []


def test_modules_that_use_it_exist_and_say_so():
    for edge in EDGES:
        text = (ROOT / "ebt_megatron" / edge.user).read_text()
        used = [name.rpartition(".")[2] for name in edge.names]
        assert not used or any(name in text for name in used), f"{edge.user} does not use {edge.module} any more"


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        (Edge("a.py", "needs it", "no_such_module"), "megatron.core.no_such_module is gone"),
        (Edge("a.py", "needs it", "tensor_parallel.mappings", ("_gone",)), "mappings has no _gone; a.py needs it"),
        (Edge("a.py", "needs it", "optimizer.optimizer", ("MegatronOptimizer.gone",)), "has no MegatronOptimizer.gone"),
        (
            Edge("a.py", "needs it", "tensor_parallel.mappings", (), ("no line",)),
            "has no more 'no line'; a.py needs it",
        ),
    ],
)
def test_what_moved_is_named(monkeypatch, edge, words):
    monkeypatch.setattr(megatron_edges, "EDGES", (edge,))
    (line,) = moved()
    assert words in line


def test_private_names_of_megatron_core_are_imported_nowhere_else():
    known = {edge.user for edge in EDGES}
    for path in (ROOT / "ebt_megatron").rglob("*.py"):
        name = str(path.relative_to(ROOT / "ebt_megatron"))
        assert name in known or not PRIVATE.search(path.read_text()), f"{name} belongs into megatron_edges.py"
