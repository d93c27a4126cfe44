"""Noise and conditions of pictures."""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config.fields import at_least, fraction, one_of, positive
from ebt_megatron.core.errors import RecipeError


@dataclass
class ImagesConfig:
    """Noise and conditions of pictures (data.modality=images).

    Level t of a schedule of T steps is a picture after t + 1 of them: sqrt(a_t) x + sqrt(1 - a_t) noise, a_t the
    product of 1 - beta over the steps, beta linear (arXiv 2006.11239).
    """

    schedule_steps: int = positive(1000)  # T, the steps of the schedule
    beta_first: float = positive(1e-4)  # beta of the first step
    beta_last: float = positive(0.02)  # beta of the last step
    lowest_level: int = at_least(0, 99)  # an EBT is trained to denoise levels drawn from these; a DiT see dit_levels
    highest_level: int = at_least(0, 99)  # the highest of the levels that an EBT is trained on
    # levels that a DiT is trained on: those of the whole schedule | those from lowest_level to highest_level
    dit_levels: str = one_of("all", "range", default="all")
    see_level: bool = True  # an EBT that denoises is conditional on the level; a DiT always is
    learn_sigma: bool = False  # a DiT learns the variance of a random step, too (arXiv 2102.09672)
    # what the variance is learned by: 0.001 of the whole bound, in nats | a level's term of it in bits, with pixels of
    # 8 bits at level 0, as the paper's public code has it
    sigma_loss: str = one_of("nats", "bits", default="nats")
    # what is put out of the variance: where between its bounds it is, from 0 to 1 | from -1 to 1, as the public code
    sigma_output: str = one_of("fraction", "signed", default="fraction")
    classes: bool = False  # conditional on the class of the picture, from the labels of the shards
    captions: bool = False  # conditional on the caption of the picture, as the shards have it
    condition_vector: bool = True  # a learned vector is added to whatever else conditions the layers
    class_dropout: float = fraction(0.1)  # share of training samples that are unconditional, for guidance

    def check(self) -> None:
        """Raise RecipeError unless the schedule has the levels."""
        if not self.lowest_level <= self.highest_level < self.schedule_steps:
            raise RecipeError(
                f"images.lowest_level={self.lowest_level}, highest_level={self.highest_level}: must rise and be below "
                f"images.schedule_steps={self.schedule_steps}"
            )
        if self.classes and self.captions:
            raise RecipeError(
                "images.classes=true and images.captions=true: a picture has one condition, set one to false"
            )
        if not self.beta_first <= self.beta_last < 1:
            raise RecipeError(
                f"images.beta_first={self.beta_first:g}, beta_last={self.beta_last:g}: must rise and be below 1"
            )
