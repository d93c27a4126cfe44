"""What a kernel backend offers.

Hidden states are sequence-first, [S, B, D]. Where an operation takes `tangent`, its inputs
are *stacked*: value and tangent concatenated along dim 1, [S, 2B, ...], and so is its
output. N query heads share G key groups (N a multiple of G) of size H.

Vocabulary operations work on T = S * B tokens and one tensor-parallel rank's columns. They
never communicate: the caller combines what they return over ranks. With p = exp(y - lse)
over the first `valid` columns (the rest is padding: probability 0, never touched),

    dE/dp = q = energy_grad table^T,     dE/dy = p * (q - centre),     centre = <p, q>

and a step by one of three rules (`StepRule`):

    probability_descent    y' = p - alpha q
    logit_descent          y' = y - alpha p * (q - centre)
    mirror_descent         y' = y - alpha q

    p' = exp(y' - lse'),   lambda = p' - 1[target],   r = dp/dy's factor: p for logit_descent, else 1

g stands for what alpha multiplies. `lse` is that of the whole vocabulary. `target` is a local column, or -1 on
another rank. y may be stored in bf16: y' is then rounded to it, and everything that is made of y' is made of the
rounded one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import torch
from torch import Tensor


class StepRule(StrEnum):
    """How logits are improved along the energy's gradient.

    PROBABILITY: gradient descent on the probabilities, whose result are the next logits; the step of the
        paper's public code. The gradient is not damped where a probability is small.
    LOGIT: gradient descent on the logits; the step of the paper's listing.
    MIRROR: mirror descent on the simplex (Beck and Teboulle 2003): the gradient by the probabilities moves the
        logits, so that steps add up, and a small one lowers the energy.
    """

    PROBABILITY = "probability_descent"
    LOGIT = "logit_descent"
    MIRROR = "mirror_descent"

    @property
    def from_probabilities(self) -> bool:
        """Whether a step starts at p rather than at the logits."""
        return self is StepRule.PROBABILITY

    @property
    def by_logits(self) -> bool:
        """Whether a step goes along dE/dy rather than dE/dp."""
        return self is StepRule.LOGIT


def compute_dtype(y: Tensor, table: Tensor) -> torch.dtype:
    """What the vocabulary's operations compute in, and return: fp32 at least, whatever y is stored in."""
    return torch.promote_types(torch.promote_types(y.dtype, table.dtype), torch.float32)


@dataclass
class RefineStats:
    """This rank's sums over its columns v, from `vocab_refine`; all [T] but `embedded`.

    Attributes:
        lse_next: log-sum-exp of y'.
        target_logit, p_target: y' and p at the target; 0 where it is not local.
        mean: sum r_v p'_v, with p' = exp(y' - lse_next), local.
        embedded: [T, D] sum r_v p'_v table_v.
    """

    lse_next: Tensor
    target_logit: Tensor
    p_target: Tensor
    mean: Tensor
    embedded: Tensor

    @classmethod
    def join(cls, parts: Sequence[RefineStats]) -> RefineStats:
        """Join the sums of neighbouring rows, one after another."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass(frozen=True)
class Kernels:
    """One backend's operations; see the module's text for shapes and notation.

    Attributes:
        name: of the backend.
        split_heads: (mixed [S, B*, G*(N/G+2)*H], table [S, H/2, 2], groups, size) -> q [S, B*, N, H],
            k and v [S, B*, G, H]: by group, its queries, its key and its value; queries and keys are rotated by the
            angles whose cosines and sines are in the table, on interleaved pairs.
        context_attention: (q, k, v, *, segments=None, block=1) -> [S, B, N*H]; causal by blocks of neighbouring rows:
            row t sees keys s < (t // block + 1) block (of its document).
        prediction_attention: (q, k_self, v_self, k, v, *, tangent, segments=None, block=1) -> [S, B*, N*H];
            row t sees the context keys that row t of the context sees (segments int32 [B, S]) and its own key;
            k and v carry no tangent.
        full_attention: (mixed [S, B*, N*3*H], bias [N*3*H], size, *, tangent) -> [S, B*, N*H]; bidirectional;
            mixed + bias has, by head of this size, its query, its key and its value.
        cached_attention: (q [B, Q, N, H], k and v [B, G, C, H], seen bool [B, Q, C], k_self=None, v_self=None) ->
            [B, Q, N*H]; over keys kept before: each query sees those of its row of the batch that `seen` says, and its
            own [B, Q, G, H] if given. No gradient to k and v.
        rms_norm: (x, weight, epsilon, *, tangent).
        layer_norm: (x, epsilon, shift, scale, *, tangent): normalised, times 1 + scale, plus shift; [B, D] each.
        swiglu: (x, block, *, tangent); [..., 2F] -> [..., F], gate and up alternate in blocks of columns.
        gelu: (x, bias, *, tangent): of x + bias; tanh form.
        add_gated: (h, x, gate [B, D], bias, *, tangent): h + gate (x + bias).
        vocab_embed: (y, table, valid) -> (p table [T, D], lse [T]) over the local columns alone.
        vocab_refine: (y, lse, table, valid, energy_grad, centre, alpha, target, rule, y_next=None) -> RefineStats;
            writes y' to y_next [T, V] if given.
        vocab_backward: (y, lse, table, valid, energy_grad, centre, alpha, target, rule, lse_next, scale, mean,
            x_grad, xt_grad, table_grad, y_next=None): table_grad += p^T x_grad (unless that is None) +
            (r * (scale lambda - mean))^T xt_grad, in place, scale > 0 (mean: of logit_descent; the others subtract
            none); y becomes y' in place, unless y' is given.
        vocab_update: (y, lse, table, valid, energy_grad, centre, alpha, rule): y becomes y' in place.
        vocab_adjoint: (y', lse', target, weight, valid, adjoint): adjoint += weight lambda, in place.
        vocab_dot_step: (y, lse, table, valid, energy_grad, centre, rule, adjoint) -> <adjoint, g> [T],
            <p, adjoint> [T].
        vocab_tangent: (y, lse, table, valid, rule, adjoint) -> |adjoint|^2 [T], (r * adjoint) table [T, D].
        vocab_to_logits: (y, lse, valid, mean, adjoint): adjoint becomes p * (adjoint - mean), in place: what is a
            gradient by p becomes one by y, with mean = <p, adjoint>.
        vocab_dense_backward: (y, lse, table, valid, rule, adjoint, scale, mean, x, xt, x_grad, xt_grad,
            table_grad): as vocab_backward with lambda = adjoint and no step (mean as it is for vocab_to_logits, but
            scaled; only logit_descent subtracts it), and the adjoint by y' becomes that by y, in place:
            that through where the step starts, plus the derivative of <x_grad, x> + <xt_grad, xt> by y,
            where x = p table, xt = (r * (scale adjoint - mean)) table.
        round_rows: (x [M, K], of any strides) -> e4m3 [M, K'], fp32 [M, 1]: each row divided by a power of two
            and rounded, with zeros up to the next multiple of 16; the power is NaN where a row is not finite.
        row_keys: (sample_ids [B], positions [S], stream) -> int64 [S * B] keys of noise rows.
        add_noise_: (y, keys, column_offset, std, seed): y += std * N(0, 1), a pure function of seed,
            key and global column, in place.
    """

    name: str
    split_heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    context_attention: Callable[..., Tensor]
    prediction_attention: Callable[..., Tensor]
    full_attention: Callable[..., Tensor]
    cached_attention: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    gelu: Callable[..., Tensor]
    add_gated: Callable[..., Tensor]
    vocab_embed: Callable[..., tuple[Tensor, Tensor]]
    vocab_refine: Callable[..., RefineStats]
    vocab_backward: Callable[..., None]
    vocab_update: Callable[..., None]
    vocab_adjoint: Callable[..., None]
    vocab_dot_step: Callable[..., tuple[Tensor, Tensor]]
    vocab_tangent: Callable[..., tuple[Tensor, Tensor]]
    vocab_to_logits: Callable[..., None]
    vocab_dense_backward: Callable[..., None]
    round_rows: Callable[..., tuple[Tensor, Tensor]]
    row_keys: Callable[..., Tensor]
    add_noise_: Callable[..., None]
