"""Films made by a trained run, which go on from held-out ones: `ebt-films RUN --frames 24 --output made.gif`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries, say, user_path
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.files import write_whole
from ebt_megatron.core.records import to_json

app = typer.Typer()


def make(
    run_dir: Path, overrides: list[str], clips: int, given: int | None, frames: int | None, steps: int | None
) -> tuple[Any, Any, int, dict[str, Any]]:
    """Films that go on from held-out clips, and what they are worth.

    Args:
        run_dir: a training.output_dir of video.
        overrides: of its recipe: key=value; data.validation says which clips.
        clips: how many, spread over the data.
        given: true frames that each begins with; None: half of a clip, 8 at most.
        frames: to add, beyond the clip's own if wanted; None: as many as the clip has.
        steps: of thinking for a frame; None: those trained with.

    Returns:
        The films, and the true clips they began as, uint8 [clips, frames, height, width, 3]; how many frames of each
        are given; and of the frames that there is a truth of, how like it they are: of the "model", of the last given
        frame again ("repeat_last"), and of the "truth" itself its motion.

    Raises:
        RecipeError: for a run of something else, or as many frames given as a clip has.
        DataError: for an encoder without a decoder.
    """
    import torch

    from ebt_megatron.data_prep.encoders import load_encoder
    from ebt_megatron.evaluation.clips import continued, pixels_ahead, spread_clips
    from ebt_megatron.evaluation.video_evaluation import given_of
    from ebt_megatron.session import open_run
    from ebt_megatron.tasks import task_as
    from ebt_megatron.tasks.video import Video

    with open_run(run_dir, overrides) as run:
        task_as(run.task, Video)
        true = spread_clips(run, clips)
        length = true.shape[1]
        given = given_of(length) if given is None else given
        if not 1 <= given < length:
            raise RecipeError(f"--given {given}: clips of {run_dir} have {length} frames, give from 1 to {length - 1}")
        frames = length - given if frames is None else frames
        made = continued(run, true[:, :given], frames, steps)
        encoder = load_encoder(run.source.sidecar())
        shown, seen = (
            encoder.to_frames(x.flatten(0, 1).cpu().numpy()).reshape(*x.shape[:2], encoder.height, encoder.width, 3)
            for x in (made, true)
        )
    known = min(length, given + frames)
    model, truth = (torch.from_numpy(x[:, :known]) for x in (shown, seen))
    still = truth.clone()
    still[:, given:] = truth[:, given - 1 : given]
    measures = {
        "model": pixels_ahead(model, truth, given),
        "repeat_last": pixels_ahead(still, truth, given),
        "truth": {"motion": pixels_ahead(truth, truth, given)["motion"]},
    }
    return shown, seen, given, measures


@app.command()
def main(
    run_dir: Path = typer.Argument(..., parser=user_path, help="A training.output_dir of a run of video."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs, e.g. data.validation=[data/films/validation]."),
    output: Path = typer.Option(
        "made.gif", parser=user_path, help="A .gif, or a .npz of `frames`; OUTPUT.json beside."
    ),
    clips: int = typer.Option(4, min=1, help="Films, which begin as clips spread over data.validation."),
    given: int | None = typer.Option(None, min=1, help="True frames that each begins with; default: half, at most 8."),
    frames: int | None = typer.Option(None, min=1, help="Frames to add; default: as many as a clip has left."),
    steps: int | None = typer.Option(None, min=1, help="Thinking steps of a frame; default: as trained."),
) -> None:
    """Make films: each frame is predicted from those before it, predicted ones included."""

    def work() -> None:
        quiet_libraries()
        import numpy as np

        from ebt_megatron.evaluation.video_evaluation import animation

        if output.suffix not in (".gif", ".npz"):
            raise RecipeError(f"--output {output}: give a name that ends in .gif or .npz")
        if not output.absolute().parent.is_dir():
            raise RecipeError(f"--output {output}: {output.parent} is not a folder")
        made, _, begun, measures = make(run_dir, overrides or [], clips, given, frames, steps)
        if output.suffix == ".gif":
            write_whole(output, animation([made], begun))
        else:
            np.savez_compressed(stream := io.BytesIO(), frames=made)
            write_whole(output, stream.getvalue())
        write_whole(output.with_name(f"{output.name}.json"), to_json({"given": begun, **measures}, indent=1) + "\n")
        say(f"{output}: {len(made)} films of {made.shape[1]} frames, the first {begun} given")
        model, last, truth = measures["model"], measures["repeat_last"], measures["truth"]["motion"]
        for ahead, ratio in enumerate(model["psnr"]):
            say(
                f"{ahead + 1:>3} ahead: PSNR {ratio:.2f} dB (last frame again {last['psnr'][ahead]:.2f}), SSIM "
                f"{model['ssim'][ahead]:.3f} ({last['ssim'][ahead]:.3f}), motion {model['motion'][ahead]:.2f} "
                f"(truth {truth[ahead]:.2f})"
            )

    guarded(work)


if __name__ == "__main__":
    app()
