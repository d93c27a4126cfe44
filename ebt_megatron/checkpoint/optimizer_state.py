"""The optimizer's state as whole tensors that belong to weights, whichever optimizer keeps it.

A weight `w` has `optimizer.state.exp_avg.w` and `.exp_avg_sq.w`, and `.fp32_param.w` if the weight itself
is not fp32, all of w's shape and cut as w is cut. The distributed optimizer keeps the same numbers as
flat slices; here they are gathered, so that either optimizer can load what the other saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ebt_megatron.parallel.parameters import main_parameter

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAIN = "fp32_param"


class OptimizerState:
    """A view of the optimizer's state for one save or one load; all ranks build it together.

    Args:
        optimizer: from `build_optimizer`.
        model_state: the model's sharded state, which holds the parameters themselves.
        loading: allocate the tensors to be filled instead of gathering the present values.
    """

    def __init__(self, optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool):
        self.optimizer = optimizer
        self.tensors: dict[str, ShardedTensor] = {}
        # Per distributed optimizer, in megatron-core's order of parameters: weight, kind -> key.
        self._distributed: list[tuple[DistributedOptimizer, list[tuple[torch.nn.Parameter, dict[str, str]]]]] = []
        self._plain: list[tuple[torch.Tensor, str]] = []
        for inner in optimizer.chained_optimizers:
            inner.init_state_fn(inner.optimizer, inner.config)  # of parameters that never had a gradient
            if isinstance(inner, DistributedOptimizer):
                self._add_distributed(inner, model_state, loading)
            else:
                self._add_plain(inner, model_state)

    @property
    def step(self) -> int:
        """Updates done so far."""
        return max((group.get("step", 0) for group in self.optimizer.param_groups), default=0)

    def _add(self, weight: ShardedTensor, kind: str, data: torch.Tensor) -> str:
        key = f"optimizer.state.{kind}.{weight.key}"
        self.tensors[key] = replace(weight, key=key, data=data, dtype=data.dtype)
        return key

    def _add_plain(self, inner: MegatronOptimizer, model_state: dict[str, Any]) -> None:
        state = inner.optimizer.state
        for weight in model_state.values():
            if not isinstance(weight, ShardedTensor):
                continue
            main = main_parameter(weight.data)
            if main not in state:
                continue
            kinds = {kind: state[main][kind] for kind in _MOMENTS}
            if main is not weight.data:
                kinds[_MAIN] = main.detach()
            for kind, tensor in kinds.items():
                self._plain.append((tensor, self._add(weight, kind, tensor)))

    def _add_distributed(self, inner: DistributedOptimizer, model_state: dict[str, Any], loading: bool) -> None:
        whole = inner.sharded_param_state_fully_reshardable(model_state, loading, {})
        weights = [p for i in range(len(inner.gbuf_ranges)) for p in inner.buffers[i].param_index_map]
        by_parameter = {id(w.data): w for w in model_state.values() if isinstance(w, ShardedTensor)}
        plan = []
        for weight, tensors in zip(weights, whole.values(), strict=True):
            keys = {}
            for kind, tensor in tensors.items():
                if kind == "param":
                    if weight.dtype == torch.float32:
                        continue  # the weight itself
                    kind = _MAIN
                keys[kind] = self._add(by_parameter[id(weight)], kind, tensor.data)
            plan.append((weight, keys))
        self._distributed.append((inner, plan))

    @torch.no_grad()
    def restore(self, loaded: dict[str, torch.Tensor], step: int) -> None:
        """Take over what was loaded; the model's weights must have been loaded before.

        Args:
            loaded: by the keys of `tensors`.
            step: updates done when it was saved.
        """
        for tensor, key in self._plain:
            tensor.copy_(loaded[key])
        for inner, plan in self._distributed:
            source = {}
            for index, (weight, keys) in enumerate(plan):
                source[index] = {kind: loaded[key] for kind, key in keys.items()}
                source[index].setdefault(_MAIN, weight.detach())
            inner.load_parameter_state_from_fully_reshardable(source)
        for group in self.optimizer.param_groups:
            if step:
                group["step"] = step
            else:
                group.pop("step", None)
