"""How to think at inference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.options import option

CHOICES = ("energy", "drop", "max", "mixture")


def _option(default: Any, help: str) -> Any:
    return option(default, help=help, rich_help_panel="Thinking (EBTs)")


_LARGEST = 1e30  # what arithmetic in fp32 stands


@dataclass(frozen=True)
class ThinkingOptions:
    """How to think; the defaults think as the run's evaluation does. Every option says in its help what it is.

    Attributes:
        final_energy: take the energy of what thinking ends with, too: one forward pass more.
    """

    steps: int | None = _option(
        None,
        "The most steps for a token; default: as many as the run was trained with; 0: the context's own prediction, "
        "where thinking starts there.",
    )
    more_steps: str = _option(
        "last", "Where steps beyond those trained go: 'last' landscape, or 'every' one, evenly and in order."
    )
    energy_tolerance: float | None = _option(
        None, "A token stops when its energy changes by no more than this from one step to the next on one landscape."
    )
    prediction_tolerance: float | None = _option(
        None, "A token stops when a step moves its prediction by no more than this (text: total variation, 0 to 1)."
    )
    confidence: float | None = _option(
        None,
        "A token stops when its most likely answer has this probability; before the first step as well where thinking "
        "starts at the context's own prediction.",
    )
    flops: float | None = _option(
        None,
        "FLOPs that one batch of tokens may think for; when few are left, the tokens whose energy fell most go on.",
    )
    step_size: float | None = _option(None, "Step size instead of the trained one.")
    step_size_scale: float = _option(1.0, "Factor of the step size.")
    step_size_on: str = _option("all", "Landscapes that step_size and step_size_scale are for: 'all' or the 'last'.")
    accept_only: bool = _option(
        False,
        "Take a step only where it lowers the token's energy on the step's landscape; else the token stays as it is "
        "(the public code takes softmax of it, each time anew).",
    )
    langevin_noise: float | None = _option(
        None, "Deviation of the noise before a step; default: as in the run's evaluation; 0: none."
    )
    langevin_first_only: bool = _option(False, "Noise before the first step alone.")
    candidates: int = _option(1, "M, how many starts each token thinks from.")
    choose: str = _option(
        "energy",
        "Of candidates, keep that of lowest final 'energy', of the largest 'drop' from its first energy, of "
        "the highest final energy ('max', to compare with), or a 'mixture' of all, weighted by exp(-energy / tau).",
    )
    tau: float = _option(1.0, "Temperature of the mixture's weights.")
    final_energy: bool = False

    @property
    def verifies(self) -> bool:
        """Whether the energies that thinking ends with are needed."""
        return self.final_energy or self.candidates > 1

    def check(self) -> None:
        """Raise RecipeError for the first option that does not do."""
        for name, least in (("steps", 0), ("candidates", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}={value}: must be at least {least}")
        for name, choices in (
            ("more_steps", ("last", "every")),
            ("step_size_on", ("all", "last")),
            ("choose", CHOICES),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name}={getattr(self, name)}: choose one of {', '.join(choices)}")
        for name in ("flops", "step_size", "step_size_scale", "tau"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                raise RecipeError(f"{name}={value}: must be greater than 0, and at most {_LARGEST:g}")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise RecipeError(f"confidence={self.confidence}: must be from 0 to 1")
        for name in ("energy_tolerance", "prediction_tolerance", "langevin_noise"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _LARGEST:
                raise RecipeError(f"{name}={value}: must be from 0 to {_LARGEST:g}")

    def noise(self, thinking: ThinkingConfig, step: int = 0) -> float:
        """The deviation of the Langevin noise before a step, of a run with this recipe."""
        if step and self.langevin_first_only:
            return 0.0
        if self.langevin_noise is not None:
            return self.langevin_noise
        return thinking.langevin_noise if thinking.langevin_in_evaluation else 0.0

    def schedule(self, landscapes: int, trained: int) -> list[int]:
        """The landscape of each step, of so many landscapes, and steps that were trained."""
        steps = trained if self.steps is None else self.steps
        if self.more_steps == "every" and steps > landscapes:
            return [step * landscapes // steps for step in range(steps)]
        return [min(step, landscapes - 1) for step in range(steps)]

    def size(self, trained: float, landscape: int, landscapes: int) -> float:
        """The step size on a landscape, for the trained one."""
        if self.step_size_on == "last" and landscape < landscapes - 1:
            return trained
        return (trained if self.step_size is None else self.step_size) * self.step_size_scale

    @classmethod
    def of(cls, given: dict[str, Any]) -> ThinkingOptions:
        """Check and return the options that a command or a program was given by name.

        Raises:
            RecipeError: for a name there is not, or a value that does not do.
        """
        types = {f.name: str(f.type).split(" ")[0] for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in types:
                raise RecipeError(f"{name}={value}: no such option; there are {', '.join(types)}")
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = {
                "int": number and float(value).is_integer(),
                "float": number,
                "bool": isinstance(value, bool),
                "str": isinstance(value, str),
            }[types[name]]
            if not fits:
                raise RecipeError(
                    f"{name}={value}: must be {'a whole number' if types[name] == 'int' else types[name]}"
                )
            values[name] = {"int": int, "float": float}.get(types[name], lambda v: v)(value)
        options = cls(**values)
        options.check()
        return options
