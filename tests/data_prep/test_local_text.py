"""The quickstart's text: read from this machine, no more than asked for."""

import json

import typer
from typer.testing import CliRunner

from ebt_megatron.data_prep import local_text


def run(*arguments):
    app = typer.Typer()
    app.command()(local_text.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_as_much_text_as_asked_for(tmp_path):
    result = run("--output", tmp_path / "raw.jsonl", "--max-bytes", 50_000, "--workers", 2)
    assert result.exit_code == 0, result.output
    documents = [json.loads(line)["text"] for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    size = sum(len(d.encode()) for d in documents)
    assert size >= 50_000 > size - len(documents[-1].encode())
    assert all(d.strip() for d in documents)


def test_docstrings_are_the_prose_of_a_program(tmp_path):
    (tmp_path / "a.py").write_text('"""Top."""\ndef f():\n    """Inner."""\n    x = 1\n')
    assert local_text.docstrings(str(tmp_path / "a.py")) == "Top.\n\nInner."
    (tmp_path / "b.py").write_text("not python (")
    assert local_text.docstrings(str(tmp_path / "b.py")) == ""


def test_a_dry_run_writes_nothing(tmp_path):
    assert run("--output", tmp_path / "raw.jsonl", "--dry-run").exit_code == 0
    assert not list(tmp_path.iterdir())
