"""Frames, and what they are to a model."""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config.fields import one_of, positive


@dataclass
class VideoConfig:
    """Frames, and what they are to a model (data.modality=video)."""

    tokens_per_side: int = positive(1)  # k: a frame is k x k tokens
    # what Transformer++ puts out: the next frame, or its change from the last observed one (an EBT: thinking.initial)
    predicts: str = one_of("frame", "change", default="frame")
