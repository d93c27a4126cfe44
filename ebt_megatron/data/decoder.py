"""Latents back to pixels, for encoders that are linear in the pixels of a patch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebt_megatron.core.errors import DataError


@dataclass
class Decoder:
    """The linear decoder of `pixels` and `pca` encoders.

    Attributes:
        scale, offset: pixels of a patch = clamp(latents @ scale + offset), [C, P] and [P], in [0, 255].
        height, width, patch: of a frame, in pixels.
    """

    scale: Tensor
    offset: Tensor
    height: int
    width: int
    patch: int

    @classmethod
    def read(cls, path: Path) -> Decoder | None:
        """The decoder of an encoder.npz, or None where the encoder is not linear.

        Raises:
            DataError: if it does not say what samples were normalised by.
        """
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "settings"}
            settings = json.loads(str(file["settings"]))
        if settings["kind"] not in ("pixels", "pca"):
            return None
        if not {"mean", "std"} <= arrays.keys():
            raise DataError(f"{path} does not say what samples were normalised by: prepare the data again")
        mean, std = arrays["mean"], arrays["std"]
        components = arrays.get("components", torch.eye(len(mean)))
        center = arrays.get("center", torch.zeros(components.shape[1]))
        scale = 127.5 * std[:, None] * components
        offset = 127.5 * (mean @ components + center + 1)
        return cls(scale, offset, settings["height"], settings["width"], settings["patch"])

    def patches(self, latents: Tensor) -> Tensor:
        """Latents [..., patches, C] -> pixels of each patch [..., patches, P], in [0, 255], not rounded."""
        scale, offset = (t.to(latents.device, torch.float32) for t in (self.scale, self.offset))
        return (latents.float() @ scale + offset).clamp(0, 255)

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents [..., patches, C] -> pictures [..., height, width, 3], in [0, 255], not rounded."""
        rows, columns = self.height // self.patch, self.width // self.patch
        pixels = self.patches(latents).unflatten(-2, (rows, columns)).unflatten(-1, (self.patch, self.patch, 3))
        return pixels.movedim(-3, -4).flatten(-5, -4).flatten(-3, -2)

    def squared_error(self, latents: Tensor, others: Tensor) -> Tensor:
        """The mean squared difference of pixels, over each frame; latents [..., patches, C] -> [...]."""
        return (self.patches(latents) - self.patches(others)).square().mean((-1, -2))


def psnr(squared_error: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of pixels in [0, 255], in dB."""
    return 10 * torch.log10(255**2 / squared_error.clamp_min(1e-10))
