"""What videos and pictures are to a preparation: pieces, each of which goes to one split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.data_prep.files import InputFile, open_file

NO_LABEL = -1


class Piece(NamedTuple):
    """What goes to one split as a whole: a video or a picture.

    Attributes:
        content: bytes that its split is a hash of.
        samples: uint8 [frames, height, width, 3] of every clip or tile (of a picture one frame), in order,
            and the seconds it lasts; raises DataError where the file is broken.
        label: of every sample, or NO_LABEL.
        caption: of every sample; "": there is none.
        counts: what was done to it on the way, by name, once its samples are read; the manifest has the sums.
    """

    content: bytes
    samples: Iterator[tuple[np.ndarray, float]]
    label: int = NO_LABEL
    caption: str = ""
    counts: Mapping[str, int] = MappingProxyType({})


class Source(Protocol):
    """A kind of input: a frozen dataclass of options, the same in every process."""

    @property
    def kind(self) -> str:
        """The kind that the manifest will have."""

    @property
    def piece(self) -> str:
        """What goes to one split, in words."""

    @property
    def frames(self) -> int | None:
        """The frames of a sample of video; None for a picture."""

    @property
    def least_motion(self) -> float:
        """Samples that change by less from frame to frame (mean of levels of 255) are not wanted."""

    @property
    def height(self) -> int:
        """The height of a frame."""

    @property
    def width(self) -> int:
        """The width of a frame."""

    @property
    def classes(self) -> list[str]:
        """Names of the labels; empty: their numbers."""

    def read(self, files: list[InputFile]) -> Iterator[Piece]:
        """The pieces of some files, in order."""
        ...


def fingerprint(file: InputFile) -> bytes:
    """What tells a file from others: its size, and its first and last megabyte (all of it, up to two).

    A path is no part of it, and the rest of a long video behind a URL need not be fetched.

    Raises:
        DataError: if it cannot be read.
    """
    size, megabyte = file.bytes, 1 << 20
    try:
        with open_file(file.path) as stream:
            first = stream.read(megabyte)
            stream.seek(max(len(first), size - megabyte))
            return b"%d " % size + first + stream.read(megabyte)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error})") from None


def place_of(seed: int, content: bytes) -> float:
    """Return a place in [0, 1): a piece of a lower place is held out first."""
    digest = hashlib.blake2b(content, digest_size=6, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") / 2.0**48
