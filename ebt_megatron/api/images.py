"""A loaded model of pictures: denoise them, or make them of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.api.frames import FramesModel
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.evaluation.pictures import denoised, made

_PASSES = 50  # of a DiT that makes pictures


class ImageModel(FramesModel):
    """An EBT or a DiT of pictures; see `Model`.

    Pictures are uint8 [B, height, width, 3] of the encoder's size, or latents float [B, patches, channels]; what comes
    back is of the kind that was given.
    """

    def denoise(
        self, pictures: np.ndarray | Tensor, level: int | None = None, steps: int | None = None, times: int = 1
    ) -> Any:
        """Put noise on pictures, and take it off again: what the model was trained to do, and is judged by.

        Args:
            pictures: clean ones, one or a batch.
            level: of the noise, from 0 on; default: the highest one trained with.
            steps: of thinking, or passes of a DiT; default: as trained, and for a DiT level + 1 up to 50.
            times: a DiT denoises what it made again, from the same level, until it has so many times in all; it may
                help with noise or pictures that it was not trained on.

        Returns:
            The denoised pictures, as given.

        Raises:
            RecipeError: for a model that makes pictures instead, a level that there is not, or an EBT that is to
                denoise several times (which more steps do).
        """
        task: Any = self.run.task
        if not task.denoises:
            raise RecipeError(f"{self.name} makes pictures from noise, and does not denoise: use make")
        highest = task.options.schedule_steps - 1
        level = (task.options.highest_level if self.thinks else highest) if level is None else level
        if not 0 <= level <= highest:
            raise RecipeError(f"level={level}: the model's noise has levels 0 to {highest}")
        if times < 1 or (times > 1 and self.thinks):
            raise RecipeError(f"times={times}: at least 1, and of a DiT; an EBT takes more steps instead")
        latents, back = self.as_latents(pictures, 3)
        ids = torch.arange(len(latents)) + (1 << 51)  # apart from training's and validation's
        passes = self.steps_of(steps) if self.thinks else steps or min(level + 1, _PASSES)
        (out,) = denoised(self.run, MicroBatch(ids, latents), level, [passes], times=times)
        return back(out)

    def make(
        self, told: int | Sequence[int] | Sequence[str] | str = 1, steps: int | None = None, guidance: float = 0.0
    ) -> np.ndarray:
        """Make pictures of noise.

        Args:
            told: how many, of a model that is told nothing; else a caption or a class, or one for each picture.
            steps: of thinking, or passes of a DiT; default: as trained, and 50 for a DiT.
            guidance: how much more told than untold; 0: just told.

        Returns:
            uint8 [B, height, width, 3].

        Raises:
            RecipeError: for a model that denoises instead, or is told something else.
            DataError: where the encoder has no decoder.
        """
        task: Any = self.run.task
        if self.thinks and task.denoises:
            raise RecipeError(f"{self.name} denoises pictures, and makes none: use denoise")
        items: list[Any] = list(told) if not isinstance(told, str | int) else [told]
        by_text = [isinstance(item, str) for item in items]
        if task.captions is not None and not all(by_text):
            raise RecipeError(f"told={told!r}: {self.name} is told captions: give one text for each picture")
        if task.captions is None and any(by_text):
            raise RecipeError(f"told={told!r}: {self.name} is told no captions")
        if task.classes and not all(isinstance(i, int) and 0 <= i < task.classes for i in items):
            raise RecipeError(f"told={told!r}: {self.name} is told {task.classes} classes, from 0 on")
        if task.captions is None and not task.classes:
            if not isinstance(told, int) or told < 1:
                raise RecipeError(f"told={told!r}: {self.name} is told nothing: give how many pictures to make")
            items = [0] * told
        what: Any = items if task.captions is not None else torch.tensor(items)
        passes = self.steps_of(steps) if self.thinks else steps or _PASSES
        return self.decode(made(self.run, what, passes, guidance))
