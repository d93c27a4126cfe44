"""Video to shards of latents, a clip a sample.

    ebt-prepare video --input 'movies/**/*.mp4' --output data/video --frames 16 --frame-rate 8
    mpirun -n 64 ebt-prepare video --input s3://bucket/movies/ --output data/video --encoder vae --model sd-vae

Each file is decoded frame by frame, made smaller, cropped to its centre and cut into clips that do not
overlap (or, with --hop, do); what is left at its end is dropped. All clips of a file are in the same split,
whatever its path.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import typer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.options import dataclass_options, option
from ebt_megatron.data_prep import options
from ebt_megatron.data_prep.files import InputFile, find_files, open_file
from ebt_megatron.data_prep.ground import HELP as GROUND_HELP
from ebt_megatron.data_prep.ground import WHITE, colour, on_ground
from ebt_megatron.data_prep.job import Execution
from ebt_megatron.data_prep.latent_passes import ClipSettings
from ebt_megatron.data_prep.latents import prepare_latents
from ebt_megatron.data_prep.pieces import Piece, fingerprint

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".ogv", ".gif")


OLDEST_AV = 17  # whose frames say how they were turned and lit, and whose scaler is told its threads
_HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of transfer curves


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"reading video needs PyAV ({error}): pip install av") from None
    if int(av.__version__.partition(".")[0]) < OLDEST_AV:
        raise DataError(f"reading video needs PyAV {OLDEST_AV} or newer, here is {av.__version__}: pip install -U av")
    av.logging.set_level(av.logging.PANIC)  # what matters is raised
    return av


def at_rate(frames: Iterator[Any], rate: Fraction) -> Iterator[Any]:
    """Give the frames that are shown at 0, 1 / rate, 2 / rate ... seconds after the first, of frames in order.

    A frame is repeated where the video is slower.
    """
    shown = next(frames, None)
    if shown is None:
        return
    start, count = shown.pts * shown.time_base, 0
    for frame in itertools.chain(frames, [None]):
        end = frame.pts * frame.time_base if frame else shown.pts * shown.time_base + Fraction(1, 10**9)
        while start + count / rate < end:
            yield shown
            count += 1
        shown = frame


def without_gaps(frames: Iterator[Any], pause: float, counts: Counter[str]) -> Iterator[Iterator[Any]]:
    """Frames in parts in which time goes on: none is more than `pause` seconds after the one before it, or before it.

    Joined recordings have such places, and films whose clock started again; "gaps" of `counts` counts them.
    """
    part, before = 0, None

    def number(frame: Any) -> int:
        nonlocal part, before
        now = frame.pts * frame.time_base
        if before is not None and not 0 <= now - before <= pause:
            part += 1
            counts["gaps"] += 1
        before = now
        return part

    return (some for _, some in itertools.groupby(frames, number))


@dataclass(frozen=True)
class VideoSource:
    """Clips of video files.

    Attributes:
        frames: of a clip.
        height, width: of a frame.
        stride: take every so-many-th frame.
        frame_rate: take so many frames a second instead, if not 0.
        hop: frames of the film (at `frame_rate`: of those taken) from the begin of a clip to the next one's; 0: as
            many as a clip covers.
        mirror: each clip also as in a mirror.
        tiles: cut frames into samples, so many along the shorter side; 1: one of the centre.
        ground: colour, RRGGBB, under what is transparent.
        pause: seconds between two frames (of a slow film: three of its frames, if that is more) that end a clip.
        least_motion: leave out samples whose pixels change by less from frame to frame, the mean of levels of 255.
    """

    frames: int = option(16, min=2, help="Frames of a clip.")
    height: int = option(128, min=1, help="Height of a frame, after making it smaller and cropping to the centre.")
    width: int = option(128, min=1, help="Width of a frame.")
    stride: int = option(1, min=1, help="Take every so-many-th frame.")
    frame_rate: float = option(0.0, min=0.0, help="Take so many frames a second instead (0: by --stride).")
    hop: int = option(
        0, min=0, help="Frames of the film (with --frame-rate: taken) from a clip's begin to the next's; 0: no overlap."
    )
    mirror: bool = option(False, help="Add a mirrored copy of each clip.")
    tiles: int = option(1, min=1, help="Cut frames into samples, so many along the shorter side.")
    ground: str = option(WHITE, parser=colour, help=GROUND_HELP)
    pause: float = option(
        2.0, min=0.0, help="Seconds without a new frame after which no clip goes on (of a slow film: three frames)."
    )
    least_motion: float = option(
        0.0, min=0.0, help="Leave out samples that change less from frame to frame: mean of levels (0 to 255)."
    )
    classes: list[str] = field(default_factory=list)
    kind: ClassVar[str] = "video"
    piece: ClassVar[str] = "video"

    def read(self, files: list[InputFile]) -> Iterator[Piece]:
        """A piece for each file."""
        for file in files:
            counts: Counter[str] = Counter()
            yield Piece(fingerprint(file), self._clips(file, counts), counts=counts)

    def _clips(self, file: InputFile, counts: Counter[str]) -> Iterator[tuple[np.ndarray, float]]:
        """uint8 [frames, height, width, 3] and its seconds, again and again; of a clip's tiles one after another.

        Raises:
            DataError: if the file cannot be decoded to its end, is of HDR, or has no clip.
        """
        av = _av()
        found = False
        try:
            with av.open(open_file(file.path) if "://" in file.path else file.path) as container:
                if not container.streams.video:
                    raise DataError(f"{file.path} has no video in it")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # --workers use the cores
                own = Fraction(stream.average_rate or 0)
                rate = Fraction(self.frame_rate).limit_denominator(1001) or own / self.stride
                seconds = float(self.frames / rate) if rate else 0.0
                picture = _Picture(self, _pixel_aspect(stream), counts)
                longest = max(self.pause, float(3 / own) if own else 0.0)
                for part in without_gaps(_checked(container, stream, file.path), longest, counts):
                    taken = at_rate(part, rate) if self.frame_rate else part
                    for clip in self._overlapping(taken, picture):
                        found = True
                        for view in (clip, clip[:, :, ::-1]) if self.mirror else (clip,):
                            yield from ((tile, seconds) for tile in self._cut(view))
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"{file.path} cannot be decoded ({error})") from None
        if not found:
            at = f" at {self.frame_rate:g} a second" if self.frame_rate else ""
            gaps = f" without one of its {counts['gaps']} gaps (--pause {self.pause:g})" if counts["gaps"] else ""
            raise DataError(
                f"{file.path} has no clip: one of {self.frames} frames needs {self._covered} frames{at}{gaps}"
            )

    @property
    def _stride(self) -> int:
        """The frames read from one of a clip to the next; at a rate, only those shown at its times count."""
        return 1 if self.frame_rate else self.stride

    @property
    def _covered(self) -> int:
        """Frames from a clip's first to its last, likewise."""
        return (self.frames - 1) * self._stride + 1

    def _overlapping(self, frames: Iterator[Any], picture: Callable[[Any], np.ndarray]) -> Iterator[np.ndarray]:
        """The clips uint8 [frames, height, width, 3] of a film; `picture` is called for what a clip needs alone."""
        hop = self.hop or self.frames * self._stride
        needed = math.gcd(hop, self._stride)  # of so many frames one
        every, apart, covered = hop // needed, self._stride // needed, (self._covered - 1) // needed + 1
        kept: deque[np.ndarray] = deque()  # needed frames since the begin of the next clip
        begin = 0  # of the next clip
        for number, frame in enumerate(itertools.islice(frames, 0, None, needed)):
            if number < begin:
                continue
            kept.append(picture(frame))
            if len(kept) == covered:
                yield np.stack(list(itertools.islice(kept, 0, None, apart)))
                begin += every
                for _ in range(min(every, covered)):
                    kept.popleft()

    def _cut(self, clip: np.ndarray) -> Iterator[np.ndarray]:
        """The samples in a clip, row by row."""
        for top in range(0, clip.shape[1], self.height):
            for left in range(0, clip.shape[2], self.width):
                yield clip[:, top : top + self.height, left : left + self.width]


def _pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel over its height, as it is to be shown."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if Fraction(1, 16) <= aspect <= 16 else Fraction(1)  # others are no film's


class _Picture:
    """Frames as pictures uint8 [height, width, 3], or whole tiles: as they are shown, the shorter side made to fit.

    Args:
        source: what they are to be.
        pixel_aspect: see _pixel_aspect.
        counts: "transparent" becomes 1 where a frame is.
    """

    def __init__(self, source: VideoSource, pixel_aspect: Fraction, counts: Counter[str]):
        self.source, self.pixel_aspect, self.counts = source, pixel_aspect, counts
        self.scaler = _av().video.reformatter.VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        """A frame the right way up, its centre."""
        source = self.source
        turns = round(frame.rotation / 90) % 4  # counterclockwise, as a phone notes that it was held
        turned = turns % 2 == 1
        across = frame.width * float(self.pixel_aspect)
        shown = (across, frame.height) if turned else (frame.height, across)
        least = source.tiles * source.height, source.tiles * source.width
        scale = max(least[0] / shown[0], least[1] / shown[1])
        height, width = max(least[0], round(shown[0] * scale)), max(least[1], round(shown[1] * scale))
        tall, wide = least
        if source.tiles > 1:
            tall, wide = height // source.height * source.height, width // source.width * source.width
        size = (height, width) if turned else (width, height)
        scaled = self.scaler.reformat(self._opaque(frame), *size, "rgb24", interpolation="BICUBIC", threads=1)
        top, left = (height - tall) // 2, (width - wide) // 2
        return np.rot90(scaled.to_ndarray(), turns)[top : top + tall, left : left + wide]

    def _opaque(self, frame: Any) -> Any:
        """A frame without transparency, on the ground."""
        if not (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
            return frame
        rgba = frame.to_ndarray(format="rgba")
        if rgba[..., 3].min() < 255:
            self.counts["transparent"] = 1
        return _av().VideoFrame.from_ndarray(on_ground(rgba, self.source.ground), format="rgb24")


def _checked(container: Any, stream: Any, path: str) -> Iterator[Any]:
    """The frames of a stream.

    Raises:
        DataError: a frame that is damaged or has no time, or an end before the one that the file announces.
    """
    announced, seen = container.duration, Fraction(0)
    announced = stream.duration * stream.time_base if stream.duration else Fraction(announced or 0, 10**6)
    for frame in container.decode(stream):
        if frame.is_corrupt or frame.pts is None:
            raise DataError(f"{path} cannot be decoded (a frame after {float(seen):.2f} s is damaged or has no time)")
        if light := _HDR.get(frame.color_trc):
            raise DataError(
                f"{path} is an HDR film ({light}), whose levels are no colours as they stand: map it to SDR before, "
                "e.g. with ffmpeg's filters zscale and tonemap"
            )
        seen = max(seen, frame.pts * frame.time_base)
        yield frame
    if seen < announced * 9 / 10 - 1:  # sound may last a little longer
        raise DataError(f"{path} ends after {float(seen):.2f} of {float(announced):.2f} s: copy it again")


@dataclass_options
def main(
    *,
    output: Path = options.OUTPUT,
    input: list[str] = typer.Option(..., help=f"Globs, folders or URLs of {', '.join(SUFFIXES)}."),
    source: VideoSource,
    settings: ClipSettings,
    execution: Execution,
    dry_run: bool = options.DRY_RUN,
) -> None:
    """Turn video into shards of latents for training."""

    def work() -> None:
        if source.frame_rate and source.stride > 1:
            raise DataError("give either --stride or --frame-rate")
        _av()
        found = find_files(input, SUFFIXES)
        what = f"clips of {source.frames} frames of {source.height} x {source.width}"
        if options.announce(output, found, SUFFIXES, settings.splits, what, dry_run):
            prepare_latents(output, [[file] for file in found.files], source, settings, str(found), execution)

    options.command(work)


if __name__ == "__main__":
    typer.run(main)
