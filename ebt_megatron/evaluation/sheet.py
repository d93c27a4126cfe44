"""Rows of pictures as one PNG."""

from __future__ import annotations

import io
from typing import Any


def sheet(rows: list[Any], scale: int = 2) -> bytes:
    """A PNG of rows of pictures [N, height, width, 3]."""
    import torch
    from PIL import Image

    whole = torch.cat(
        [
            torch.cat(
                [torch.nn.functional.pad(p.movedim(-1, 0), (1, 1, 1, 1), value=255.0).movedim(0, -1) for p in row], 1
            )
            for row in rows
        ]
    )
    array = whole.repeat_interleave(scale, 0).repeat_interleave(scale, 1).round().byte().numpy()
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()
