"""What the video quickstart trains on and what it holds out."""

import itertools

import pytest

from ebt_megatron.core.errors import DataError
from examples import films


class Recorder:
    """Writes down the preparations asked for, and leaves what they would."""

    def __init__(self):
        self.asked, self.console = {}, self
        self.said = []

    def __call__(self, name, title, module, *arguments):
        words = list(arguments)
        output = films.Path(words[words.index("--output") + 1])
        inputs = [films.Path(b).name for a, b in itertools.pairwise(words) if a == "--input"]
        self.asked[output.name] = (inputs, words)
        (output / "train").mkdir(parents=True)
        (output / "train" / "manifest.json").touch()

    def print(self, text, **_):
        self.said.append(text)


@pytest.fixture
def step(tmp_path, monkeypatch):
    monkeypatch.setattr(films, "DATA", tmp_path / "data/video")
    there = [films.Path(name) for package in films.media.FILMS for name in package.files]
    monkeypatch.setattr(films.media, "found", lambda *_: there)
    return Recorder()


def test_nothing_that_is_held_out_is_trained_on(step, monkeypatch):
    write = lambda kept, output, frames, asked, workers: [output / f"{g}-{s}.mkv" for g, s in asked]  # noqa: E731
    monkeypatch.setattr(films.atari_games, "write_films", write)
    films.prepare(step, [])
    trained = set(step.asked["train"][0])
    for name in ("films", "cartoons", "episodes", "games"):
        inputs, words = step.asked[name]
        assert inputs and not trained & set(inputs)
        assert "--mirror" not in words and "--mirror" in step.asked["train"][1]
        assert all(word in words and word in step.asked["train"][1] for word in films.CUT)
        assert words[words.index("--encoder") + 1] == str(films.DATA / "train" / "encoder.npz")
    assert set(step.asked["films"][0]) == set(films.HELD_OUT_FILMS)
    assert set(step.asked["cartoons"][0]) == set(films.HELD_OUT_CARTOONS)
    games = {name.rsplit("-", 1)[0] for name in trained if name.endswith("-0.mkv")}
    assert {name.rsplit("-", 1)[0] for name in step.asked["episodes"][0]} == games == set(films.GAMES)
    assert not games & {name.rsplit("-", 1)[0] for name in step.asked["games"][0]}
    assert list(films.held_out()) == ["films", "cartoons", "episodes of the same games", "other games"]
    before = dict(step.asked)
    films.prepare(step, [])
    assert step.asked == before
    with pytest.raises(DataError, match="has shards of other films"):
        films.prepare(step, ["holiday/*.mp4"])
    (films.DATA / "made_of.json").unlink()  # as versions before left it
    with pytest.raises(DataError, match="cut otherwise"):
        films.prepare(step, [])


def test_without_games_there_are_films(step, monkeypatch):
    def none(*_):
        raise DataError("no ale-py here")

    monkeypatch.setattr(films.atari_games, "write_films", none)
    films.prepare(step, [])
    every = {name for package in films.media.FILMS for name in package.files}
    assert set(step.asked["train"][0]) == every - {*films.HELD_OUT_FILMS, *films.HELD_OUT_CARTOONS}
    assert list(films.held_out()) == ["films", "cartoons"]
    assert step.said == ["films alone, and no games: no ale-py here"]
