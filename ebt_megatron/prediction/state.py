"""What thinking at inference needs of a prediction: rows that start, enter the model, step, and nothing of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor


class State(Protocol):
    """R predictions, each at a position of its own in a sample of its own."""

    def perturb(self, step: int, std: float) -> None:
        """Add the noise before step `step`, in place; the same as in training."""
        ...

    def embed(self) -> Tensor:
        """The model's input, [R, 1, D]."""
        ...

    def step(self, energy_grad: Tensor, alpha: float) -> None:
        """Take a step along the energy's gradient [R, 1, D] at what `embed` returned last, in place."""
        ...

    def distance(self, other: Self) -> Tensor:
        """How far each prediction is from another state's, [R]."""
        ...

    def confidence(self) -> Tensor:
        """The probability of each prediction's most likely answer, [R]."""
        ...

    def take(self, rows: Tensor) -> Self:
        """A copy of some rows, int64 indices."""
        ...

    def where(self, keep: Tensor, other: Self) -> Self:
        """Rows of this state where bool [R] `keep`, else of the other."""
        ...

    def join(self, others: Sequence[Self]) -> Self:
        """These rows, and behind them those of others."""
        ...

    def mixed(self, weights: Tensor) -> Self:
        """Return the R' mixtures of M predictions, given M R' rows, M after M, with weights [M, R'] that sum to 1."""
        ...
