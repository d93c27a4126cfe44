"""Films of games, of a stand-in for the emulator: seeded, without what flickers, begun anew when over."""

import itertools
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from ebt_megatron.core.errors import DataError
from examples import games


class Machine:
    """A game of one number, the sum of its actions; over at 90. Odd pictures are black."""

    made: ClassVar[list] = []

    def __init__(self):
        self.total, self.pictures, self.options = 0, 0, {}
        self.made.append(self)

    setLoggerMode = staticmethod(lambda mode: None)

    def setInt(self, key, value):
        self.options[key] = value

    setFloat = setInt

    def loadROM(self, path):
        self.rom = path

    def getMinimalActionSet(self):
        return [0, 1, 2]

    def act(self, action):
        self.total, self.pictures = self.total + action, self.pictures + 1

    def getScreenRGB(self):
        return np.full((2, 2, 3), self.total if self.pictures % 2 else 0, np.uint8)

    def game_over(self):
        return self.total >= 90

    def reset_game(self):
        self.total = 0


@pytest.fixture
def emulator(tmp_path):
    Machine.made = []
    (tmp_path / "roms").mkdir()
    (tmp_path / "roms" / "sum.bin").touch()
    (tmp_path / "roms" / "other.bin").touch()
    mode = SimpleNamespace(Error=0)
    return SimpleNamespace(ALEInterface=Machine, LoggerMode=mode, __file__=str(tmp_path / "__init__.py"))


def first(emulator, game, seed, count=200):
    return [int(p.max()) for p in itertools.islice(games.played(emulator, game, seed), count)]


def test_a_seed_gives_the_same_film_and_another_seed_or_game_another(emulator):
    film = first(emulator, "sum", 3)
    assert film == first(emulator, "sum", 3)
    assert film != first(emulator, "sum", 4) and film != first(emulator, "other", 3)
    assert Machine.made[0].options == {"random_seed": 3, "repeat_action_probability": 0.0}


def test_pictures_are_the_brighter_of_two_and_games_begin_anew(emulator):
    film = first(emulator, "sum", 0)
    assert min(film[5:]) >= 0 and max(film) > 80  # every second picture of the machine is black
    falls = [i for i, (a, b) in enumerate(itertools.pairwise(film)) if b < a]
    assert falls and all(film[i] > 80 for i in falls)
    assert Machine.made[0].pictures == games.SKIP * len(film)


def test_a_game_that_there_is_not_is_refused_by_name(emulator):
    with pytest.raises(DataError, match="no game 'chess': choose of other, sum"):
        next(games.played(emulator, "chess", 0))


def test_without_emulator_and_internet_there_are_no_games(tmp_path, monkeypatch):
    monkeypatch.setattr(games, "emulator", lambda kept: None)
    with pytest.raises(DataError, match="no ale-py here, and pip cannot download it"):
        games.write_films(tmp_path, tmp_path, 4, [("pong", 0)], 1)
