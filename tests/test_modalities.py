"""A modality is its module in `tasks`: who else asks which one it is, or imports one, is named here with a reason."""

import ast
from pathlib import Path

import pytest

import ebt_megatron
from ebt_megatron.tasks import TASKS

PACKAGE = Path(ebt_megatron.__file__).parent
THEIRS = ("tasks/", "config/", "data_prep/", "recipes/", "tools/")
EXCEPTIONS = {
    "api/loading.py": "chooses the class of a loaded model by its task",
    "checkpoint/llama.py": "a Llama is a model of text",
    "evaluation/clips.py": "goes on with films",
    "evaluation/ood_detection.py": "compares pictures with others",
    "evaluation/picture_evaluation.py": "measures pictures",
    "evaluation/picture_suite.py": "measures pictures",
    "evaluation/pictures.py": "makes pictures",
    "evaluation/probe.py": "measures what layers know of a picture's class",
    "evaluation/puzzles.py": "measures puzzles",
    "evaluation/suite.py": "measures text",
    "evaluation/token_trace.py": "draws a text's tokens",
    "evaluation/video_evaluation.py": "measures films",
    "inference/predictor.py": "predicts tokens",
    "inference/texts.py": "reads and writes tokens",
    "sharing/card.py": "shows in each modality's words how to load a model",
}


def asks(path: Path) -> bool:
    """Whether a module compares something with a modality's name, or imports a modality."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Constant) and side.value in TASKS for side in sides):
                return True
        if isinstance(node, ast.ImportFrom) and node.module in {where.split(":")[0] for where in TASKS.values()}:
            return True
    return False


def test_no_module_outside_knows_modalities_but_those_named():
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if asks(path)}
    assert {name for name in files if not name.startswith(THEIRS)} == set(EXCEPTIONS)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('if recipe.data.modality == "video": pass', True),
        ("def f():\n    from ebt_megatron.tasks.text import Text", True),
        ('say("video"); from ebt_megatron.tasks import task_as', False),
    ],
)
def test_what_asks_is_seen(code, found, tmp_path):
    (tmp_path / "module.py").write_text(code)
    assert asks(tmp_path / "module.py") == found
