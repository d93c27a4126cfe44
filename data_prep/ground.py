"""What is seen through the transparent parts of pictures and frames: a ground of one colour."""

from __future__ import annotations

import re

import numpy as np
import typer

WHITE = "ffffff"
_NAMED = {"white": WHITE, "black": "000000", "grey": "808080"}
HELP = "Colour under what is transparent: white, black, grey or RRGGBB."


def colour(value: str) -> str:
    """An option's value as RRGGBB."""
    digits = _NAMED.get(value, value.removeprefix("#").lower())
    if not re.fullmatch("[0-9a-f]{6}", digits):
        raise typer.BadParameter(f"{value} is no colour: white, black, grey or RRGGBB")
    return digits


def on_ground(rgba: np.ndarray, ground: str) -> np.ndarray:
    """Pixels without their alpha: round(alpha * rgb + (1 - alpha) * ground).

    Args:
        rgba: uint8 [..., 4], of straight alpha.
        ground: the colour, RRGGBB.

    Returns:
        uint8 [..., 3].
    """
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + np.frombuffer(bytes.fromhex(ground), np.uint8) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)
