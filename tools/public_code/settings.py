"""Hyper-parameters of the public code as keys of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.tools.public_code.source import Source

Hyper = dict[str, Any]
Supported = dict[str, tuple[Any, ...]]  # hyper-parameter, the values that can be had here


@dataclass
class Described:
    """What a checkpoint says of itself.

    Attributes:
        recipe: resolved.
        identity: what the data must have in common with it, by name, besides the recipe.
        prepare: how its data are prepared, options of `ebt-prepare`; "": nothing special.
    """

    recipe: Recipe
    identity: dict[str, Any] = field(default_factory=dict)
    prepare: str = ""


def require(hyper: Hyper, supported: Supported) -> None:
    """Raise RecipeError for the first hyper-parameter that is there and has another value."""
    for key, values in supported.items():
        if key in hyper and hyper[key] not in values:
            raise RecipeError(
                f"hyper-parameter {key}={hyper[key]} is not supported, only {' and '.join(map(str, values))}"
            )


def number(hyper: Hyper, name: str, default: float | None = None) -> float:
    """A hyper-parameter that must be a number; raises RecipeError if it is not, or is missing without a default."""
    value = hyper.get(name, default)
    if isinstance(value, int | float):
        return value
    raise RecipeError(
        f"hyper-parameter {name}={value}: a number is needed" if name in hyper else f"hyper-parameter {name} is missing"
    )


def take(target: object, hyper: Hyper, **names: str) -> None:
    """Set numbers from hyper-parameters that are there and not None."""
    for key, name in names.items():
        if hyper.get(name) is not None:
            setattr(target, key, type(getattr(target, key) or 0.0)(number(hyper, name)))


_TRAINING: Supported = {"optimizer": ("adamw",), "warm_up_base_lr_divider": (-1, None)}
_THINKING: Supported = {  # what would train an EBT otherwise than here, off
    "contrastive_loss": (False, None),
    "soften_target_prob_dist": (0, None),
    "energy_loss_coeff": (0, None),
    "out_of_bounds_loss_coeff": (0, None),
    "reconstruction_coeff": (1, None),
    "langevin_dynamics_noise_learnable": (False, None),
    "clamp_max_after_warm_up": (0, None),
}


def describe_training(recipe: Recipe, hyper: Hyper) -> None:
    """Set what every model is trained by; raises RecipeError for what cannot be had here."""
    require(hyper, _TRAINING)
    recipe.optimizer.lr = 1e-3
    recipe.optimizer.weight_decay_on = "all"
    take(
        recipe.optimizer,
        hyper,
        lr="peak_learning_rate",
        weight_decay="weight_decay",
        beta1="beta1",
        beta2="beta2",
        clip_grad="gradient_clip_val",
        warmup_steps="warm_up_steps",
    )
    take(recipe.training, hyper, steps="max_steps")
    recipe.optimizer.decay_steps = recipe.training.steps
    if hyper.get("max_scheduling_steps") not in (None, -1):  # -1: max_steps
        take(recipe.optimizer, hyper, decay_steps="max_scheduling_steps")
    if hyper.get("min_lr_scale") is not None:
        recipe.optimizer.min_lr_ratio = 1 / number(hyper, "min_lr_scale")


def describe_thinking(recipe: Recipe, hyper: Hyper, source: Source) -> None:
    """Set how an EBT of any family thinks; replay and where it starts are the family's."""
    require(hyper, _THINKING)
    t = recipe.thinking
    t.step_size_lr_floor = "model"
    steps, more = int(number(hyper, "mcmc_num_steps", 2)), int(number(hyper, "randomize_mcmc_num_steps", 0))
    # The last step is repeated: in training at random, at least so often; in evaluation as often as ever.
    least = max(1, int(number(hyper, "randomize_mcmc_num_steps_min", 0))) if more else 1
    if more and steps > 1 and not hyper.get("randomize_mcmc_num_steps_final_landscape"):
        raise RecipeError(
            f"hyper-parameters randomize_mcmc_num_steps={more} with mcmc_num_steps={steps}, and without "
            "randomize_mcmc_num_steps_final_landscape, repeat every step at random; only the last is repeated here"
        )
    t.min_steps, t.max_steps = steps - 1 + least, steps + more
    if hyper.get("truncate_mcmc"):
        t.loss = "last"
    if hyper.get("no_mcmc_detach"):
        t.gradient = "truncated" if hyper.get("truncate_mcmc") else "full"
    take(
        t,
        hyper,
        step_size="mcmc_step_size",
        learn_step_size="mcmc_step_size_learnable",
        step_size_lr_multiplier="mcmc_step_size_lr_multiplier",
        step_size_scale="randomize_mcmc_step_size_scale",
    )
    if hyper.get("mcmc_replay_buffer"):
        require(hyper, {"mcmc_replay_buffer_sample_bs_percent": (0.5, None)})
        if hyper.get("mcmc_replay_buffer_size") and hyper.get(
            "batch_size_per_device"
        ):  # of a rank; here of two samples
            held, batch = number(hyper, "mcmc_replay_buffer_size"), number(hyper, "batch_size_per_device")
            t.replay.capacity = max(1, round(held / max(1, batch // 2)))
    if hyper.get("langevin_dynamics_noise"):  # 0 switches it off, whatever the weight says; it may have been learned
        source.shape("model.langevin_dynamics_noise_std")
        t.langevin_noise = float(source.left["model.langevin_dynamics_noise_std"])
