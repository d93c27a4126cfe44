"""Reading a context: the context stream at any positions, over what was read before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from ebt_megatron import kernels
from ebt_megatron.config import Recipe
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.cache import Context, ContextCache, Queries
from ebt_megatron.inference.stages import Stages
from ebt_megatron.model.flops import position_flops


class Reader:
    """The context stream of a model, which EBT and Transformer++ share.

    Args:
        model: this pipeline stage; its parameters are constants from now on.
        recipe: the run's.
        stages: this stage's place.
        window: how many context positions one sees, itself included: those trained with.
        embed: on the first stage: observed values [1, R] -> hidden [R, 1, D].
    """

    def __init__(
        self, model: Any, recipe: Recipe, stages: Stages, window: int, embed: Callable[[Tensor], Tensor] | None
    ):
        self.model, self.recipe, self.stages, self.window, self.embed = model, recipe, stages, window, embed
        self.kernels = kernels.select(recipe.model.kernels)
        self.sinks = int(getattr(model, "step_tokens", 0))
        self.conditions = int(model.num_landscapes) if getattr(model, "context_sees_step", False) else 1
        weight = max(model.parameters(), key=lambda p: p.dim())
        self.dtype, self.device = weight.dtype, weight.device
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def rotations(self, positions: Tensor, like: Tensor) -> Tensor:
        """Cosines and sines [R, H / 2, 2] of positions [R]."""
        length = 1 << int(positions.max()).bit_length()  # few tables serve all lengths
        return self.model.rotary.table(length, 0, like)[positions]

    def context(self, rows: int, length: int, chunk: int) -> Context:
        """An empty context.

        Args:
            rows: B.
            length: the most positions that a row will have.
            chunk: the most positions of a row that one `read` adds.

        Raises:
            RecipeError: where the device has no memory for it.
        """
        slots = self.require_memory(rows, length, chunk)
        layers, groups, size = self._sizes
        like = torch.empty(0, dtype=self.dtype, device=self.device)

        def cache() -> ContextCache:
            return ContextCache(self.kernels, layers, rows, slots, self.window, groups, size, self.sinks, like)

        context = Context([cache() for _ in range(self.conditions)], self.sinks)
        if self.sinks:
            every = torch.arange(rows, device=self.device)
            queries = Queries(every, torch.zeros_like(every))
            for landscape in range(self.conditions):
                self._pass(context, landscape, queries, partial(self._step_token, landscape, rows))
        return context

    def _step_token(self, landscape: int, rows: int) -> Tensor:
        return self.model.step_token(landscape, rows).transpose(0, 1)

    def require_memory(self, rows: int, length: int, chunk: int) -> int:
        """How many positions of each row `context` holds, for the same arguments.

        Raises:
            RecipeError: where the device has no memory for it.
        """
        slots = ContextCache.slots_for(length + self.sinks, self.window, chunk, self.sinks)
        layers, groups, size = self._sizes
        needed = self.conditions * layers * 2 * rows * groups * slots * size * self.dtype.itemsize
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        if needed > free:
            what = f"the cache of {rows} contexts of {slots} positions"
            raise RecipeError(
                f"{what} takes {needed / 1e9:.3g} GB, {self.device} has {free / 1e9:.3g} left: "
                "take fewer or shorter ones at a time"
            )
        return slots

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Layers of this stage, key heads of this rank, and their size."""
        config = self.model.config
        layers = config.num_layers // config.pipeline_model_parallel_size
        return layers, config.num_query_groups // config.tensor_model_parallel_size, config.kv_channels

    @torch.no_grad()
    def _pass(self, context: Context, landscape: int, queries: Queries, begin: Callable[[], Tensor]) -> Tensor:
        attend = context.caches[landscape].append(queries)
        _, out = self.stages.down(
            begin,
            len(queries.rows),
            lambda h: self.model.read(h, self.rotations(queries.positions, h), attend, landscape),
        )
        return out

    def read(self, context: Context, rows: Tensor, positions: Tensor, observed: Tensor) -> Tensor:
        """Add positions to a context.

        Args:
            context: from `context`.
            rows, positions: int64 [R]; of each row, those that follow the ones it has.
            observed: [R, ...] values there.

        Returns:
            What the stage hands on, or on the last stage ends with, [R, 1, D].
        """
        queries = Queries(rows, positions + self.sinks)
        embed = self.embed
        begin = (lambda: embed(observed[None])) if embed is not None else None
        for landscape in range(self.conditions):
            out = self._pass(context, landscape, queries, begin)  # type: ignore[arg-type]
        return out

    def reading_flops(self, positions: Tensor) -> float:
        """FLOPs of `read` at positions [R]."""
        return self.conditions * float(self.layer_flops((positions + 1).clamp_max(self.window) + self.sinks).sum())

    def layer_flops(self, visible: Tensor) -> Tensor:
        """FLOPs of one forward pass of the layers at positions that see so many keys, [R]."""
        fixed = position_flops(self.recipe, 0)
        return fixed + (position_flops(self.recipe, 1) - fixed) * visible.double()


def chunks(
    sequences: Sequence[Sequence[int]], size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, positions, tokens) of sequences, so many positions of each row at a time."""
    longest = max(map(len, sequences))
    for begin in range(0, longest, size):
        part = [
            (row, begin + i, token)
            for row, tokens in enumerate(sequences)
            for i, token in enumerate(tokens[begin : begin + size])
        ]
        rows, positions, values = torch.tensor(part, device=device).unbind(1)
        yield rows, positions, values
