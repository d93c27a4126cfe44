"""The films of the video quickstart as shards: what is trained on, and three sets that are held out.

Trained on are films that packages bring, and games of Atari that are played at random. Held out are other films, whole;
other episodes of the same games; and games that are not trained on. All are cut into tiles, and encoded by the encoder
that was fitted on what is trained on.
"""

from __future__ import annotations

from pathlib import Path

from ebt_megatron.core.errors import DataError

from . import atari, media
from .steps import Steps

DATA = Path("data/video")
HELD_OUT_FILMS = ("Megamind.avi", "bikes.mp4", "carphone_pristine.mp4")
GAMES = (
    "assault", "asteroids", "beam_rider", "boxing", "breakout", "carnival", "chopper_command", "demon_attack", "enduro",
    "freeway", "frogger", "phoenix", "pong", "riverraid", "seaquest", "space_invaders",
)  # fmt: skip
OTHER_GAMES = ("air_raid", "galaxian", "ice_hockey", "kaboom", "time_pilot")
EPISODES = 12  # of a game that is trained on
TRAINED_FRAMES, HELD_OUT_FRAMES = 360, 96  # of an episode, 15 a second


def held_out() -> dict[str, str]:
    """The folders of shards that are held out, by what they are."""
    folder = DATA / "validation"
    if (folder / "manifest.json").exists():
        return {"films": str(folder)}
    sets = {"films": "films", "episodes of the same games": "episodes", "other games": "games"}
    return {what: str(folder / name) for what, name in sets.items() if (folder / name).exists()}


def _shards(step: Steps, films: list[str], output: Path, *more: str) -> None:
    """Films as tiles of 32 x 32 pixels in OUTPUT/train, and in OUTPUT/validation if `more` says so."""
    inputs = [word for film in films for word in ("--input", film)]
    step(f"prepare {output.name}", "1. films to shards", "data_prep.video", *inputs, "--output", str(output),
         "--frames", "16", "--height", "32", "--width", "32", "--tiles", "3", "--frame-rate", "7.5", "--seed", "1",
         "--resume", "--skip-broken", *more)  # fmt: skip


def _whole(step: Steps, films: list[Path], folder: Path, *more: str) -> None:
    """Films as shards in `folder`, none of them held out."""
    if (folder / "manifest.json").exists():
        return
    work = DATA / "work" / folder.name
    _shards(step, [str(film) for film in films], work, "--validation-fraction", "0", *more)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (work / "train").rename(folder)


def prepare(step: Steps, given: list[str]) -> None:
    """All sets as shards, unless they are there; of given films (globs, folders, URLs) some are held out by content."""
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
            games[name] = atari.write_films(kept, raw / "games", frames, asked, 2)
    except DataError as error:
        step.console.print(f"films alone, and no games: {error}", highlight=False)
    others = [film for film in films if film.name in HELD_OUT_FILMS]
    _whole(step, [film for film in films if film not in others] + games.get("train", []), DATA / "train")
    encoder = "--encoder", str(DATA / "train" / "encoder.npz")
    for name, of_set in (("films", others), ("episodes", games.get("episodes", [])), ("games", games.get("games", []))):
        if of_set:
            _whole(step, of_set, DATA / "validation" / name, *encoder)
