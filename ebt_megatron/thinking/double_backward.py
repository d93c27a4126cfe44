"""The slow reference: differentiate twice through everything, in plain torch.

This is how the paper's public code trains: at every step the context and the prediction
go through the network together (2S positions), attention scores are full matrices, and
`autograd.grad(create_graph=True)` keeps the whole graph until the loss is differentiated.
`text_energies` reads the parameters of an EnergyTransformer (of text or video), `joint_energies` those of a
JointEnergy and `cell_energies` those of a CellEnergy, but none calls any of its code, a kernel or a Megatron layer, so
that they can stand as the judges of them. Single process only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.model.cells import CellEnergy
from ebt_megatron.thinking.dual_stream import Descent, ThinkingOutput


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [Sq, B, N, H], k and v [Sk, B, G, H], mask broadcast to [B, 1, Sq, Sk] -> [Sq, B, N*H]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + mask
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def _rotations(positions: Tensor, size: int, base: float, dtype: torch.dtype) -> Tensor:
    """e^(i angle) of positions [S] for each pair of a head (arXiv 2104.09864), [S, 1, 1, size / 2]."""
    frequency = base ** -(torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angle = positions[:, None] * frequency
    return torch.complex(angle.cos().to(dtype), angle.sin().to(dtype))[:, None, None]


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [S, B, N, H]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotations).flatten(-2)


def _modulation(modulation: Any, condition: Tensor) -> tuple[Tensor, ...]:
    """Shifts, scales and perhaps gates, each [1, D], in the order of the weight's rows (arXiv 2212.09748)."""
    return F.linear(F.silu(condition)[None], modulation.weight, modulation.bias).split(len(condition), -1)


def _mlp(layer: Any, n: Tensor) -> Tensor:
    """SwiGLU."""
    gate, up = F.linear(n, layer.fc1.weight).unflatten(-1, (-1, 2, layer.ffn_block)).unbind(-2)
    return F.linear((F.silu(gate) * up).flatten(-2), layer.fc2.weight)


def _energy(model: Any, h: Tensor, n: Tensor) -> Tensor:
    """The energies [S, B] of last hidden states h and their normalised form n."""
    if model.energy_head == "linear":
        return n @ model.head
    return 5 / h.shape[-1] * (n @ model.head + h.square() @ model.curvature / 2)


def text_streams(model: Any, context: Tensor, segments: Tensor | None, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [S, B] of predictions after a context, and what the context's stream ends with, [S, B, D].

    Args:
        model: an EnergyTransformer.
        context: [S, B, D], differentiable.
        segments: int32 [B, S] documents, or None.
        step: the thinking step.
        x: [S, B, D].
    """
    rows, epsilon = len(x), model.config.layernorm_epsilon
    if model.conditioning != "none":
        condition = model.step_embedding[min(step, len(model.step_embedding) - 1)]
    if model.conditioning == "time_embed_sequence":
        context = torch.cat([condition.expand(1, x.shape[1], -1), context])
    elif model.conditioning == "time_embed":
        x = x + condition
    length = len(context)
    modulated = 0 if model.conditioning == "adaln_sequence" else length  # the first row that adaLN touches
    h = torch.cat([context, x])

    # Row t of the prediction sees context s <= t + extra, where extra counts the step's token.
    extra = length - rows
    causal = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)
    if model.block > 1:  # the rows of a block see each other
        together = torch.ones(model.block, model.block, dtype=torch.bool, device=x.device)
        causal = causal.masked_fill(torch.block_diag(*[together] * (length // model.block)), 0)
    if segments is not None:
        other = segments[:, :, None] != segments[:, None, :]
        causal = torch.where(other[:, None], -math.inf, causal)
    own = torch.full((rows, rows), -math.inf, dtype=x.dtype, device=x.device).fill_diagonal_(0)
    from_context = causal[..., extra:, :]
    mask = torch.cat([from_context, own.expand(*from_context.shape[:-2], rows, rows)], -1)
    positions = torch.cat([torch.arange(length), torch.arange(rows) + model.block + extra]).to(x.device)

    def branch(layer: Any, index: int, h: Tensor, norm: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """H plus one of a layer's two branches, modulated."""
        n = _rms_norm(h, norm, epsilon)
        if layer.modulation is None:
            return h + function(n)
        parts = _modulation(layer.modulation, condition)
        shift, scale, *gate = parts[len(parts) // 2 :] if index else parts[: len(parts) // 2]
        out = function(torch.cat([n[:modulated], n[modulated:] * (1 + scale) + shift]))
        return h + (torch.cat([out[:modulated], out[modulated:] * gate[0]]) if gate else out)

    def attention(layer: Any, n: Tensor) -> Tensor:
        rotations = _rotations(positions, layer.head_size, model.rotary.base, n.dtype)
        mixed = F.linear(n, layer.qkv.weight).unflatten(-1, (layer.local_groups, -1, layer.head_size))
        q, k, v = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
        q, k = _rotate(q, rotations), _rotate(k, rotations)
        o = torch.cat(
            [
                _attention(q[:length], k[:length], v[:length], causal),
                _attention(q[length:], k, v, mask),
            ]
        )
        return F.linear(o, layer.proj.weight)

    for layer in model.layers:
        h = branch(layer, 0, h, layer.norm1.weight, partial(attention, layer))
        h = branch(layer, 1, h, layer.norm2.weight, partial(_mlp, layer))
    context, h = h[:length], h[length:]
    n = _rms_norm(h, model.final_norm.weight, epsilon)
    if model.conditioning == "adaln_sequence":
        shift, scale = _modulation(model.final_modulation, condition)
        n = n * (1 + scale) + shift
    return _energy(model, h, n), context


def text_energies(model: Any, context: Tensor, segments: Tensor | None, step: int, x: Tensor) -> Tensor:
    """The first of `text_streams`."""
    return text_streams(model, context, segments, step, x)[0]


def read_out(model: Any, context: Tensor, segments: Tensor | None) -> Tensor:
    """What the output on the context stream reads, [S, B, D], where thinking starts at its prediction.

    Args:
        model, context, segments: as in `text_streams`.
    """
    hidden = text_streams(model, context, segments, 0, torch.zeros_like(context))[1]
    return _rms_norm(hidden, model.context_norm.weight, model.config.layernorm_epsilon)


def cell_energies(model: Any, context: Tensor, segments: Tensor | None, step: int, x: Tensor) -> Tensor:
    """Energies [S, B] of embedded cells x [S, B, D] whose sum is a grid's, given embedded clues [S, B, D].

    Args:
        model: a CellEnergy.
        context: [S, B, D], differentiable.
        segments: not read.
        step: the thinking step.
        x: [S, B, D].
    """
    epsilon = model.config.layernorm_epsilon
    h = x + context
    if model.conditioning != "none":
        h = h + model.step_embedding[min(step, len(model.step_embedding) - 1)]
    for layer in model.layers:
        mixed = F.linear(_rms_norm(h, layer.norm1.weight, epsilon), layer.qkv.weight)
        q, k, v = mixed.unflatten(-1, (-1, 3, layer.head_size)).unbind(-2)
        h = h + F.linear(_attention(q, k, v, x.new_zeros(1)), layer.proj.weight)
        h = h + _mlp(layer, _rms_norm(h, layer.norm2.weight, epsilon))
    return _energy(model, h, _rms_norm(h, model.final_norm.weight, epsilon))


def joint_energies(model: Any, condition: Tensor, segments: Tensor | None, step: int, x: Tensor) -> Tensor:
    """Energies [S, B] of embedded pictures x [S, B, D] whose sum over patches is a picture's, under a condition.

    Args:
        model: a JointEnergy.
        condition: [1, B, D], differentiable.
        segments: not read.
        step: the thinking step.
        x: [S, B, D].
    """
    if model.context_sees_step:
        condition = condition + model.step_embedding[min(step, len(model.step_embedding) - 1)]
    condition = F.silu(condition)

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=model.config.layernorm_epsilon) * (1 + scale) + shift

    h = x
    for layer in model.layers:
        parts = F.linear(condition, layer.modulation.weight, layer.modulation.bias).unflatten(-1, (6, -1)).unbind(-2)
        n = F.linear(modulated(h, *parts[:2]), layer.qkv.weight, layer.qkv.bias)
        q, k, v = n.unflatten(-1, (-1, 3, layer.head_size)).permute(3, 1, 2, 0, 4)
        scores = (q @ k.mT / math.sqrt(layer.head_size)).softmax(-1)
        h = h + parts[2] * F.linear((scores @ v).permute(2, 0, 1, 3).flatten(2), layer.proj.weight, layer.proj.bias)
        n = F.linear(modulated(h, *parts[3:5]), layer.fc1.weight, layer.fc1.bias)
        h = h + parts[5] * F.linear(F.gelu(n, approximate="tanh"), layer.fc2.weight, layer.fc2.bias)
    last = F.linear(condition, model.final_modulation.weight, model.final_modulation.bias).chunk(2, -1)
    return modulated(h, *last) @ model.head / len(x)


def energies_of(model: Any, context: Tensor, segments: Tensor | None) -> Callable[[int, Tensor], Tensor]:
    """(step, embedded prediction) -> energies, of a model on one process, for `train`.

    Args:
        model: an EnergyTransformer, a CellEnergy or a JointEnergy; or one that has a `plain_energy` of its own,
            (context, step, embedded prediction) -> energies.
        context: what its modality embeds of what is observed.
        segments: int32 [B, S] documents, or None.
    """
    if (own := getattr(model, "plain_energy", None)) is not None:
        return partial(own, context)
    judge = text_energies if model.separable else cell_energies if isinstance(model, CellEnergy) else joint_energies
    return partial(judge, model, context, segments)


def train(energies: Callable[[int, Tensor], Tensor], descent: Descent, hidden: Tensor | None = None) -> ThinkingOutput:
    """Same meaning as Thinker.train: adds gradients to the parameters, returns losses and energies.

    Args:
        energies: (step, embedded prediction [S, B, D]) -> energies [S, B], differentiable twice; `energies_of` a
            model.
        descent: its prediction, before the first step, with step sizes, plan and weights; nothing else of it is used.
        hidden: from `read_out`, where thinking starts at the context's prediction.
    """
    plan, weight, step_size = descent.plan, descent.weight, descent.step_size
    assert plan is not None and weight is not None
    prediction = descent.prediction.plain()
    # alpha as a differentiable function of the scalar that is learned
    alpha = descent.alpha + descent.alpha_slope * (step_size - step_size.detach())
    losses, all_energies, total = [], [], torch.zeros((), dtype=alpha.dtype)
    y, initial = prediction.start.to(alpha.dtype), None
    if hidden is not None:
        assert plan.initial_weight is not None
        y = prediction.begin(hidden)
        loss = prediction.loss(y).view_as(weight)
        total, initial = plan.initial_weight * (weight * loss).sum(), loss.detach()
    for step, step_weight in enumerate(plan.step_weights):
        y = y.detach() if plan.gradient == "detached" else y
        y = prediction.perturb(y, step).requires_grad_()
        create = plan.gradient != "truncated" or step == plan.steps - 1
        y, energy = prediction.step(y, alpha, partial(energies, step), create)
        loss = prediction.loss(y).view_as(weight)
        total = total + step_weight * (weight * loss).sum()
        losses.append(loss.detach())
        all_energies.append(energy.detach())
    total.backward()
    descent.prediction.y = y.detach()
    return ThinkingOutput(torch.stack(losses), torch.stack(all_energies), initial)
