"""Films of a run from the command line: they go on from held-out clips, and say how like the truth they are."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ebt_megatron.data_prep.video import VideoSource
from ebt_megatron.tools.films import app
from tests.data.test_latents import prepare
from tests.data_prep.media import write_videos
from tests.evaluation.test_report_command import saved
from tests.tasks.latents import recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An EBT of random weights, of clips of six frames."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("films")
    data = prepare(write_videos(folder, 4, 30), folder / "out", VideoSource(frames=6, height=16, width=16))
    return saved(recipe, data, folder / "run", "data.sequence_length=5")


def call(run, *arguments):
    return CliRunner().invoke(app, [run, *(str(a) for a in arguments)])


def test_films_go_on_from_clips_as_long_as_wanted(run, tmp_path):
    done = call(run, "--output", tmp_path / "a.npz", "--clips", 2, "--frames", 7, "--given", 2, "--steps", 1)
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "a.npz") as file:
        films = file["frames"]
    assert films.shape == (2, 9, 16, 16, 3) and films.dtype == np.uint8
    measures = json.loads((tmp_path / "a.npz.json").read_text())
    assert measures["given"] == 2 and {len(v) for v in measures["model"].values()} == {4}, "as far as there is a truth"
    assert measures["repeat_last"]["motion"] == [0] * 4 and min(measures["truth"]["motion"]) > 0
    assert done.output.count(" ahead: PSNR ") == 4
    done = call(run, "--output", tmp_path / "a.gif", "--clips", 2)
    with Image.open(tmp_path / "a.gif") as film:
        assert done.exit_code == 0 and film.n_frames == 6 and film.width == 2 * film.height


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("--given", 6), "have 6 frames, give from 1 to 5"),
        (("--output", "a.mp4"), "give a name that ends in .gif or .npz"),
        (("--output", "no/a.gif"), "no is not a folder"),
    ],
)
def test_what_does_not_do_is_one_line(run, given, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(run, *given)
    assert done.exit_code == 2 and line in " ".join(done.output.split()) and not list(tmp_path.iterdir())
