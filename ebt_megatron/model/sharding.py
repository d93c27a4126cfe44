"""How a stage's parameters are named in a checkpoint, so that any layout can load them."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import MegatronModule

from ebt_megatron.model.initialization import first_layer_of_stage


class StageModule(MegatronModule):
    """A pipeline stage with `layers`: in checkpoints, layers are numbered over the whole model."""

    layers: Any

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron-core's, with each layer under its global number."""
        layers = self.layers
        del self._modules["layers"]  # the default would store the list's weights as if they were replicated
        try:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self._modules["layers"] = layers
        first = first_layer_of_stage(len(layers))
        for i, layer in enumerate(layers):
            named = layer.sharded_state_dict(f"{prefix}layers.{first + i}.", sharded_offsets, metadata)
            for key, value in named.items():
                # Inside this stage the weight is known by its local number; in the file, by the global one.
                local = key.replace(f"{prefix}layers.{first + i}.", f"{prefix}layers.{i}.", 1)
                state[local] = value
        stage = parallel_state.get_pipeline_model_parallel_rank()
        for name, parameter in self.named_parameters():
            value = state.get(prefix + name)
            if getattr(parameter, "shared", False) and isinstance(value, ShardedTensor):
                value.replica_id = (stage, *value.replica_id[1:])  # another stage holds the original
        return {key.removeprefix(prefix): value for key, value in state.items()}
