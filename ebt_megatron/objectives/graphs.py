"""CUDA graphs: a micro-batch's forward and backward passes recorded once, then launched as one.

A small model launches thousands of kernels a micro-batch, each shorter than its launch. What a
micro-batch does is a function of its tensors alone (noise too, which is hashed from sample ids), so the
same graph serves every micro-batch of one shape and number of thinking steps. The kernels are the same, and so is
the result. What changes from batch to batch on the host (the replay buffer, pipeline messages) cannot be
recorded; `check` of `ebt_megatron.config` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.parallel.setup import ParallelState

Work = Callable[..., tuple[Tensor, ...]]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Runs work on tensors, from its second call on as a recorded graph.

    Make it before the optimizer and Megatron's data-parallel wrapper: it moves this thread to a stream of its own,
    because gradients are accumulated on the stream that was current when a parameter was first wrapped, and the
    default stream cannot be recorded.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)
        self._pool = torch.cuda.graph_pool_handle()  # recordings run one after another and can share memory
        self._recordings: dict[Hashable, _Recording | None] = {}

    def run(self, key: Hashable, work: Work, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """work(*inputs), which may also add to tensors that stay where they are (gradients).

        Args:
            key: all that the work depends on besides tensors; shapes and dtypes are added here.
            work: device work only, that waits for no result.
            inputs: copied to where the recording reads them.

        Returns:
            Copies of what the work returns.

        Raises:
            RuntimeError: if the work cannot be recorded.
        """
        key = (key, *(None if t is None else (t.shape, t.dtype) for t in inputs))
        if key not in self._recordings:  # compile kernels, fill caches and make gradients first
            self._recordings[key] = None
            return work(*inputs)
        recording = self._recordings[key] or self._record(key, work, inputs)
        for held, given in zip(recording.inputs, inputs, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        recording.graph.replay()
        return tuple(out.clone() for out in recording.outputs)

    def _record(self, key: Hashable, work: Work, inputs: tuple[Tensor | None, ...]) -> _Recording:
        held = tuple(None if t is None else t.clone() for t in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (NCCL's watchdog) may go on as they like.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = work(*held)
        except RuntimeError as error:
            raise RuntimeError(f"a micro-batch cannot be recorded: set training.cuda_graphs=false ({error})") from error
        recording = self._recordings[key] = _Recording(graph, held, outputs)
        return recording


def graphs_of(recipe: Recipe, state: ParallelState) -> Graphs | None:
    """The recipe's graphs, if it asks for them; raises RecipeError without CUDA."""
    if not recipe.training.cuda_graphs:
        return None
    if state.device.type != "cuda":
        raise RecipeError("training.cuda_graphs=true needs a GPU: set it to false")
    return Graphs()
