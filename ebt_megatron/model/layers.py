"""The Transformer layer that every stream goes through.

One set of weights serves three streams, all sequence-first [S, B, D]:

- the *context* stream, plain causal attention (it is also the whole of Transformer++);
- the *prediction* stream, where position t attends to context positions <= t and to itself, or, where
  `block` positions of a context see each other, to all up to the last of t's block, and to itself;
- the *tangent* stream, the derivative of the prediction stream along a direction. It runs
  stacked behind the prediction stream along the batch ([S, 2B, D]), so that each linear
  layer sees both at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig, build_module
from torch import Tensor, nn

from ebt_megatron.config import ModelConfig
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from ebt_megatron.model.initialization import Draw
from ebt_megatron.model.reuse import Tape
from ebt_megatron.parallel.parameters import replicated

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # rotated queries and keys, values -> what the heads read


@dataclass
class LayerSubmodules:
    """The parallel linear layers that a TransformerLayer is built from."""

    column_linear: ModuleSpec
    row_linear: ModuleSpec


def layer_spec(model: ModelConfig, kernels: Kernels, fp8: bool, block: int) -> ModuleSpec:
    """The layer with megatron-core's own parallel linear layers, or with theirs in fp8; `block` as TransformerLayer."""
    if fp8:
        linears = [ModuleSpec(m, params={"kernels": kernels}) for m in (Fp8ColumnParallelLinear, Fp8RowParallelLinear)]
    else:
        linears = [ModuleSpec(m) for m in (ColumnParallelLinear, RowParallelLinear)]
    return ModuleSpec(TransformerLayer, {"model": model, "kernels": kernels, "block": block}, LayerSubmodules(*linears))


class Rotary:
    """Angles of the rotary position embedding (arXiv 2104.09864)."""

    def __init__(self, head_size: int, base: float):
        self.head_size, self.base = head_size, base
        self._cache: dict[tuple, Tensor] = {}

    def table(self, length: int, first: int, like: Tensor) -> Tensor:
        """Cosine and sine of positions first .. first + length - 1, [length, head_size / 2, 2]."""
        real = torch.promote_types(like.dtype, torch.float32)
        key = (length, first, real, like.device)
        if key not in self._cache:
            exponent = torch.arange(0, self.head_size, 2, dtype=torch.float64) / self.head_size
            position = torch.arange(first, first + length, dtype=torch.float64)
            angle = torch.outer(position, self.base**-exponent)
            self._cache[key] = torch.stack([angle.cos(), angle.sin()], -1).to(like.device, real)
        return self._cache[key]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) of one or two streams."""

    def __init__(self, config: TransformerConfig, kernels: Kernels):
        super().__init__()
        self.weight = replicated(torch.ones(config.hidden_size, dtype=config.params_dtype), config)
        self.epsilon, self.kernels = config.layernorm_epsilon, kernels

    def forward(self, x: Tensor, tangent: bool = False) -> Tensor:
        """x [S, B, D], or [S, 2B, D] with tangent; returns the same shape."""
        return self.kernels.rms_norm(x, self.weight, self.epsilon, tangent=tangent)


class Modulation(nn.Module):
    """Adaptive normalisation (arXiv 2212.09748): a condition shifts, scales and gates a layer.

    Args:
        config: Megatron's configuration.
        parts: 6: shift, scale and gate of the attention, then of the MLP; 4: the same without gates; 2: shift
            and scale alone.
        zero: start as the identity.
    """

    def __init__(self, config: TransformerConfig, parts: int, zero: bool):
        super().__init__()
        self.parts = parts
        width = config.hidden_size
        shape = (self.parts * width, width)
        self.weight = replicated(torch.empty(shape, dtype=config.params_dtype), config)
        self.bias = replicated(torch.zeros(self.parts * width, dtype=config.params_dtype), config)
        self.draws = {"weight": Draw(0.0) if zero else Draw.xavier(width, width)}

    def forward(self, condition: Tensor) -> tuple[Tensor | None, ...]:
        """condition [B, D] -> the parts, each [B, D]; with 4 of them None stands for the gates."""
        out = nn.functional.linear(nn.functional.silu(condition), self.weight, self.bias)
        parts = out.chunk(self.parts, -1)
        return (*parts[:2], None, *parts[2:], None) if self.parts == 4 else tuple(parts)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, tangent: bool) -> Tensor:
    """x * (1 + scale) + shift; the tangent is scaled and not shifted."""
    if shift is None or scale is None:
        return x
    if not tangent:
        return x * (1 + scale) + shift
    value, direction = x.chunk(2, 1)
    return torch.cat([value * (1 + scale) + shift, direction * (1 + scale)], 1)


def gated(x: Tensor, gate: Tensor | None, tangent: bool) -> Tensor:
    """x * gate on one or two streams."""
    if gate is None:
        return x
    return x * (torch.cat([gate, gate]) if tangent and gate.shape[0] > 1 else gate)


class TransformerLayer(MegatronModule):
    """RMSNorm, attention with rotary positions, RMSNorm, SwiGLU; no bias, no dropout.

    Args:
        config: Megatron's.
        submodules: its linear layers.
        model: the recipe's part.
        kernels: how the hot operations run.
        block: neighbouring positions that see each other; attention is causal from block to block.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        model: ModelConfig,
        kernels: Kernels,
        block: int = 1,
    ):
        super().__init__(config)
        assert config.num_query_groups and config.ffn_hidden_size and config.kv_channels
        tensor = config.tensor_model_parallel_size
        width, head = config.hidden_size, config.kv_channels
        heads, groups, ffn = config.num_attention_heads, config.num_query_groups, config.ffn_hidden_size
        self.kernels, self.head_size, self.block = kernels, head, block
        self.local_groups = groups // tensor
        self.ffn_block = ffn // heads  # gate and up rows alternate in blocks: whole blocks on each rank

        def column(rows: int) -> nn.Module:
            return build_module(
                submodules.column_linear,
                width,
                rows,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
            )

        def row(columns: int) -> nn.Module:
            return build_module(
                submodules.row_linear,
                columns,
                width,
                config=config,
                init_method=config.init_method,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=True,
            )

        self.norm1, self.norm2 = RMSNorm(config, kernels), RMSNorm(config, kernels)
        # Rows by query group: its queries, its key, its value (Megatron's order).
        self.qkv = column((heads + 2 * groups) * head)
        self.proj = row(heads * head)
        self.fc1 = column(2 * ffn)
        self.fc2 = row(ffn)
        fans = {"qkv": (width, width), "proj": (heads * head, width), "fc1": (width, ffn), "fc2": (ffn, width)}
        self.draws = {f"{name}.weight": Draw.xavier(*fan) for name, fan in fans.items()}
        self.modulation = None
        if model.conditioning.startswith("adaln"):
            parts = 4 if model.conditioning == "adaln" else 6
            self.modulation = Modulation(config, parts, zero=model.conditioning == "adaln_zero")

    def _linear(self, name: str, x: Tensor, tangent: bool = False, tape: Tape | None = None) -> Tensor:
        layer = getattr(self, name)
        return layer(x)[0] if tape is None else tape.apply(f"{id(self)}.{name}", layer, x, tangent)

    def _heads(self, mixed: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output of qkv -> rotated q [S, B, N, H] and k, and v [S, B, G, H] of this rank."""
        return self.kernels.split_heads(mixed, rotations, self.local_groups, self.head_size)

    def _modulation(self, condition: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * 6 if self.modulation is None or condition is None else self.modulation(condition)

    def stream(
        self,
        h: Tensor,
        rotations: Tensor,
        attend: Attend,
        *,
        tangent: bool = False,
        condition: Tensor | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """Any stream, with the attention given.

        Args:
            h: [S(/TP), B, D], or [S(/TP), 2B, D] with tangent.
            rotations: of the positions.
            attend: called with rotated q [S, B*, N, H] and k, and v [S, B*, G, H]; returns [S, B*, N*H].
            tangent: whether a tangent is stacked behind the value.
            condition: [1, D] embedding of the step, for adaptive normalisation.
            tape: what a learn pass takes from the propose pass before it, see `Tape`.

        Returns:
            The same shape as h.
        """
        return self._branches(h, lambda mixed: attend(*self._heads(mixed, rotations)), tangent, condition, tape)

    def _branches(
        self,
        h: Tensor,
        mix: Callable[[Tensor], Tensor],
        tangent: bool,
        condition: Tensor | None,
        tape: Tape | None,
    ) -> Tensor:
        """H plus attention, where `mix` makes what the heads read [S, B*, N*H] of qkv's output, plus the MLP."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(condition)
        n = modulate(self.norm1(h, tangent), shift1, scale1, tangent)
        o = mix(self._linear("qkv", n, tangent, tape))
        h = h + gated(self._linear("proj", o, tangent, tape), gate1, tangent)
        n = modulate(self.norm2(h, tangent), shift2, scale2, tangent)
        hidden = self.kernels.swiglu(self._linear("fc1", n, tangent, tape), self.ffn_block, tangent=tangent)
        return h + gated(self._linear("fc2", hidden, tangent, tape), gate2, tangent)

    def joint(self, h: Tensor, *, tangent: bool = False, tape: Tape | None = None) -> Tensor:
        """A stream in which every position sees every other, without rotation; a query group for each head.

        Args:
            h, tangent, tape: as in `stream`.

        Returns:
            The same shape as h.
        """

        def mix(mixed: Tensor) -> Tensor:
            no_bias = mixed.new_zeros(mixed.shape[-1])
            return self.kernels.full_attention(mixed, no_bias, self.head_size, tangent=tangent)

        return self._branches(h, mix, tangent, None, tape)

    def context(
        self, h: Tensor, rotations: Tensor, segments: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The context stream.

        Args:
            h: [S(/TP), B, D].
            rotations: of positions 0 .. S-1.
            segments: int32 [B, S] document of each position, or None.
            condition: as in `stream`, where the step normalises the context, too.

        Returns:
            The layer's output, and its rotated keys and values [S, B, G/TP, H].
        """
        key_value: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            key_value[:] = k, v
            return self.kernels.context_attention(q, k, v, segments=segments, block=self.block)

        h = self.stream(h, rotations, attend, condition=condition)
        return h, key_value[0], key_value[1]

    def predict(
        self,
        h: Tensor,
        key_value: tuple[Tensor, Tensor],
        rotations: Tensor,
        *,
        tangent: bool,
        condition: Tensor | None = None,
        segments: Tensor | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """The prediction stream, alone or with its tangent stacked behind it.

        Args:
            h, tangent, condition, tape: as in `stream`.
            key_value: the context stream's keys and values at this layer.
            rotations: of positions block .. S + block - 1: a prediction stands one block after its context position.
            segments: as in `context`.

        Returns:
            The same shape as h.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.kernels.prediction_attention(
                q, k, v, *key_value, tangent=tangent, segments=segments, block=self.block
            )

        return self.stream(h, rotations, attend, tangent=tangent, condition=condition, tape=tape)
