"""Puzzles, and how they are trained on."""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config.fields import at_least, positive


@dataclass
class PuzzlesConfig:
    """Puzzles, and how they are trained on (data.modality=puzzles)."""

    symmetries: bool = True  # every sample of training is turned into another puzzle by what its rules allow
    # over the first so many samples of a run, answers are given away as clues: of each puzzle a share that is uniform
    # below one that falls from 1 to 0
    clues_given_away: int = at_least(0, 0)
    passes: int = positive(1)  # of model.architecture=baseline: 1: feed-forward; more: recurrent, trained on so many
