"""megatron-core 0.16.1 on CPU and gloo, and one repair that every device needs.

megatron-core asks `torch.cuda` for the current device, allocates with `device="cuda"`, keeps its random
states in CUDA generators and names parameter types `torch.cuda.FloatTensor`. Where there is no CUDA,
`install` gives the modules of megatron-core (and only them) a view of `torch` in which the device is the
CPU; the real `torch` module keeps its behaviour for everybody else. The exceptions are two tensor methods
that megatron-core calls on tensors themselves: `Tensor.type()` and `Tensor.cuda()`.

All adaptation to megatron-core's device assumptions lives here. On CUDA only `_reduce` is repaired.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
# Modules whose functions must see the adapted torch even if nothing has imported them yet.
_MODULES = (
    "parallel_state",
    "timers",
    "utils",
    "distributed",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "pipeline_parallel",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel",
    "tensor_parallel.random",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.fully_parallel",
    "models.common.embeddings.rotary_pos_embedding",
    "transformer",
    "transformer.attention",
    "transformer.dot_product_attention",
    "transformer.transformer_block",
    "transformer.transformer_layer",
)
_CUDA_TYPE_NAMES = {f"torch.{name}": f"torch.cuda.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}


def _to_cpu(device: Any) -> Any:
    """Map any spelling of a CUDA device to the CPU; leave everything else alone."""
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return _CPU if device is not None and torch.device(device).type == "cuda" else device


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


class _View(types.ModuleType):
    """A module that answers from `overrides` first and from `base` otherwise."""

    def __init__(self, base: types.ModuleType, overrides: dict[str, Any]):
        super().__init__(base.__name__)
        self.__dict__.update(overrides)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: there is no asynchronous device to wait for or to free."""


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _cpu_torch() -> _View:
    """`torch` as megatron-core shall see it: the current device is the CPU."""
    cuda = _View(
        torch.cuda,
        {
            "current_device": lambda: _CPU,
            "device_count": lambda: 1,
            "empty_cache": _nothing,
            "get_rng_state": _get_rng_state,
            "manual_seed": torch.manual_seed,
            "set_device": _nothing,
            "set_rng_state": _set_rng_state,
            "synchronize": _nothing,
        },
    )
    return _View(torch, {"cuda": cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}})


def _cpu_rng_tracker(base: type) -> type:
    """The random-state tracker over the one CPU generator (megatron-core's warns when that one moves)."""

    class CpuRNGStatesTracker(base):  # type: ignore[misc, valid-type]
        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name} was never added")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    return CpuRNGStatesTracker


def _patch_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]


def _repair_reduce() -> None:
    """Make tensor-parallel reductions reduce tensors that are not contiguous.

    `mappings._reduce` of 0.16.1 all-reduces `x.contiguous()` (a copy when x is strided) and returns x.
    """
    from megatron.core.tensor_parallel import mappings

    original = mappings._reduce

    def _reduce(input_: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        return original(input_.contiguous(), group)

    mappings._reduce = _reduce


@functools.cache
def _install_once() -> types.ModuleType | None:
    """Make the changes that must happen once; returns the adapted torch, or None where CUDA exists."""
    if torch.cuda.is_available():
        _repair_reduce()
        return None
    from megatron.core import jit

    jit.disable_jit_fuser()  # nothing here is worth compiling for CPU, and compiling takes seconds
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    _repair_reduce()
    _patch_tensor_methods()
    random = sys.modules["megatron.core.tensor_parallel.random"]
    random.CudaRNGStatesTracker = _cpu_rng_tracker(random.CudaRNGStatesTracker)  # type: ignore[attr-defined]
    random._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]
    return _cpu_torch()


def install() -> None:
    """Adapt megatron-core to this machine; call before using it, again after importing more of it.

    Idempotent. Where CUDA exists it only repairs the reduction of strided tensors.
    """
    adapted = _install_once()
    if adapted is None:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = adapted  # type: ignore[attr-defined]
