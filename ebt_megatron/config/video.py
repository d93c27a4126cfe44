"""Frames, and what they are to a model."""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config.fields import one_of, positive, within


@dataclass
class VideoConfig:
    """Frames, and what they are to a model (data.modality=video)."""

    tokens_per_side: int = positive(1)  # k: a frame is k x k tokens
    # what Transformer++ puts out: the next frame, or its change from the last observed one (an EBT: thinking.initial)
    predicts: str = one_of("frame", "change", default="frame")
    # linear maps from Transformer++'s hidden states to a frame: one | two, the first of them square and without a bias
    output_maps: int = within(1, 2, 1, "1 or 2")
    map_biases: bool = True  # Transformer++'s maps from and to frames have biases
