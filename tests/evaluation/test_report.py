"""The report holds its plots, its tables, and nothing that must be fetched."""

import json

import pytest

from ebt_megatron.evaluation.report import Run, write_report


@pytest.fixture
def runs(tmp_path):
    folders = {}
    for name in ("ebt", "transformer"):
        folder = folders[name] = tmp_path / name
        folder.mkdir()
        rows = [
            {"step": s, "tokens": 100 * s, "loss": 5.0 - s / 10, "final_step_loss": 5.0 - s / 10,
             "step_losses": [5.1 - s / 10, 5.0 - s / 10][: 1 + s % 2], "alpha": 10.0, "tokens_per_second": 10.0,
             "step_seconds": 2.0, "peak_memory_bytes": 5e8, "model_flops_per_second": 1e9, "data_wait_seconds": 0.002,
             **({"validation_loss": 5.5 - s / 10} if s % 5 == 0 else {})}
            for s in range(1, 11)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        steps = range(1, 5) if name == "ebt" else range(1, 2)
        state = {"top": [{"token": " a<b", "probability": 0.5}, {"token": " of", "probability": 0.25}]}
        evaluation = {
            "name": name, "trained_steps": 2 if name == "ebt" else 1, "unigram_entropy": 5.7,
            "thinking": [{"steps": s, "loss": 5.0 - s / 10, "perplexity": 100.0 + s, "accuracy": 0.25,
                          "changed": None if s == 1 else 0.125} for s in steps],
            "example": {"context": "one <b> of", "target": " of", "mean_energies": [[1.0, 0.5], [0.4, 0.3]],
                        "states": [{"steps": i, "energies": [1.0, 0.5] if i else None, **state} for i in range(3)]},
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folders


def test_html_and_markdown(runs, tmp_path):
    ebts = {"S1": runs["ebt"], "S2": runs["ebt"]}
    paths = write_report(ebts, runs["transformer"], tmp_path / "report", "A title", "do this next")
    html, markdown = paths["html"].read_text(), paths["markdown"].read_text()
    assert html.count("data:image/png;base64,") == 5
    assert "http" not in html
    assert "one &lt;b&gt; of" in html
    for text in (html, markdown):
        assert "do this next" in text and "A title" in text and "2 (trained)" in text
    for name in ("loss", "start", "thinking", "energy", "example"):
        assert f"({name}.png)" in markdown and paths[name].stat().st_size > 1000
    assert "0.10 %" in markdown  # data wait: 2 ms of 2 s
    assert markdown.count("| 12.5 % |") == 6 and "Thinking longer: S2" in markdown


def test_a_run_that_was_not_evaluated_says_how_to(runs):
    (runs["ebt"] / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"python -m ebt_megatron\.evaluate"):
        Run.read(runs["ebt"], "EBT")


def test_the_command_writes_it_or_says_what_is_missing(runs, tmp_path):
    from typer.testing import CliRunner

    from tools.report import app

    command = [str(runs["ebt"]), "--baseline", str(runs["transformer"]), "--output", str(tmp_path / "page")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and (tmp_path / "page" / "report.html").exists(), done.output
    (runs["ebt"] / "evaluation.json").unlink()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "ebt_megatron.evaluate" in done.stderr and done.stderr.count("\n") == 1
