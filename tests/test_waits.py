"""What a training step runs on the device does not wait for it: the few places that do are named here."""

import ast
from pathlib import Path

import pytest

import ebt_megatron

PACKAGE = Path(ebt_megatron.__file__).parent
HOT = ("kernels", "model", "objectives", "parallel", "prediction", "thinking", "training/trainer.py")
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "synchronize"}
MEANT = {
    ("kernels/check.py", "errors"): "compares a kernel with its reference; no step runs it",
    ("objectives/energy.py", "train_batch"): "the loader's sample ids, which are on the CPU",
    ("objectives/validation.py", "by_steps"): "once a validation",
    ("training/trainer.py", "train_step"): "once a step, when all of it is launched: what is logged of it",
}


def waiting(path: Path) -> set[str]:
    """The functions of a module that call something which waits for the device."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            if any(isinstance(call, ast.Attribute) and call.attr in WAITS for call in calls):
                found.add(function.name)
    return found


def test_nothing_in_the_hot_path_waits_but_what_is_meant_to():
    files = [
        path for part in HOT for path in ([PACKAGE / part] if part.endswith(".py") else (PACKAGE / part).rglob("*.py"))
    ]
    found = {(str(path.relative_to(PACKAGE)), function) for path in files for function in waiting(path)}
    assert found == set(MEANT)


@pytest.mark.parametrize(("code", "found"), [("x.sum().item()", {"f"}), ("x.items()", set()), ("x.to('cpu')", set())])
def test_a_wait_is_seen(code, found, tmp_path):
    (tmp_path / "module.py").write_text(f"def f(x):\n    return {code}\n")
    assert waiting(tmp_path / "module.py") == found
