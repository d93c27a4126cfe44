"""Small synthetic videos and pictures, and preparation with the options of most tests."""

import numpy as np
import typer
from typer.testing import CliRunner

from ebt_megatron.data_prep import images, text


def invoke(main, *arguments):
    """Run a command line in this process."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def prepare_text(source, output, *more):
    options = ["--train-bpe", "300", "--sequence-length", "8", "--validation-fraction", "0.2"]
    return invoke(text.main, "--input", source, "--output", output, *options, *more)


def prepare_pictures(source, output, *more):
    options = ["--height", "16", "--width", "16", "--encoder", "pixels", "--validation-fraction", "0.3"]
    return invoke(images.main, "--input", source, "--output", output, *options, *more)


def said(result):
    return " ".join(result.output.split())


def moving_square(frames, height=48, width=64, seed=0):
    """uint8 [frames, height, width, 3]: a bright square going over a gradient."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    background = np.stack([x * 2, y * 3, (x + y) + 20 * generator.random()], -1) % 256
    color, start, speed = generator.integers(150, 256, 3), generator.integers(0, 20, 2), generator.uniform(0.3, 1.5, 2)
    video = np.repeat(background[None].astype(np.uint8), frames, 0)
    for i in range(frames):
        top, left = (start + speed * i).astype(int) % (height - 12, width - 12)
        video[i, top : top + 12, left : left + 12] = color
    return video


def write_video(path, frames, rate=25, rotation=0, **options):
    """Encode uint8 frames [N, H, W, 3] with PyAV, to be shown turned counterclockwise by `rotation` degrees."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate, bit_rate=4_000_000)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_videos(folder, count=8, frames=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write_video(folder / f"{i:02d}.mp4", moving_square(frames, seed=i))
    return folder


def psnr(a, b):
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
