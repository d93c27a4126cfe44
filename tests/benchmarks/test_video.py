"""What the seeds of the video benchmark say together, and the budget of equal FLOPs."""

from pathlib import Path

import pytest

from benchmarks.video import NextFrames
from ebt_megatron.objectives.flops import training_flops
from ebt_megatron.tasks.frames import FrameTokens
from ebt_megatron.tasks.video import Video


@pytest.fixture
def study(monkeypatch):
    """On the quickstart's kind of shards, without them."""
    tokens = FrameTokens(4, 4, 16)

    def flops(self, recipe):
        return recipe.training.steps * training_flops(recipe, Video(recipe, tokens).cost())

    monkeypatch.setattr(NextFrames, "flops", flops)
    return NextFrames(Path("runs"), 100, {})


def result(losses, repeat):
    thinking = [{"steps": i + 1, "loss": loss, "psnr": 20.0} for i, loss in enumerate(losses)]
    return {
        "thinking": thinking,
        "trained_steps": 2 if len(losses) > 1 else 1,
        "tokens": 1000,
        "positions": 30,
        "repeat_last_loss": repeat,
        "repeat_last_psnr": 19.0,
        "extrapolation_loss": 2 * repeat,
        "extrapolation_psnr": 15.0,
        "loss_by_position": {"steps": [[loss, loss] for loss in losses]},
    }


def test_gains_are_over_the_last_frame_of_the_same_set(study):
    runs = [
        {"seconds": 1.0, "sets": {"films": result([0.2, loss, 0.3], 0.1), "games": result([0.2, 0.05, 0.3], 0.2)}}
        for loss in (0.07, 0.08, 0.09)
    ]
    row = study.summary("EBT S1", runs, study.recipe("EBT S1", 0))
    assert row["sets"]["films"]["gain"]["mean"] == pytest.approx(0.2)
    assert row["sets"]["games"]["gain"] == {"mean": pytest.approx(0.75), "half": pytest.approx(0)}
    assert row["sets"]["films"]["gain"]["half"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert row["frames"] == 250 and row["sets"]["films"]["frames"] == 7  # of 1,000 and 30 tokens, four a frame
    where = {"machine": "a machine", "torch": "2", "date": "today"}
    text = study.markdown({"machine": where, "seeds": 3, "models": [row]})
    assert "20.0 ± 24.8 %" in text and "| extrapolation |  |  | 0.2000 | -100.0 %" in text
    assert "| EBT S1 | 3 | 0.3000 ± 0.0000 | 0.3000 ± 0.0000 |" in text


def test_a_transformer_of_equal_flops_trains_longer(study):
    s1, equal, short = (study.recipe(name, 1) for name in ("EBT S1", "Transformer++, FLOPs of S1", "Transformer++"))
    assert study.flops(equal) == pytest.approx(study.flops(s1), rel=0.01)
    assert short.training.steps == 100 and short.video.predicts == "change"
    assert {r.training.seed for r in (s1, equal, short)} == {1235}
