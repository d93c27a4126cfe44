"""The films of the video quickstart as shards: what is trained on, and the sets that are held out.

Trained on are films that packages bring, filmed, rendered and drawn, and games of Atari that are played at random. Held
out are other films, whole, and other cartoons; other episodes of the same games; and games that are not trained on. All
are cut into tiles, of which those stay that move, and encoded by the encoder that was fitted on what is trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import write_whole
from examples import games as atari_games
from examples import media
from examples.steps import Steps

DATA = Path("data/video")
# Whole films that are held out, filmed and drawn: of lists of both every fourth by name.
HELD_OUT_FILMS = ("Shepard_Calais_1906_FrenchGP.ogv.160p.ogv", "cityCC0.mpg", "motion.mov")
HELD_OUT_CARTOONS = ("intro.mpg", "play107.mkv", "play116.mkv", "press.mpg")
GAMES = (
    "assault",
    "asteroids",
    "beam_rider",
    "boxing",
    "breakout",
    "carnival",
    "chopper_command",
    "demon_attack",
    "enduro",
    "freeway",
    "frogger",
    "phoenix",
    "pong",
    "riverraid",
    "seaquest",
    "space_invaders",
)
OTHER_GAMES = ("air_raid", "galaxian", "ice_hockey", "kaboom", "time_pilot")
EPISODES = 1  # of a game that is trained on, so that most of what is trained on is film
TRAINED_FRAMES, HELD_OUT_FRAMES = 480, 240  # of an episode, 12 a second
# Tiles of 32 x 32 pixels of films whose shorter side is made 192, frames 0.25 s apart, as in the paper; what does not
# move is left out, as there is nothing to predict in it.
CUT = ("--frames", "16", "--height", "32", "--width", "32", "--tiles", "6", "--frame-rate", "4", "--least-motion", "4")
MORE = ("--hop", "3", "--mirror")  # views of what is trained on: clips that overlap, and each as in a mirror


def held_out() -> dict[str, str]:
    """The folders of shards that are held out, by what they are."""
    folder = DATA / "validation"
    if (folder / "manifest.json").exists():
        return {"films": str(folder)}
    sets = {"films": "films", "cartoons": "cartoons", "episodes of the same games": "episodes", "other games": "games"}
    return {what: str(folder / name) for what, name in sets.items() if (folder / name).exists()}


def _shards(step: Steps, films: list[str], output: Path, *more: str) -> None:
    """Films as tiles in OUTPUT/train, and in OUTPUT/validation if `more` says so."""
    inputs = [word for film in films for word in ("--input", film)]
    step(
        f"prepare {output.name}",
        "1. films to shards",
        "ebt_megatron.data_prep.video",
        *inputs,
        "--output",
        str(output),
        *CUT,
        "--seed",
        "1",
        "--resume",
        "--skip-broken",
        *more,
    )


def _whole(step: Steps, films: list[Path], folder: Path, *more: str) -> None:
    """Films as shards in `folder`, none of them held out."""
    if (folder / "manifest.json").exists():
        return
    work = DATA / "work" / folder.name
    _shards(step, [str(film) for film in films], work, "--validation-fraction", "0", *more)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (work / "train").rename(folder)


def _check_what_is_there(given: list[str]) -> None:
    """Write down what DATA is made of; raises DataError where there are shards of something else."""
    record, wanted = DATA / "made_of.json", json.dumps([*CUT, *MORE, *given])
    if (DATA / "train" / "manifest.json").exists():
        if not record.exists() or record.read_text() != wanted:
            raise DataError(f"{DATA} has shards of other films, or of films that were cut otherwise: move it away")
    else:
        DATA.mkdir(parents=True, exist_ok=True)
        write_whole(record, wanted)


def prepare(step: Steps, given: list[str]) -> None:
    """All sets as shards, unless they are there; of given films (globs, folders, URLs) some are held out by content.

    Raises:
        DataError: for shards of something else in their place.
    """
    _check_what_is_there(given)
    if given:
        if not (DATA / "train" / "manifest.json").exists():
            _shards(step, given, DATA, "--validation-fraction", "0.3")
        return
    raw, kept = DATA / "raw", DATA / "ale-py"
    films = media.found(media.FILMS, raw / "films", "films")
    games: dict[str, list[Path]] = {}
    try:
        for name, asked, frames in (
            ("train", [(game, seed) for game in GAMES for seed in range(EPISODES)], TRAINED_FRAMES),
            ("episodes", [(game, 1000) for game in GAMES], HELD_OUT_FRAMES),
            ("games", [(game, 1000) for game in OTHER_GAMES], HELD_OUT_FRAMES),
        ):
            games[name] = atari_games.write_films(kept, raw / "games", frames, asked, 2)
    except DataError as error:
        step.console.print(f"films alone, and no games: {error}", highlight=False)
    held = {
        "films": [film for film in films if film.name in HELD_OUT_FILMS],
        "cartoons": [film for film in films if film.name in HELD_OUT_CARTOONS],
        "episodes": games.get("episodes", []),
        "games": games.get("games", []),
    }
    trained = [film for film in films if film not in held["films"] + held["cartoons"]] + games.get("train", [])
    _whole(step, trained, DATA / "train", *MORE)
    for name, of_set in held.items():
        if of_set:
            _whole(step, of_set, DATA / "validation" / name, "--encoder", str(DATA / "train" / "encoder.npz"))
