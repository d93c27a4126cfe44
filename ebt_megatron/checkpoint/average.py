"""An exponential moving average (EMA) of a model's weights, which is what validation and every command then use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

PREFIX = "average."  # of its weights in a checkpoint, where the model's have "model."


class WeightAverage:
    """The average a <- d a + (1 - d) w of a pipeline stage's weights w, in fp32.

    At update n the decay d is at most (1 + n) / (10 + n), so that the first weights are soon forgotten.

    Args:
        model: the stage, unwrapped.
        decay: of one optimizer step, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Begin with the weights as they are."""
        self.weights = {name: p.detach().float().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            self.weights[name].lerp_(parameter.float(), 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model has the average's weights meanwhile."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def sharded(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """How a checkpoint holds it, as `model_state` says the model is held."""
        state = {name: renamed(model_state[name]) for name in self.weights}
        return {name: replace(value, data=self.weights[name], dtype=torch.float32) for name, value in state.items()}


def renamed(value: ShardedTensor) -> ShardedTensor:
    """A weight of the model as the average's."""
    return replace(value, key=PREFIX + value.key.removeprefix("model."))
