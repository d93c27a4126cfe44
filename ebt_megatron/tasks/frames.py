"""Frames as tokens: one each, or k x k of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ebt_megatron.core.errors import RecipeError


@dataclass(frozen=True)
class FrameTokens:
    """How a frame of patches is cut into tokens, row by row; a token is its patches' channels one after another.

    Attributes:
        rows, columns: of patches in a frame.
        channels: of a patch.
        side: k, tokens along each side.

    Raises:
        RecipeError: where k does not divide the sides.
    """

    rows: int
    columns: int
    channels: int
    side: int = 1

    def __post_init__(self) -> None:
        if self.rows % self.side or self.columns % self.side:
            raise RecipeError(
                f"video.tokens_per_side={self.side} does not divide frames of {self.rows} x "
                f"{self.columns} patches: choose one that divides both"
            )

    @property
    def count(self) -> int:
        """Tokens of a frame."""
        return self.side**2

    @property
    def size(self) -> int:
        """Numbers of a token."""
        return self.rows * self.columns // self.count * self.channels

    def split(self, frames: Tensor) -> Tensor:
        """Frames [B, F, patches, channels] -> tokens [B, F * count, size]."""
        k = self.side
        grid = frames.unflatten(2, (k, self.rows // k, k, self.columns // k))
        return grid.transpose(3, 4).flatten(4).flatten(1, 3)

    def join(self, tokens: Tensor) -> Tensor:
        """The inverse: tokens [B, F * count, size] -> frames [B, F, patches, channels]."""
        k = self.side
        grid = tokens.unflatten(2, (self.rows // k, self.columns // k, self.channels)).unflatten(1, (-1, k, k))
        return grid.transpose(3, 4).flatten(2, 5)
