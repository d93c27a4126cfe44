"""Transformers in which every position sees every other: the joint energy of a picture, and DiT (arXiv 2212.09748).

Both are made of the same layers: LayerNorm without affine parameters, attention and an MLP with biases, and a
condition that shifts, scales and gates each (adaLN-zero). Only the energy's go with a tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.backbone import Landscapes, LayerStage, Scheduled, layers_of_stage
from ebt_megatron.model.initialization import Draw, draw_of_embedding
from ebt_megatron.model.layers import Modulation
from ebt_megatron.model.reuse import Tape
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import replicated

Modulations = Sequence[tuple[Tensor, Tensor]]


class JointLayer(MegatronModule):
    """LayerNorm, attention of every position to every other, LayerNorm, GELU MLP; each shifted, scaled and gated."""

    def __init__(self, config: TransformerConfig, kernels: Kernels):
        super().__init__(config)
        assert config.ffn_hidden_size and config.kv_channels
        width, ffn = config.hidden_size, config.ffn_hidden_size
        self.kernels, self.head_size, self.epsilon = kernels, config.kv_channels, config.layernorm_epsilon
        options: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": True,
            "skip_bias_add": True,
        }
        self.qkv = ColumnParallelLinear(width, 3 * width, gather_output=False, **options)  # rows by head
        self.proj = RowParallelLinear(width, width, input_is_parallel=True, **options)
        self.fc1 = ColumnParallelLinear(width, ffn, gather_output=False, **options)
        self.fc2 = RowParallelLinear(ffn, width, input_is_parallel=True, **options)
        fans = {"qkv": (width, width), "proj": (width, width), "fc1": (width, ffn), "fc2": (ffn, width)}
        self.draws = {f"{name}.weight": Draw.xavier(*fan) for name, fan in fans.items()}
        self.draws |= {f"{name}.bias": Draw(0.0) for name in fans}
        self.modulation = Modulation(config, parts=6, zero=True)

    def _linear(self, name: str, x: Tensor, tangent: bool, tape: Tape | None) -> tuple[Tensor, Tensor]:
        """What a linear layer gives, and its bias, which what follows adds."""
        layer = getattr(self, name)
        out = layer(x)[0] if tape is None else tape.apply(f"{id(self)}.{name}", layer, x, tangent)
        return out, layer.bias

    def modulations(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Condition [B, D] -> shift, scale and gate of the attention and of the MLP, [B, 3 D] each."""
        parts = self.modulation(condition)
        return torch.cat(parts[:3], -1), torch.cat(parts[3:], -1)  # type: ignore[arg-type]

    def forward(
        self, h: Tensor, modulations: tuple[Tensor, Tensor], tangent: bool = False, tape: Tape | None = None
    ) -> Tensor:
        """Hidden [S(/TP), B, D], or [S(/TP), 2B, D] with tangent -> the same."""
        kernels = self.kernels
        shift, scale, gate = modulations[0].chunk(3, -1)
        n = kernels.layer_norm(h, self.epsilon, shift, scale, tangent=tangent)
        o = kernels.full_attention(*self._linear("qkv", n, tangent, tape), self.head_size, tangent=tangent)
        out, bias = self._linear("proj", o, tangent, tape)
        h = kernels.add_gated(h, out, gate, bias, tangent=tangent)
        shift, scale, gate = modulations[1].chunk(3, -1)
        n = kernels.layer_norm(h, self.epsilon, shift, scale, tangent=tangent)
        out, bias = self._linear(
            "fc2", kernels.gelu(*self._linear("fc1", n, tangent, tape), tangent=tangent), tangent, tape
        )
        return kernels.add_gated(h, out, gate, bias, tangent=tangent)


class JointStage(LayerStage):
    """A pipeline stage of the layers, with the last normalisation.

    Args:
        config: Megatron's configuration.
        recipe: the run.
        kernels: how the hot operations run.
        pre_process, post_process: this is the first stage, the last stage.
    """

    def __init__(
        self, config: TransformerConfig, recipe: Recipe, kernels: Kernels, pre_process: bool, post_process: bool
    ):
        super().__init__(config, recipe, pre_process, post_process)
        self.kernels = kernels
        self.layers = layers_of_stage(config, lambda: JointLayer(config, kernels))
        if post_process:
            self.final_modulation = Modulation(config, parts=2, zero=True)

    def modulations(self, condition: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the condition [B, D] does in each layer, and last before the head."""
        pairs = [layer.modulations(condition) for layer in self.layers]  # type: ignore[operator]
        return [*pairs, self.final_modulation(condition)] if self.post_process else pairs

    def run(self, h: Tensor, modulations: Modulations, tangent: bool = False, tape: Tape | None = None) -> Tensor:
        """Run this stage: [S(/TP), B, D] (2B with tangent) -> the same, normalised on the last stage."""
        for layer, pair in zip(self.layers, modulations, strict=False):
            h = self.maybe_recomputed(layer, h, pair, tangent, tape, kept=tape is not None)
        if not self.post_process:
            return h
        return self.kernels.layer_norm(h, self.config.layernorm_epsilon, *modulations[-1], tangent=tangent)


class JointEnergy(Landscapes, JointStage):
    """A stage of the energy of a whole picture, an `EnergyModel`; the context is its condition, [1, B, D].

    Attributes:
        separable: predictions see each other.

    Args:
        config, recipe, kernels, pre_process, post_process: as `JointStage`.
        modality: the embeddings of condition and prediction; used on the first stage only.
    """

    separable = False
    step_tokens = 0
    context_rows = 1
    starts_thinking = False

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        kernels: Kernels,
        modality: nn.Module | None,
        pre_process: bool = True,
        post_process: bool = True,
    ):
        super().__init__(config, recipe, kernels, pre_process, post_process)
        thinking, width, dtype = recipe.thinking, config.hidden_size, config.params_dtype
        self.modality, self.num_landscapes = modality, thinking.num_landscapes
        self.context_sees_step = recipe.model.conditioning != "none"
        if pre_process:
            if self.context_sees_step:
                self.step_embedding = replicated(torch.empty(thinking.num_landscapes, width, dtype=dtype), config)
                draw = draw_of_embedding(thinking.num_landscapes, width, recipe.model.initialization)
                self.draws["step_embedding"] = draw
            self.add_step_size(thinking)
        if post_process:
            self.head = replicated(torch.zeros(width, dtype=dtype), config)
            self.draws["head"] = Draw(0.0)

    def context(self, h: Tensor, length: int, segments: Tensor | None, step: int = 0) -> tuple[Tensor, Modulations]:
        """The condition [1, B, D] as it is passed on, and what it does in each layer."""
        if self.context_sees_step and self.pre_process:
            h = h + self.step_embedding[self.landscape(step)]
        return h, self.modulations(h[0])

    def predict(
        self,
        h: Tensor,
        key_values: Modulations,
        length: int,
        segments: Tensor | None,
        step: int,
        tangent: bool,
        tape: Tape | None = None,
    ) -> Tensor:
        """See `EnergyModel`: on the last stage each patch's share of the picture's energy, the mean over patches."""
        n = self.run(h, key_values, tangent, tape)
        if not self.post_process:
            return n
        wide = torch.promote_types(n.dtype, torch.float32)
        n = n.chunk(2, 1)[1] if tangent else n
        return n.to(wide) @ self.head.to(wide) / length


class DiffusionTransformer(Scheduled, JointStage):
    """A stage of DiT: predicts the noise in a picture, and where between its bounds the variance of a step is.

    Attributes:
        output: this itself on the last stage, which keeps `y`, the noise that was predicted last without learning,
            [S, B, C].

    Args:
        config, recipe, kernels, pre_process, post_process: as `JointStage`.
        condition: (level, class, caption) [B, 2 + its size] -> [B, D]; the same on every stage.
        embedding: patches [B, S, C] -> hidden [S(/TP), B, D], on the first stage.
        channels: C.
        bound: (noise, predicted noise, v, level, noised) -> what v is learned by [B, S, C], see `NoiseSchedule`;
            None: v is not predicted.
        signed: v is put out as 2 v - 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        kernels: Kernels,
        condition: nn.Module,
        embedding: nn.Module | None,
        channels: int,
        pre_process: bool = True,
        post_process: bool = True,
        bound: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
        signed: bool = False,
    ):
        super().__init__(config, recipe, kernels, pre_process, post_process)
        self.condition, self.embedding = condition, embedding
        if not pre_process:
            self.hold_copy("condition")
        self.channels, self.bound, self.signed = channels, bound, signed
        self.group = TensorGroup(bool(config.sequence_parallel))
        if post_process:
            rows = channels if bound is None else 2 * channels
            self.head = replicated(torch.zeros(rows, config.hidden_size, dtype=config.params_dtype), config)
            self.head_bias = replicated(torch.zeros(rows, dtype=config.params_dtype), config)
            self.draws |= {"head": Draw(0.0), "head_bias": Draw(0.0)}

    def predicted(self, conditions: Tensor, start: Tensor) -> Tensor:
        """This stage's output: noise and, if learned, v [S(/TP), B, C or 2 C] on the last stage, else hidden states.

        Args:
            conditions: [B, 2 + a caption's size], level, class and caption.
            start: [S, B, C], the noised pictures.
        """
        h = self.embedding(start.transpose(0, 1)) if self.embedding is not None else self.input_tensor
        assert h is not None
        n = self.run(h, self.modulations(self.condition(conditions)))
        if not self.post_process:
            return n
        out = F.linear(n, self.head, self.head_bias)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.bound is None or not self.signed:
            return out
        noise, v = out.chunk(2, -1)
        return torch.cat([noise, (v + 1) / 2], -1)

    def forward(self, observed: Tensor, targets: Tensor, segments: Tensor | None, start: Tensor) -> Tensor:
        """The mean squared error of the noise, and what v costs, [S, B] (last stage), or hidden states.

        Args:
            observed: [B, 2 + a caption's size], level, class and caption.
            targets: [B, S, C], the noise.
            segments: not read.
            start: [S, B, C], the noised pictures.
        """
        out = self.predicted(observed, start)
        if not self.post_process:
            return out
        target = self.group.own_positions(targets.transpose(0, 1)).to(out.dtype)
        noise = out[..., : self.channels]
        loss = (noise - target).square()
        if self.bound is not None:
            own = self.group.own_positions(start).to(out.dtype)
            true, predicted, v, noised = (t.transpose(0, 1) for t in (target, noise, out[..., self.channels :], own))
            loss = loss + self.bound(true, predicted, v, observed[:, 0].long(), noised).transpose(0, 1)
        return self.group.all_positions(loss.mean(-1))
