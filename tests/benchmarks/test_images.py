"""What denoising is compared on: equal FLOPs, intervals over seeds, tables and a plot; and the tiles of photographs."""

import numpy as np
import pytest

from benchmarks.images import Denoising
from ebt_megatron.model.flops import joint_cost
from ebt_megatron.objectives.flops import training_flops
from examples.media import grey_tiles

PIL = pytest.importorskip("PIL.Image")


def suite(psnr, trained):
    points = [{"passes": n, "psnr": psnr - abs(n - 2), "ssim": 0.5, "mse": 100.0} for n in (1, 2, 5)]
    return {
        "name": "a run",
        "trained steps": trained,
        "parameters": 10,
        "denoising": {"99": {"noised": {"psnr": 10.0, "ssim": 0.1, "mse": 999.0}, "passes": points}},
        "probe": {"features": 0.75, "layer": 1, "level": 0, "last layer": 0.5, "untrained": 0.4, "numbers": 0.6},
        "other pictures": {"photographs": {f"score {trained}": 0.25, "mean pixel": 0.5}},
        "metrics": [{"step_seconds": 0.5}],
    }


@pytest.fixture
def study(monkeypatch, tmp_path):
    """On pictures of 7 x 7 patches of 4 x 4 grey pixels, without them."""

    def flops(self, recipe):
        return recipe.training.steps * training_flops(recipe, joint_cost(recipe, 16))

    monkeypatch.setattr(Denoising, "flops", flops)
    return Denoising(tmp_path, 100)


def test_a_dit_of_equal_flops_takes_as_many(study, tmp_path):
    ebt, dit = (study.recipe(name, 0) for name in ("EBT S1", "DiT, FLOPs of S1"))
    assert ebt.training.steps == 100 and 150 < dit.training.steps < 300
    assert study.flops(dit) == pytest.approx(study.flops(ebt), rel=0.005)
    assert ebt.training.output_dir == str(tmp_path / "ebt-s1-0")


def test_tables_have_means_over_seeds_and_the_passes_that_matter(study, monkeypatch, tmp_path):
    of = {"EBT S1": iter([suite(20.0, 1), suite(22.0, 1)]), "DiT": iter([suite(20.0, 2), suite(22.0, 2)])}
    monkeypatch.setattr(study, "run", lambda recipe: next(of["DiT" if "dit" in recipe.name else "EBT S1"]))
    study.conduct(["EBT S1", "DiT"], 2, tmp_path / "results")
    (text,) = (path.read_text() for path in (tmp_path / "results").glob("images-cpu-*.md"))
    assert "over 2 seeds" in text and "| EBT S1 | 3.2 |" in text
    assert "| EBT S1 | 2 | 21.00 ± 12.71 | 0.500 ± 0.000 | 100.0 ± 0.0 |" in text
    assert "| EBT S1 | 75.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 | 1 ± 0 | 0 ± 0 |" in text
    assert "| score 1 | 0.250 ± 0.000 | - |" in text and "| score 2 | - | 0.250 ± 0.000 |" in text
    (picture,) = (tmp_path / "results").glob("images-cpu-*.png")
    assert PIL.open(picture).size[0] > 500


def test_photographs_become_grey_tiles(tmp_path):
    rows, columns = np.mgrid[:64, :96]
    PIL.fromarray((rows // 16 * 40 + columns // 16 * 10).astype(np.uint8).repeat(3).reshape(64, 96, 3)).save(
        tmp_path / "a.png"
    )
    tiles = grey_tiles([tmp_path / "a.png"], 16, rows=4)
    assert tiles.shape == (24, 16, 16) and tiles.dtype == np.uint8
    expected = [40 * r + 10 * c for r in range(4) for c in range(6)]
    assert tiles.reshape(24, -1).mean(1).tolist() == pytest.approx(expected, abs=1)
