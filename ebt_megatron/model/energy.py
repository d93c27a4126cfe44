"""The Energy-Based Transformer over sequences: E(context, prediction), one energy per position.

The prediction at position t reads context positions <= t (up to the end of t's block, where positions come in
blocks) and itself, never another prediction, so E = sum_t E_t where E_t depends on prediction t alone, and the
context stream never depends on any prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ebt_megatron.config import Recipe
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.backbone import Backbone, Landscapes
from ebt_megatron.model.initialization import Draw, draw_of_embedding
from ebt_megatron.model.layers import Attend, Modulation, RMSNorm, TransformerLayer, modulate
from ebt_megatron.model.reuse import Tape
from ebt_megatron.parallel.parameters import on_every_stage, replicated

KeyValues = Sequence[tuple[Tensor, Tensor]]
# Times 1/D, of the quadratic energy: its gradient by the prediction has entries of about 1 at the start, as the linear
# energy's has, so that `unit_logits` holds for both (measured at widths 96 to 768: 0.17 D to 0.20 D without it).
QUADRATIC_SCALE = 5.0


class EnergyTransformer(Landscapes, Backbone):
    """One pipeline stage of an EBT (the whole model when there is one stage), an `EnergyModel`.

    With h the last hidden state and n its norm, `model.energy_head` says what a position's energy is: linear (the
    paper's) <w, n>; quadratic 5/D (<w, n> + 1/2 sum_i q_i h_i^2), q_i = -1 at the start. The gradient of the second
    reads h out directly, as a Transformer's output does, where that of the first sees h through Jacobians alone.

    Attributes:
        separable: E_t depends on prediction t alone, so that a position's factors may stand before its energy.

    Args:
        config: Megatron's configuration.
        recipe: the run.
        kernels: how the hot operations run.
        modality: the embeddings of context and prediction; used on the first stage only.
        pre_process: this is the first stage (embeddings, the step size).
        post_process: this is the last stage (final norm, energy head).
        block: positions of the context that see each other; a prediction is for the position one block later.
    """

    separable = True
    context_rows = None

    def __init__(
        self,
        config: TransformerConfig,
        recipe: Recipe,
        kernels: Kernels,
        modality: nn.Module | None,
        pre_process: bool = True,
        post_process: bool = True,
        block: int = 1,
    ):
        super().__init__(config, recipe, kernels, pre_process, post_process, block)
        model, thinking = recipe.model, recipe.thinking
        self.conditioning, self.energy_head = model.conditioning, model.energy_head
        self.num_landscapes = thinking.num_landscapes
        self.context_sees_step = model.conditioning in ("time_embed_sequence", "adaln_sequence")
        self.step_tokens = int(model.conditioning == "time_embed_sequence")
        self.starts_thinking = thinking.starts_at_context and self.separable
        self.modality = modality
        width, dtype = config.hidden_size, config.params_dtype
        adaptive = model.conditioning.startswith("adaln")
        if adaptive or (pre_process and model.conditioning != "none"):
            self.step_embedding = replicated(torch.empty(thinking.num_landscapes, width, dtype=dtype), config)
            self.draws["step_embedding"] = draw_of_embedding(thinking.num_landscapes, width, model.initialization)
            if adaptive:  # every stage reads it
                on_every_stage(self.step_embedding)
                if not pre_process:
                    self.hold_copy("step_embedding")
        if pre_process:
            self.add_step_size(thinking)
            if self.starts_thinking:
                self.context_norm = RMSNorm(config, kernels)
        self.add_layers()
        if post_process:
            if model.conditioning == "adaln_sequence":
                self.final_modulation = Modulation(config, parts=2, zero=False)
            self.head = replicated(torch.empty(width, dtype=dtype), config)
            self.draws["head"] = Draw.xavier(width, 1)
            if self.energy_head == "quadratic":
                self.curvature = replicated(-torch.ones(width, dtype=dtype), config)

    def _condition(self, step: int) -> Tensor | None:
        """[1, D], what adaptive normalisation is conditioned by, if there is any."""
        return self.step_embedding[self.landscape(step)][None] if self.conditioning.startswith("adaln") else None

    def context(self, h: Tensor, length: int, segments: Tensor | None, step: int = 0) -> tuple[Tensor, KeyValues]:
        """Run the context stream through this stage.

        Args:
            h: embedded context on the first stage, else the previous stage's output; [S(/TP), B, D].
            length: S, the number of context positions (under sequence parallelism h holds a part).
            segments: int32 [B, S] documents, or None.
            step: matters only where `context_sees_step`.

        Returns:
            This stage's output, and the keys and values of each of its layers, [S, B, G/TP, H].
        """
        if self.step_tokens:
            if self.pre_process:
                h = torch.cat([self.step_token(step, h.shape[1]).to(h.dtype), h])
            length += 1
        condition = self._condition(step) if self.context_sees_step else None
        rotations = self.rotary.table(length, 0, h)
        key_values = []
        for layer in self.layers:
            h, k, v = self.maybe_recomputed(layer.context, h, rotations, segments, condition)
            key_values.append((k, v))
        return h, key_values

    def read_out(self, h: Tensor) -> Tensor:
        """The context stream's last hidden states [S(/TP), B, D], normalised: what its output reads."""
        return self.context_norm(h)

    def predict(
        self,
        h: Tensor,
        key_values: KeyValues,
        length: int,
        segments: Tensor | None,
        step: int,
        tangent: bool,
        tape: Tape | None = None,
    ) -> Tensor:
        """Run the prediction stream (and its tangent) through this stage.

        Args:
            h: embedded prediction on the first stage, else the previous stage's output;
                [S(/TP), B, D], or [S(/TP), 2B, D] with tangent.
            key_values: of this stage's layers, from `context`.
            length, segments: as in `context`.
            step: the thinking step, which selects the landscape.
            tangent: whether a tangent is stacked behind the value.
            tape: for `thinking.reuse`: written without tangent, read with it.

        Returns:
            On the last stage energies [S(/TP), B] — with tangent, the energies' tangent —
            else the hidden state for the next stage.
        """
        condition = self._condition(step)
        if self.step_tokens:
            # A dummy row keeps row t + 1 beside context position t + 1; its energy is dropped below.
            if self.pre_process:
                h = torch.cat([torch.zeros_like(h[:1]), h])
            length += 1
        elif (mark := self._mark(h, step)) is not None:
            if tangent:
                value, direction = h.chunk(2, 1)
                h = torch.cat([value + mark, direction], 1)
            else:
                h = h + mark
        rotations = self.rotary.table(length, self.block, h)
        for layer, key_value in zip(self.layers, key_values, strict=True):
            assert isinstance(layer, TransformerLayer)
            h = self.maybe_recomputed(
                layer.predict,
                h,
                key_value,
                rotations,
                tangent=tangent,
                condition=condition,
                segments=segments,
                tape=tape,
                kept=tape is not None,
            )
        return self._energy(h, condition, tangent)[self.step_tokens :] if self.post_process else h

    def _mark(self, h: Tensor, step: int) -> Tensor | None:
        """[D], what is added to embedded predictions h to say which step they are at, where it is said so."""
        marks = self.pre_process and self.conditioning == "time_embed"
        return self.step_embedding[self.landscape(step)].to(h.dtype) if marks else None

    def _energy(self, h: Tensor, condition: Tensor | None, tangent: bool) -> Tensor:
        n = self.final_norm(h, tangent)
        if self.conditioning == "adaln_sequence":
            shift, scale = self.final_modulation(condition)
            n = modulate(n, shift, scale, tangent)
        if tangent:
            n = n.chunk(2, 1)[1]
        wide = torch.promote_types(n.dtype, torch.float32)
        linear = n.to(wide) @ self.head.to(wide)
        if self.energy_head == "linear":
            return linear
        h = h.to(wide)
        value, direction = h.chunk(2, 1) if tangent else (h, h / 2)
        return QUADRATIC_SCALE / h.shape[-1] * (linear + (value * direction) @ self.curvature.to(wide))

    # --- at inference: any positions, over a cache ----------------------------------------------

    def step_token(self, step: int, batch: int) -> Tensor:
        """What stands before the sequence where `step_tokens`, [1, B, D]; on the first stage."""
        return self.step_embedding[self.landscape(step)].expand(1, batch, -1)

    def read(self, h: Tensor, rotations: Tensor, attend: Sequence[Attend], step: int) -> Tensor:
        """The context stream [S, B, D] through this stage; the rest as in `Backbone.stream`."""
        return self.stream(h, rotations, attend, self._condition(step) if self.context_sees_step else None)

    def weigh(self, h: Tensor, rotations: Tensor, attend: Sequence[Attend], step: int) -> Tensor:
        """The prediction stream [S, B, D] through this stage: energies [S, B] on the last one."""
        condition, mark = self._condition(step), self._mark(h, step)
        h = self.stream(h if mark is None else h + mark, rotations, attend, condition)
        return self._energy(h, condition, tangent=False) if self.post_process else h
