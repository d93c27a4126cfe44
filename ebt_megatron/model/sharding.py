"""What is said of a stage's parameters by name, and how checkpoints name them, so that any layout can load them."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import nn

from ebt_megatron.model.initialization import Draw, first_layer_of_stage
from ebt_megatron.parallel.parameters import mark_copies


class StageModule(MegatronModule):
    """A pipeline stage with `layers`: in checkpoints, layers are numbered over the whole model.

    Attributes:
        draws: how the stage's own parameters start, by name; see `ebt_megatron.model.initialization`.
        lr_multipliers: of parameters that learn at so many times the learning rate, by name.
        copies: names of parameters, or of modules, whose original another stage holds.
    """

    layers: Any  # an nn.ModuleList, of which type checkers know nothing

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.draws: dict[str, Draw] = {}
        self.lr_multipliers: dict[str, float] = {}
        self.copies: set[str] = set()

    def hold_copy(self, name: str) -> None:
        """Say that another stage holds the original of a parameter, or of a module."""
        self.copies.add(name)
        held = getattr(self, name)
        mark_copies(held.parameters() if isinstance(held, nn.Module) else [held])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's sharded state, with each layer under its global number."""
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
        for name, _ in self.named_parameters():
            value = state.get(prefix + name)
            copy = name in self.copies or name.partition(".")[0] in self.copies
            if copy and isinstance(value, ShardedTensor):
                value.replica_id = (stage, *value.replica_id[1:])  # another stage holds the original
        return {key.removeprefix(prefix): value for key, value in state.items()}
