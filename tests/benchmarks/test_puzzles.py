"""What the seeds of the puzzle benchmark say together, and the budget of equal FLOPs."""

import pytest

from benchmarks.puzzles import SPLITS, Puzzling


def run(solved, left):
    starts = dict.fromkeys(("one start", "lowest energy", "highest confidence", "any"), solved)
    of = {
        "steps": [{"steps": n, "flops": 1e6 * n, "solved": solved} for n in (1, 4)],
        "verification": {"confidence": 0.75},
        "starts": starts,
    }
    return {"name": "a", "left the plateau": left, "updates": 10, "flops": 2e12, **dict.fromkeys(SPLITS, of)}


def test_equal_flops_are_equal(tmp_path):
    study = Puzzling("sudoku6", tmp_path, 100)
    energy, equal = (study.recipe(name, 2) for name in ("EBT", "recurrent, equal FLOPs"))
    assert study.flops(equal) == pytest.approx(study.flops(energy), rel=0.02)
    assert energy.training.steps == 100 < equal.training.steps and equal.training.seed == 2


def test_tables_show_what_is_done_and_what_is_asked_for(tmp_path, monkeypatch):
    study = Puzzling("sudoku6", tmp_path, 100)
    (study.folder("recurrent", 1)).mkdir()
    (study.folder("recurrent", 1) / "suite.json").touch()
    monkeypatch.setattr(study, "run", lambda recipe: run(0.2 * recipe.training.seed, None))
    study.conduct(["EBT"], 2, tmp_path / "results")
    (text,) = (path.read_text() for path in (tmp_path / "results").glob("puzzles-cpu-*.md"))
    assert "| EBT | 2 | 10 | 2.0 | 10.0 ± 127.1 |  |  | 10.0 ± 127.1 |" in text
    assert "| recurrent | 1 | 10 | 2.0 | 20.0 |" in text and "feed-forward" not in text
    assert "| EBT | None, None |" in text and "| EBT, harder | 0.750 ± 0.000 | - | - |" in text
    assert len(list((tmp_path / "results").glob("*.png"))) == 1
