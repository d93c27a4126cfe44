"""The slow reference: differentiate twice through everything, in plain torch.

This is how the paper's public code trains: at every step the context and the prediction
go through the network together (2S positions), attention scores are full matrices, and
`autograd.grad(create_graph=True)` keeps the whole graph until the loss is differentiated.
It reads the parameters of an EnergyTransformer but calls none of its code, no kernel and
no Megatron layer, so that it can stand as the judge of them. Single process only.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_megatron.kernels.rotary import rotate
from ebt_megatron.thinking.dual_stream import Descent, Thought


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [Sq, B, N, H], k and v [Sk, B, G, H], mask broadcast to [B, 1, Sq, Sk] -> [Sq, B, N*H]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + mask
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def joint_energy(model: Any, context: Tensor, x: Tensor, segments: Tensor | None, step: int) -> Tensor:
    """Energies [S, B] of embedded predictions x [S, B, D] after embedded context [S, B, D]."""
    rows = len(x)
    epsilon = model.config.layernorm_epsilon
    if model.step_tokens:
        context = torch.cat([model.step_embedding[model.landscape(step)].expand(1, x.shape[1], -1), context])
    elif model.conditioning == "time_embed":
        x = x + model.step_embedding[model.landscape(step)]
    length = len(context)
    modulated = 0 if model.context_sees_step else length  # the first row that adaLN touches
    condition = model.step_embedding[model.landscape(step)][None] if model.conditioning.startswith("adaln") else None
    h = torch.cat([context, x])

    # Row t of the prediction sees context s <= t + extra, where extra counts the step's token.
    extra = length - rows
    causal = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)
    if segments is not None:
        other = segments[:, :, None] != segments[:, None, :]
        causal = torch.where(other[:, None], -math.inf, causal)
    own = torch.full((rows, rows), -math.inf, dtype=x.dtype, device=x.device).fill_diagonal_(0)
    from_context = causal[..., extra:, :]
    mask = torch.cat([from_context, own.expand(*from_context.shape[:-2], rows, rows)], -1)
    rotations = torch.cat([model.rotary.table(length, 0, x), model.rotary.table(rows, 1 + extra, x)])

    for layer in model.layers:
        n = _rms_norm(h, layer.norm1.weight, epsilon)
        gates: list[Tensor | None] = [None, None]
        parts: tuple = (None,) * 6
        if layer.modulation is not None:
            parts = layer.modulation(condition)
            gates = [parts[2], parts[5]]
            n = torch.cat([n[:modulated], n[modulated:] * (1 + parts[1]) + parts[0]])
        mixed = F.linear(n, layer.qkv.weight).unflatten(-1, (layer.local_groups, -1, layer.head_size))
        q, k, v = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
        q, k = rotate(q, rotations), rotate(k, rotations)
        o = torch.cat([
            _attention(q[:length], k[:length], v[:length], causal),
            _attention(q[length:], k, v, mask),
        ])  # fmt: skip
        branch = F.linear(o, layer.proj.weight)
        if gates[0] is not None:
            branch = torch.cat([branch[:modulated], branch[modulated:] * gates[0]])
        h = h + branch
        n = _rms_norm(h, layer.norm2.weight, epsilon)
        if layer.modulation is not None:
            n = torch.cat([n[:modulated], n[modulated:] * (1 + parts[4]) + parts[3]])
        gate, up = F.linear(n, layer.fc1.weight).unflatten(-1, (-1, 2, layer.ffn_block)).unbind(-2)
        branch = F.linear((F.silu(gate) * up).flatten(-2), layer.fc2.weight)
        if gates[1] is not None:
            branch = torch.cat([branch[:modulated], branch[modulated:] * gates[1]])
        h = h + branch
    n = _rms_norm(h[length:], model.final_norm.weight, epsilon)
    if model.conditioning == "adaln_sequence":
        shift, scale = model.final_modulation(condition)
        n = n * (1 + scale) + shift
    return n @ model.head


def _energy_of(model: Any, context: Tensor, segments: Tensor | None, step: int, x: Tensor) -> Tensor:
    return joint_energy(model, context, x, segments, step)


def train(model: Any, context: Tensor, segments: Tensor | None, descent: Descent) -> Thought:
    """Same meaning as Thinker.train: adds gradients to the parameters, returns losses and energies.

    Args:
        model: an EnergyTransformer.
        context: embedded context [S, B, D], differentiable.
        segments: int32 [B, S] documents, or None.
        descent: its prediction (with plain_step, plain_store and plain_loss; its logits are the start), step sizes,
            plan and weights; nothing else of it is used.
    """
    prediction, plan, weight = descent.prediction, descent.plan, descent.weight
    assert plan is not None and weight is not None
    # alpha as a differentiable function of the scalar that is learned
    alpha = descent.alpha + descent.alpha_slope * (model.step_size - model.step_size.detach())
    losses, energies, total = [], [], torch.zeros((), dtype=alpha.dtype)
    y = prediction.logits.flatten(0, 1).to(alpha.dtype)
    for step, step_weight in enumerate(plan.step_weights):
        y = y.detach() if plan.gradient == "detached" else y
        noise = torch.zeros_like(y)
        prediction.add_langevin(noise, step)
        y = prediction.plain_store(y + noise).requires_grad_()
        energy_of = partial(_energy_of, model, context, segments, step)
        create = plan.gradient != "truncated" or step == plan.steps - 1
        y, energy = prediction.plain_step(y, alpha, energy_of, create)
        y = prediction.plain_store(y)
        loss = prediction.plain_loss(y)
        total = total + step_weight * (weight * loss).sum()
        losses.append(loss.detach())
        energies.append(energy.detach())
    total.backward()
    prediction.y = y.detach()
    return Thought(torch.stack(losses), torch.stack(energies))
