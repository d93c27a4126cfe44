"""A loaded model of films: the next frame, and clips that go on from given frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.api.frames import FramesModel
from ebt_megatron.core.errors import DataError
from ebt_megatron.evaluation.clips import rolled_out


class VideoModel(FramesModel):
    """An EBT or a Transformer++ of films; see `Model`.

    Frames are uint8 [B, F, height, width, 3] of the encoder's size, or latents float [B, F, patches, channels], as
    `encode` makes them; what comes back is of the kind that was given. A clip without B is one of a batch of one.
    """

    @property
    def frames(self) -> int:
        """The most frames that a prediction sees."""
        return self.recipe.data.sequence_length

    def predict(self, frames: np.ndarray | Tensor, steps: int | None = None) -> Any:
        """The frame that follows.

        Args:
            frames: a clip, or a batch of clips, of up to `self.frames` frames.
            steps: of thinking; default: as trained.

        Returns:
            The next frame of each clip: as given, without F.
        """
        latents, back = self.as_latents(frames, 4)
        return back(self._longer(latents, 1, steps)[:, -1])

    def rollout(self, frames: np.ndarray | Tensor, count: int, steps: int | None = None) -> Any:
        """Clips that go on: each new frame is predicted from those before it, predicted ones included.

        Args:
            frames: a clip, or a batch of clips, of one frame or more.
            count: how many frames to add.
            steps: of thinking for a frame; default: as trained.

        Returns:
            The given frames and the new ones, as given.

        Raises:
            DataError: for frames of another size, or more than the model sees.
        """
        latents, back = self.as_latents(frames, 4)
        return back(self._longer(latents, count, steps))

    def _longer(self, latents: Tensor, count: int, steps: int | None) -> Tensor:
        given = latents.shape[1]
        if given < 1 or count < 1 or given + count > self.frames + 1:
            raise DataError(
                f"{given} frames and {count} to add: the model takes 1 to {self.frames} frames, and makes clips of up "
                f"to {self.frames + 1}"
            )
        clip = torch.zeros(latents.shape[0], self.frames + 1, *latents.shape[2:])
        clip[:, :given] = latents
        until = given + count
        return rolled_out(self.run, clip, given, self.steps_of(steps), until)[:, :until]
