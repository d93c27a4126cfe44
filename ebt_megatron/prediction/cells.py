"""Predictions of the symbols of a puzzle's cells: text's, but cells count as they are asked for.

A cell that is given is predicted like any other, and nothing is learned from it: its weight in every loss is 0. The
others' weights are S / (cells that are asked for), so that the mean over a puzzle's S cells is that over the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ebt_megatron.prediction.logits import LogitsAdjoint, TextPrediction
from ebt_megatron.prediction.plain_logits import PlainText

GIVEN = -1  # the target of a cell that is not asked for


def cell_weights(targets: Tensor) -> Tensor:
    """Of each cell in the loss, float32 [S, B], for targets [B, S]; a puzzle without questions has none."""
    asked = (targets != GIVEN).float()
    return (asked * targets.shape[1] / asked.sum(1, keepdim=True).clamp_min(1)).t().contiguous()


class CellPrediction(TextPrediction):
    """A micro-batch of predicted grids, a `Prediction`; its losses are weighted.

    Args:
        kernels, table, vocab_size, group: as `TextPrediction`.
        targets: int64 [B, S], GIVEN where nothing is asked.
        rest: as `TextPrediction`.
    """

    def __init__(self, kernels: Any, table: Any, vocab_size: int, group: Any, targets: Tensor, *rest: Any):
        super().__init__(kernels, table, vocab_size, group, targets.clamp_min(0), *rest)
        self.weights = cell_weights(targets).to(device=table.device, dtype=self.rows.dtype)

    def refine(self, energy_grad: Tensor, alpha: Tensor) -> Tensor:
        """See `Prediction`."""
        return super().refine(energy_grad, alpha) * self.weights

    def slope(self) -> Tensor:
        """See `Prediction`."""
        return super().slope() * self.weights

    def tangent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        return super().tangent(weight * self.weights)

    def begin_adjoint(self) -> CellAdjoint:
        """See `Prediction`."""
        return CellAdjoint(self)

    def plain(self) -> PlainCells:
        """See `Prediction`."""
        return PlainCells(**vars(super().plain()), weights=self.weights)


class CellAdjoint(LogitsAdjoint):
    """The way back through the steps of a `CellPrediction`."""

    prediction: CellPrediction

    def add_loss_gradient(self, step: int, weight: Tensor) -> None:
        """See `PredictionAdjoint`."""
        super().add_loss_gradient(step, weight * self.prediction.weights)


@dataclass(kw_only=True)
class PlainCells(PlainText):
    """Predicted symbols in plain torch.

    Attributes:
        weights: [S, B] of each cell's loss.
    """

    weights: Tensor

    def loss(self, y: Tensor) -> Tensor:
        """Cross-entropy, [S * B], weighted."""
        return super().loss(y) * self.weights.flatten()
