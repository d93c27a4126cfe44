"""What loaded models of films and pictures share: pixels to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.api.model import Model
from ebt_megatron.core.errors import DataError
from ebt_megatron.data_prep.encoders import Encoder, load_encoder


class FramesModel(Model):
    """A model over an encoder's latents; see `Model`."""

    @cached_property
    def encoder(self) -> Encoder:
        """What makes latents of frames, and frames of latents, as for the model's data."""
        return load_encoder(self.run.source.sidecar())

    def encode(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [..., height, width, 3] -> latents float32 [..., patches, channels].

        Raises:
            DataError: for frames of another size.
        """
        expected = (self.encoder.height, self.encoder.width, 3)
        if frames.shape[-3:] != expected:
            raise DataError(f"frames are {list(frames.shape[-3:])}, the model's encoder takes {list(expected)}")
        flat = self.encoder.to_samples(self.encoder.encode(frames.reshape(-1, *expected))).astype(np.float32)
        return torch.from_numpy(flat).unflatten(0, frames.shape[:-3] or (1,)).view(*frames.shape[:-3], *flat.shape[1:])

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [..., patches, channels] -> frames uint8 [..., height, width, 3].

        Raises:
            DataError: where the encoder has no decoder.
        """
        flat = latents.reshape(-1, *latents.shape[-2:]).float().cpu().numpy()
        frames = self.encoder.to_frames(flat)
        return frames.reshape(*latents.shape[:-2], *frames.shape[1:])

    def as_latents(self, given: np.ndarray | Tensor, dims: int) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """A batch of latents, and the way back to what was given: pixels or latents, one or a batch.

        Args:
            given: uint8 pixels, or latents.
            dims: of a batch of latents.
        """
        pixels = isinstance(given, np.ndarray) and given.dtype == np.uint8
        latents = self.encode(np.asarray(given)) if pixels else torch.as_tensor(given, dtype=torch.float32)
        shape = tuple(self.run.source.manifest.shape[-2:])
        if latents.shape[-2:] != shape:
            raise DataError(f"latents are {list(latents.shape[-2:])} a frame, the model's are {list(shape)}")
        single = latents.dim() == dims - 1
        if latents.dim() not in (dims, dims - 1):
            raise DataError(f"{list(given.shape)} is neither one nor a batch of them")

        def back(made: Tensor) -> Any:
            made = made[0] if single else made
            return self.decode(made) if pixels else made

        return (latents[None] if single else latents), back
