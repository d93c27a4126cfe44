"""How predictions are optimised, and which gradient trains the energy."""

from __future__ import annotations

from dataclasses import dataclass, field

from ebt_megatron.config.fields import at_least, one_of, positive, within
from ebt_megatron.core.errors import RecipeError


@dataclass
class ReplayConfig:
    """The replay buffer: earlier samples restart from the prediction they ended with."""

    enabled: bool = False  # one replayed sample for every two fresh ones
    capacity: int = 4  # predictions kept per replay slot (one slot for two samples of the batch)


@dataclass
class ThinkingConfig:
    """How predictions are optimised, and which gradient trains the energy."""

    min_steps: int = positive(2)  # training draws its number of steps from [min, max]
    max_steps: int = 2  # evaluation thinks this many steps; training draws from [min, max]
    # energies that steps descend, told apart by model.conditioning; steps beyond share the last
    landscapes: int | None = at_least(1, None, ", or null for one a step")
    # y' = softmax(y) - alpha dE/dp, the public code's | y - alpha dE/dy, the paper's listing | y - alpha dE/dp
    step_rule: str = one_of("probability_descent", "logit_descent", "mirror_descent", default="probability_descent")
    loss: str = one_of("every", "last", default="every")  # every: the mean over the steps' losses
    # of the losses of every step, learn from so many, drawn anew each iteration
    learned_steps: int | None = at_least(1, None, ", or null for all")
    gradient: str = one_of("detached", "full", "truncated", default="detached")  # see docs/design.md
    step_size: float = positive(30.0)  # alpha, where it starts
    # text, with model.initialization=unit_logits: the standard deviation of what the first step adds to logits, about
    first_step_std: float = positive(1.0)
    learn_step_size: bool = True  # train alpha
    step_size_lr_multiplier: float | None = None  # default: 3 x step_size, as the paper's 1500 for 500
    # its learning rate ends at min_lr_ratio of its own peak | of the model's, as in the public code
    step_size_lr_floor: str = one_of("own", "model", default="own")
    step_size_min: float = positive(1e-4)  # alpha is never below
    step_size_scale: float = at_least(1, 1.0)  # alpha is drawn per position from [alpha/scale, alpha*scale]
    langevin_noise: float = 0.0  # standard deviation added before each step
    # to what: the prediction itself, or, of latents, what the model reads of it, which leaves the prediction as it is
    langevin_on: str = one_of("prediction", "embedding", default="prediction")
    langevin_in_evaluation: bool = True  # as the model was trained with it
    # context: an output on the context stream, trained beside the steps, says where thinking starts
    # observed: of video, the last frame that is observed; of pictures, the noised one
    initial: str = one_of("noise", "context", "observed", default="noise")
    initial_std: float = at_least(0, 0.0)  # of the noise; 0: zeros, which for text saves passes over the vocabulary
    # in training, this share of samples starts on the way to the answer instead: puzzles with a drawn share of cells
    # wrong, pictures a drawn part of the way from where they would start
    starts_near_answer: float = within(0, 1, 0.0, "between 0 and 1")
    initial_loss_weight: float = positive(1.0)  # initial=context: of its loss, beside 1 for the steps' together
    engine: str = one_of("dual_stream", "double_backward", default="dual_stream")  # the latter: the slow reference
    reuse: bool = False  # learn takes activations and input gradients from propose (more memory)
    # bfloat16: half the memory; small steps of a logit round away
    logits_dtype: str = one_of("float32", "bfloat16", default="float32")
    # > 0: logits are not stored, every pass makes them anew, so many rows at a time (less memory)
    regenerate: int = at_least(0, 0, ": a number of rows, or 0 to store the logits")
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    @property
    def starts_at_noise(self) -> bool:
        """Whether predictions start at noise, of deviation `initial_std`."""
        return self.initial == "noise" and self.initial_std > 0

    @property
    def starts_at_context(self) -> bool:
        """Whether predictions start at what the context stream's output gives."""
        return self.initial == "context"

    @property
    def noisy(self) -> bool:
        """Whether noise decides where thinking starts or goes, so that several starts differ."""
        return self.langevin_noise > 0 or self.starts_at_noise

    @property
    def num_landscapes(self) -> int:
        """How many energies the steps descend."""
        return self.landscapes or self.max_steps

    def check(self) -> None:
        """Raise RecipeError unless there is a number of steps to draw, and nothing else says where thinking starts."""
        if self.max_steps < self.min_steps:
            raise RecipeError(f"thinking.max_steps={self.max_steps} is below thinking.min_steps={self.min_steps}")
        if self.num_landscapes > self.max_steps:
            raise RecipeError(
                f"thinking.landscapes={self.landscapes} is above thinking.max_steps={self.max_steps}: "
                "no step would reach the others"
            )
        if self.starts_at_context and self.replay.enabled:
            raise RecipeError(
                "thinking.initial=context starts every sample at its own context's prediction, none at a replayed one: "
                "set thinking.replay.enabled=false"
            )
