"""Films of Atari games, played at random by an emulator that brings its ROMs (ale-py): as many as wanted.

    python -m examples.games --output data/video/games --game pong --game freeway --episodes 4

The same game, seed and versions give the same film. Nothing is read from the internet but the emulator itself, where it
is not installed (`pip install '.[games]'`).
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ebt_megatron.core.cli import guarded
from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing

PACKAGE = "ale-py==0.12.1"
SKIP = 5  # frames of the emulator, at 60 a second, for each one of the film: every third is 0.25 s on
WARM_UP = 60  # frames of the film that are left out: title pictures
LONGEST = 12  # frames of the film that an action is kept for, at most


def emulator(kept: Path) -> Any:
    """The module `ale_py`: installed, or downloaded by pip into a folder of its own; None if neither can be.

    Args:
        kept: the folder.
    """
    try:
        return importlib.import_module("ale_py")
    except ImportError:
        pass
    if not (kept / "ale_py").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(kept), PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError):
            return None
    sys.path.append(str(kept))
    importlib.invalidate_caches()
    try:
        return importlib.import_module("ale_py")
    except ImportError:
        return None


def played(ale_py: Any, game: str, seed: int) -> Iterator[np.ndarray]:
    """The pictures uint8 [210, 160, 3] of a game that is played at random, 60 / SKIP a second, without an end.

    Each is the brighter of the last two of the emulator, which draws some things in every other picture only. A game
    that is over begins anew.

    Raises:
        DataError: for a game that there is not.
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    machine = ale_py.ALEInterface()
    machine.setInt("random_seed", seed)
    machine.setFloat("repeat_action_probability", 0.0)
    rom = Path(ale_py.__file__).parent / "roms" / f"{game}.bin"
    if not rom.exists():
        raise DataError(f"no game '{game}': choose of {', '.join(sorted(p.stem for p in rom.parent.glob('*.bin')))}")
    machine.loadROM(str(rom))
    draw = np.random.default_rng([seed, *game.encode()])
    actions = machine.getMinimalActionSet()
    while True:
        action = actions[draw.integers(len(actions))]
        for _ in range(draw.integers(1, LONGEST + 1)):
            for _ in range(SKIP - 1):
                machine.act(action)
            before = machine.getScreenRGB()
            machine.act(action)
            yield np.maximum(before, machine.getScreenRGB())
            if machine.game_over():
                machine.reset_game()


def write_film(kept: Path, frames: int, film: tuple[str, int, Path]) -> None:
    """Write the film of a game and a seed to a path, without loss."""
    import av

    game, seed, path = film
    pictures = played(emulator(kept), game, seed)
    with (
        replacing(path) as partial_path,
        av.open(str(partial_path), "w", format="matroska", options={"fflags": "+bitexact"}) as container,
    ):
        stream = container.add_stream("ffv1", rate=Fraction(60, SKIP))
        for number, picture in zip(range(WARM_UP + frames), pictures, strict=False):
            if not number:
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "bgr0"
            if number >= WARM_UP:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def write_films(kept: Path, output: Path, frames: int, episodes: list[tuple[str, int]], workers: int) -> list[Path]:
    """The films OUTPUT/GAME-SEED.mkv of (game, seed); those that are not there are written by several processes.

    Raises:
        DataError: where the emulator cannot be had.
    """
    films = [(game, seed, output / f"{game}-{seed}.mkv") for game, seed in episodes]
    if missing := [film for film in films if not film[2].exists()]:
        if emulator(kept) is None:
            raise DataError(f"no {PACKAGE.split('==')[0]} here, and pip cannot download it: pip install '{PACKAGE}'")
        output.mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(workers) as pool:
            pool.map(partial(write_film, kept, frames), missing, chunksize=1)
    return [path for *_, path in films]


def main(
    output: Path = typer.Option(..., help="Folder for the films."),
    game: list[str] = typer.Option(..., help="Names of ROMs: pong, freeway, ..."),
    episodes: int = typer.Option(1, min=1, help="Films of each game."),
    first_seed: int = typer.Option(0, min=0, help="Seeds are this one and those after it."),
    frames: int = typer.Option(480, min=1, help=f"Of a film, {60 // SKIP} a second."),
    kept: Path = typer.Option(Path("data/ale-py"), help="Where the emulator is downloaded to, if it is not installed."),
    workers: int = typer.Option(2, min=1, help="Processes."),
) -> None:
    """Play games at random and keep films of them."""

    def work() -> None:
        asked = [(name, seed) for name in game for seed in range(first_seed, first_seed + episodes)]
        films = write_films(kept, output, frames, asked, workers)
        print(f"{len(films)} films of {frames} frames in {output}")

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
