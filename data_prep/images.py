"""Pictures to shards of latents.

    ebt-prepare images --input photos/ --output data/photos --classes folders
    ebt-prepare images --input 'landscapes/*.jpg' --output data/tiles --tile --encoder vae --model sd-vae
    ebt-prepare images --input train-images-idx3-ubyte.gz --output data/mnist --height 28 --width 28 --patch 4

Reads picture files; arrays uint8 [N, H, W] or [N, H, W, 3] of .npy and .npz (labels under a key of the
.npz); and idx files, with their labels file beside them. A picture's split is a hash of its content, so all
tiles of a picture are in the same.
"""

from __future__ import annotations

import io
import itertools
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import typer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.options import dataclass_options, option
from ebt_megatron.data_prep import options
from ebt_megatron.data_prep.captions import Captions, CaptionTexts, read_captions
from ebt_megatron.data_prep.files import InputFile, content_of, find_files, plain_name
from ebt_megatron.data_prep.ground import HELP as GROUND_HELP
from ebt_megatron.data_prep.ground import WHITE, colour, on_ground
from ebt_megatron.data_prep.job import Execution
from ebt_megatron.data_prep.latent_passes import PictureSettings
from ebt_megatron.data_prep.latents import prepare_latents
from ebt_megatron.data_prep.pieces import NO_LABEL, Piece

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_ARRAYS = (".npy", ".npz", "idx3-ubyte")
SUFFIXES = (*_PICTURES, *_ARRAYS)
_ORIENTATION = 0x0112  # of EXIF, and what it asks for as a Transpose of Pillow: mirrored, turned, ...
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_PIXELS = 1 << 30  # of a picture, at most: its bytes are in memory three times over
_UNIT = 256  # picture files in a piece of work; an array is one by itself


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError(f"reading pictures needs Pillow ({error}): pip install pillow") from None
    PIL.Image.MAX_IMAGE_PIXELS = None  # these are the user's own pictures, whose size is looked at here
    return PIL


def _is_array(path: str) -> bool:
    return plain_name(path)[0].endswith(_ARRAYS)


def _idx(path: str) -> np.ndarray:
    """uint8 [N, ...] of an idx file: two zeros, 8 for bytes, the number of dimensions, each as 32 bits, the bytes."""
    data = content_of(path)
    shape = np.frombuffer(data[4 : 4 + 4 * data[3]], ">u4").tolist() if data[:3] == b"\0\0\x08" else []
    values = np.frombuffer(data, np.uint8)[4 + 4 * len(shape) :]
    if not shape or len(values) != math.prod(shape):
        raise ValueError("it is truncated, or no idx file of bytes")
    return values.reshape(shape)


def _npz_or_npy(path: str, array_key: str, labels_key: str) -> tuple[np.ndarray, np.ndarray | None]:
    if path.lower().endswith(".npy") and "://" not in path:
        return np.load(path, mmap_mode="r"), None
    loaded = np.load(io.BytesIO(content_of(path)))
    if isinstance(loaded, np.ndarray):
        return loaded, None
    if array_key not in loaded:
        raise ValueError(f"it holds {', '.join(loaded)}, not {array_key}: name the pictures with --array-key")
    return loaded[array_key], loaded.get(labels_key)


def _idx_and_labels(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    folder, slash, name = path.rpartition("/")
    beside = folder + slash + name.replace("images", "labels").replace("idx3", "idx1")
    system, there = fsspec.core.url_to_fs(beside)
    return _idx(path), _idx(beside) if beside != path and system.exists(there) else None


def read_array(
    path: str, array_key: str = "images", labels_key: str = "labels"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures uint8 [N, H, W] or [N, H, W, 3], and their labels, integers [N], if there are any.

    Args:
        path: of a .npy, .npz or idx file; labels of an idx file are in the idx1 file beside it.
        array_key, labels_key: of an .npz.

    Raises:
        DataError: if it cannot be read, or is not of that shape.
    """
    try:
        if plain_name(path)[0].endswith("idx3-ubyte"):
            pictures, labels = _idx_and_labels(path)
        else:
            pictures, labels = _npz_or_npy(path, array_key, labels_key)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[3:] not in ((), (3,)):
        raise DataError(
            f"{path} holds {pictures.dtype} {list(pictures.shape)}; pictures are uint8 [N, H, W] or [N, H, W, 3]"
        )
    if labels is not None and (
        labels.dtype.kind not in "iu" or labels.shape != pictures.shape[:1] or labels.min(initial=0) < 0
    ):
        raise DataError(
            f"the labels of {path} are {labels.dtype} {list(labels.shape)}, not {len(pictures)} integers from 0 on"
        )
    return pictures, labels


def _rgb(picture: Any, ground: str, counts: Counter[str]) -> Any:
    """A picture of 8 bits a channel, of one with 16 bits of grey the upper ones; what one sees through is on a ground.

    Raises:
        ValueError: values of 32 bits, which could be anything.
    """
    through = picture.info.get("transparency")
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        grey = np.asarray(picture).astype(np.uint32)  # Pillow would clip
        eight = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        opaque = 255 * (grey != (-1 if through is None else through)).astype(np.uint8)
        picture = _pillow().Image.fromarray(np.stack([eight, opaque], -1))
    if picture.mode in ("I", "F"):
        raise ValueError("its values have 32 bits: convert it to 8 or 16")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = np.asarray((picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA"))
    counts["transparent"] += int(rgba[..., 3].min() < 255)
    return _pillow().Image.fromarray(on_ground(rgba, ground))


def _decoded(picture: Any, ground: str, counts: Counter[str]) -> Any:
    """An opened picture as it is shown: 8 bits, no alpha, turned as its EXIF says, of which nothing else is read.

    Raises:
        Exception: of any kind that Pillow finds for bytes it cannot read.
    """
    if picture.width * picture.height > _PIXELS:
        raise ValueError(f"it has {picture.width * picture.height:,} pixels, more than {_PIXELS:,}: cut it up before")
    picture.load()
    turn = _TURNS.get(picture.getexif().get(_ORIENTATION))
    shown = _rgb(picture, ground, counts)
    return shown.transpose(turn) if turn is not None else shown


def _name_of(path: str) -> str:
    return path.rpartition("/")[2]


def _class_of(path: str) -> str:
    return path.rpartition("/")[0].rpartition("/")[2]


@dataclass(frozen=True)
class PictureSource:
    """Pictures of files and arrays.

    Attributes:
        height, width: of a sample.
        ground: colour, RRGGBB, under what is transparent.
        tile: cut a picture into samples; else make it smaller and take its centre.
        classes: names of the labels; of picture files those of the folders that they are in. Empty: labels are
            those of arrays, and have numbers.
        array_key, labels_key: of an .npz.
        captions: of the pictures, or None.
    """

    height: int = option(128, min=1, help="Height of a sample, a picture made smaller and cropped to its centre.")
    width: int = option(128, min=1, help="Width of a sample.")
    ground: str = option(WHITE, parser=colour, help=GROUND_HELP)
    tile: bool = option(False, help="Cut pictures into samples instead of making them smaller.")
    classes: list[str] = field(default_factory=list)
    array_key: str = option("images", help="Key of the pictures in an .npz.")
    labels_key: str = option("labels", help="Key of the labels in an .npz.")
    captions: CaptionTexts | None = None
    kind: ClassVar[str] = "images"
    piece: ClassVar[str] = "picture"
    frames: ClassVar[None] = None
    least_motion: ClassVar[float] = 0.0

    def read(self, files: list[InputFile]) -> Iterator[Piece]:
        """A piece for each picture."""
        for path in (file.path for file in files):
            if _is_array(path):
                pictures, labels = read_array(path, self.array_key, self.labels_key)
                told = self.captions.given if self.captions else {}
                if told and len(told) != len(pictures):
                    raise DataError(
                        f"{path} has {len(pictures)} pictures, and the captions are {len(told)}: give one line for each"
                    )
                for i, picture in enumerate(pictures):
                    content, label = picture.tobytes(), NO_LABEL if labels is None else int(labels[i])
                    yield Piece(
                        content,
                        self._of_array(picture, f"picture {i} of {path}"),
                        label,
                        self._caption(str(i), label, content),
                    )
            else:
                data = content_of(path)
                label = self.classes.index(_class_of(path)) if self.classes else NO_LABEL
                counts: Counter[str] = Counter()
                samples, caption = self._of_file(data, path, counts), self._caption(_name_of(path), label, data)
                yield Piece(data, samples, label, caption, counts)

    def _caption(self, name: str, label: int, content: bytes) -> str:
        return self.captions.of(name, label, content) if self.captions else ""

    def _of_array(self, picture: np.ndarray, where: str) -> Iterator[tuple[np.ndarray, float]]:
        if picture.shape[:2] == (self.height, self.width):
            channels = picture if picture.ndim == 3 else picture[..., None]
            yield np.broadcast_to(channels, (1, self.height, self.width, 3)), 0.0
        else:
            yield from self._samples(_pillow().Image.fromarray(np.ascontiguousarray(picture)).convert("RGB"), where)

    def _of_file(self, data: bytes, path: str, counts: Counter[str]) -> Iterator[tuple[np.ndarray, float]]:
        """Raises DataError if the picture is broken."""
        try:
            with _pillow().Image.open(io.BytesIO(data)) as opened:
                picture = _decoded(opened, self.ground, counts)
        except Exception as error:  # whatever the bytes lead the library to
            said = str(error) if "BytesIO" not in str(error) else "no format of pictures that Pillow knows"
            raise DataError(f"{path} cannot be decoded ({said or type(error).__name__})") from None
        yield from self._samples(picture, path)

    def _samples(self, picture: Any, where: str) -> Iterator[tuple[np.ndarray, float]]:
        """uint8 [1, height, width, 3], tile by tile or once."""
        if not self.tile:
            scale = max(self.height / picture.height, self.width / picture.width)
            size = max(self.width, round(picture.width * scale)), max(self.height, round(picture.height * scale))
            picture = picture.resize(size, _pillow().Image.Resampling.BICUBIC)
        array = np.asarray(picture)
        rows, columns = array.shape[0] // self.height, array.shape[1] // self.width
        if not rows or not columns:
            raise DataError(
                f"{where} is {array.shape[0]} x {array.shape[1]}, smaller than a tile of {self.height} x {self.width}"
            )
        if not self.tile:
            rows, columns = 1, 1
        top, left = (array.shape[0] - rows * self.height) // 2, (array.shape[1] - columns * self.width) // 2
        for row, column in itertools.product(range(rows), range(columns)):
            y, x = top + row * self.height, left + column * self.width
            yield array[None, y : y + self.height, x : x + self.width], 0.0


def split_files(files: list[InputFile]) -> list[list[InputFile]]:
    """Pieces of work: an array each, some pictures together."""
    arrays = [[file] for file in files if _is_array(file.path)]
    pictures = [file for file in files if not _is_array(file.path)]
    return [*arrays, *(pictures[i : i + _UNIT] for i in range(0, len(pictures), _UNIT))]


@dataclass(frozen=True)
class CaptionOptions:
    """What is asked for of captions.

    Attributes:
        captions: their file; "": none.
        captions_from_labels: generate them.
        caption_encoder: see Captions.
        most_unknown: the share of captions that their tokenizer may lack.
    """

    captions: str = option(
        "", parser=options.path_or_name, help="A file of captions: FILE<TAB>CAPTION lines; of an array, a line each."
    )
    captions_from_labels: bool = option(False, help="Generate captions from the labels' names.")
    caption_encoder: str = option(
        "tokens", help="tokens (of a tokenizer trained on them), tokens:TOKENIZER, clip:FOLDER (a CLIPTextModel)."
    )
    most_unknown: float = options.most_unknown("captions")

    def texts(self, files: list[InputFile], names: list[str]) -> CaptionTexts | None:
        """The captions of files whose labels have names.

        Raises:
            DataError: for both kinds, a name that two files have, or captions of several arrays.
        """
        path = self.captions
        if path and self.captions_from_labels:
            raise DataError("give either --captions or --captions-from-labels")
        if self.captions_from_labels:
            if not names:
                raise DataError("--captions-from-labels needs names: give --class-names, or --classes folders")
            return CaptionTexts(names=tuple(names))
        if not path:
            return None
        arrays = [f.path for f in files if _is_array(f.path)]
        if arrays and len(files) > 1:
            raise DataError(
                f"--captions {path} is for picture files or for one array; the input has {len(files)} "
                f"files with {arrays[0]} among them"
            )
        pictures = [] if arrays else [_name_of(f.path) for f in files]
        if twice := [name for name, count in Counter(pictures).items() if count > 1]:
            raise DataError(f"{twice[0]} is the name of several pictures, and captions go by name: rename them")
        return read_captions(path, pictures)


@dataclass_options
def main(
    *,
    output: Path = options.OUTPUT,
    input: list[str] = typer.Option(..., help=f"Globs, folders or URLs of {', '.join(SUFFIXES)} (.gz)."),
    source: PictureSource,
    labels: str = typer.Option(
        "arrays", "--classes", help="Where labels come from: arrays, or the folders that pictures are in."
    ),
    class_names: str = typer.Option("", help="Names of the labels of arrays, from 0 on, separated by commas."),
    asked: CaptionOptions,
    settings: PictureSettings,
    execution: Execution,
    dry_run: bool = options.DRY_RUN,
) -> None:
    """Turn pictures into shards of latents for training."""

    def work() -> None:
        if labels not in ("arrays", "folders"):
            raise DataError(f"--classes {labels}: choose arrays or folders")
        _pillow()
        found = find_files(input, SUFFIXES)
        files, classes = found.files, list[str]()
        if labels == "folders":
            if arrays := [f.path for f in files if _is_array(f.path)]:
                raise DataError(f"--classes folders is for picture files; {arrays[0]} is an array")
            classes = sorted({_class_of(f.path) for f in files})
        elif class_names:
            classes = [name.strip() for name in class_names.split(",")]
            if loose := [f.path for f in files if not _is_array(f.path)]:
                raise DataError(f"--class-names is for labels of arrays; {loose[0]} is a picture file")
        told = asked.texts(files, classes)
        captions = Captions.make(told, asked.caption_encoder, asked.most_unknown) if told else None
        what = f"pictures of {source.height} x {source.width}"
        if options.announce(output, found, SUFFIXES, settings.splits, what, dry_run):
            named = replace(source, classes=classes, captions=told)
            prepare_latents(output, split_files(files), named, settings, str(found), execution, captions)

    options.command(work)


if __name__ == "__main__":
    typer.run(main)
