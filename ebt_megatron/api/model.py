"""What every loaded model has; what it can do is its modality's."""

from __future__ import annotations

from typing import Any

from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.session import TrainedRun


class Model:
    """A trained model.

    Attributes:
        run: what it was opened as: recipe, task, torch module (`run.model`), objective.
        recipe: resolved.
        name, step, tokens: of the recipe; how far it was trained.
        thinks: whether it is an EBT.

    Args:
        run: opened on one process.
    """

    def __init__(self, run: TrainedRun):
        self.run, self.recipe = run, run.recipe
        self.name, self.step, self.tokens = run.recipe.name, run.step, run.tokens
        self.thinks = bool(run.objective.thinks)

    @property
    def device(self) -> Any:
        """Where its weights are."""
        return next(self.run.model.parameters()).device

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return sum(p.numel() for p in self.run.model.parameters())

    def __repr__(self) -> str:
        recipe: Recipe = self.recipe
        kind = "EBT" if self.thinks else recipe.model.architecture
        return (
            f"<{type(self).__name__} {self.name}: {kind} of {self.parameters:,} parameters for {recipe.data.modality}, "
            f"{self.step:,} steps, on {self.device}>"
        )

    def require_thinking(self, what: str) -> None:
        """Raise RecipeError for a model that does not think."""
        if not self.thinks:
            raise RecipeError(f"{what}: {self.name} is a {self.recipe.model.architecture}, which does not think")

    def steps_of(self, steps: int | None) -> int:
        """The thinking steps that are meant; raises RecipeError for less than 1, or of a model that takes none."""
        if steps is None:
            return self.recipe.thinking.max_steps if self.thinks else 1
        self.require_thinking(f"steps={steps}")
        if steps < 1:
            raise RecipeError(f"steps={steps}: must be at least 1")
        return steps
