"""Pictures of a run from the command line, by its captions, with its folder alone."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ebt_megatron.tools.pictures import app
from ebt_megatron.training.run import Run
from tests.data_prep.media import prepare_pictures
from tests.data_prep.test_images import pictures
from tests.tasks.latents import CAPTIONS, pictures_recipe


def run_of(folder, *overrides):
    """A run of random weights, told captions of three classes; its data are taken away."""
    np.savez(folder / "a.npz", images=pictures(40), labels=np.arange(40) % 3)
    captions = "--captions-from-labels", "--class-names", "a cat,a dog,a house"
    done = prepare_pictures(folder / "a.npz", folder / "data", *captions)
    assert done.exit_code == 0, done.output
    run = Run(
        pictures_recipe(
            *CAPTIONS,
            f"data.train=[{folder}/data/train]",
            f"data.validation=[{folder}/data/validation]",
            f"training.output_dir={folder}/run",
            *overrides,
        )
    )
    run.begin()
    assert not (run.write_checkpoint(None) or run.checkpoints.wait())
    run.close()
    shutil.rmtree(folder / "data")
    return folder / "run"


@pytest.mark.parametrize("model", [("thinking.initial=noise",), ("model.architecture=baseline",)])
def test_pictures_are_made_from_captions(model, tmp_path):
    run, output = run_of(tmp_path, *model), tmp_path / "made.png"

    def make(*more):
        return CliRunner().invoke(app, [str(run), "--output", str(output), "--each", "3", "--passes", "2", *more])

    done = make("--caption", "a cat", "--caption", "this is a house", "--guidance", "1")
    assert done.exit_code == 0, done.output
    assert Image.open(output).size == (2 * 3 * 18, 2 * 2 * 18)
    for more, why in (
        ((), "is conditional on captions: give --caption"),
        (("--label", "1"), "knows 0 classes"),
        (("--caption", "a", "--label", "1"), "give either"),
        (("--caption", ""), "has no token"),
    ):
        done = make(*more)
        assert done.exit_code == 2 and why in " ".join(done.output.split()), done.output
