"""Text's predictions: distributions over the vocabulary, held as logits, while they think.

The logits y [S * B, V / TP] are the only tensor of vocabulary width; everything else is
reduced on the fly by the vocabulary kernels.

Notation: p = softmax(y), W the prediction embedding, G the energy's gradient at the
embedded prediction x = p W, and by `thinking.step_rule`

    probability_descent    y' = p - alpha g,    g = dE/dp = G W^T               (the paper's public code)
    logit_descent          y' = y - alpha g,    g = dE/dy = p * (G W^T - <x, G>)    (the paper's listing)
    mirror_descent         y' = y - alpha g,    g = dE/dp

    p' = softmax(y'),    loss = -log p'[target],    lambda = dloss/dy' = p' - 1[target]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.kernels import Kernels, RefineStats, StepRule
from ebt_megatron.parallel.collectives import TensorGroup, gradient_buffer
from ebt_megatron.prediction.plain_logits import PlainText


@dataclass
class _Step:
    """What a step's gradient is made of: enough to form y' from y again."""

    lse: Tensor  # [T] log-sum-exp of y over the whole vocabulary
    energy_grad: Tensor  # G [T, D]
    centre: Tensor  # <x, G> [T]
    alpha: Tensor  # [T]

    def rows(self, rows: slice) -> _Step:
        """Of some rows."""
        return _Step(self.lse[rows], self.energy_grad[rows], self.centre[rows], self.alpha[rows])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class TextPrediction:
    """A micro-batch of predicted distributions, a `Prediction` (see the module's text for the notation).

    With `thinking.regenerate`, y is never stored: noise is a pure function and a step is known by its
    [T, D] gradient, so every pass makes y anew, some rows at a time.

    Args:
        kernels: how the hot operations run.
        table: this rank's rows of the prediction embedding W, [V / TP, D].
        vocab_size: tokens; the rest of V is padding.
        group: the tensor-parallel group.
        targets, sample_ids, thinking, seed, start: as `TextModality.prediction` takes them.
    """

    def __init__(
        self,
        kernels: Kernels,
        table: nn.Parameter,
        vocab_size: int,
        group: TensorGroup,
        targets: Tensor,
        sample_ids: Tensor,
        thinking: ThinkingConfig,
        seed: int,
        start: Tensor | None,
    ):
        self.kernels, self.table, self.group = kernels, table, group
        self.batch, self.length = targets.shape
        local = self.table.shape[0]
        self.column_offset = local * self.group.rank
        self.valid = min(max(vocab_size - self.column_offset, 0), local)
        self.sample_ids, self.seed, self.thinking = sample_ids.to(self.table.device), seed, thinking
        target = targets.t().reshape(-1) - self.column_offset
        self.target = torch.where((target >= 0) & (target < self.valid), target, -1)
        self.start = start
        self.dtype = torch.promote_types(self.table.dtype, torch.float32)
        self._stored = torch.bfloat16 if thinking.logits_dtype == "bfloat16" else self.dtype
        self.rule = StepRule(thinking.step_rule)
        self._all = slice(0, self.length * self.batch)
        # What the current prediction is made of: the steps to it, and how many had Langevin noise before them.
        self.steps: list[_Step] = []
        self.perturbed = 0
        self._regenerated = thinking.regenerate > 0
        self.y = None if self._regenerated else self._make(self._all)
        # Reuse trades memory for arithmetic: y' is kept until it becomes y, not computed twice.
        self._next: Tensor | None = None
        if thinking.reuse and self.y is not None:
            self._next = torch.empty_like(self.y)
            self._next[:, self.valid :] = 0
        self._moved = False  # whether `backward` has written y' over y
        self.history: list[tuple[_Step, Tensor]] = []  # of each step: itself, and the log-sum-exp it ended with
        self._end: Tensor | None = None  # the last prediction, where going back overwrites it

    # --- the logits ---------------------------------------------------------------------

    def _make(self, rows: slice, buffer: Tensor | None = None) -> Tensor:
        """The prediction's logits, from its seed and the steps taken, [rows, V / TP]; into a buffer if given."""
        shape = rows.stop - rows.start, self.table.shape[0]
        if buffer is None:
            y = torch.zeros(shape, dtype=self._stored, device=self.table.device)
        else:
            y = buffer[: shape[0]].zero_()
        if self.thinking.initial == "noise":
            self._add_noise(y, stream=0, std=self.thinking.initial_std, rows=rows)
        if self.start is not None:
            start = self.start.flatten(0, 1)[rows].to(y)
            y = torch.where(start.isnan(), y, start)
        for i in range(max(self.perturbed, len(self.steps))):
            if i < self.perturbed:
                self.add_langevin(y, i, rows)
            if i < len(self.steps):
                self._update(y, self.steps[i].rows(rows))
        return y

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits: all, where they are stored, else some at a time, each in the same memory."""
        if not self._regenerated:
            yield self._all, self._stored_logits
            return
        size = min(self.thinking.regenerate, self._all.stop)
        buffer: Tensor | None = None
        for begin in range(0, self._all.stop, size):
            rows = slice(begin, min(begin + size, self._all.stop))
            y = self._make(rows, buffer)
            buffer = y if buffer is None else buffer
            yield rows, y

    def _parts_of_step(self) -> Iterator[tuple[slice, Tensor, _Step]]:
        for rows, y in self._parts():
            yield rows, y, self.step.rows(rows)

    @property
    def _stored_logits(self) -> Tensor:
        assert self.y is not None
        return self.y

    def _add_noise(self, y: Tensor, stream: int, std: float, rows: slice) -> None:
        positions = torch.arange(self.length, device=y.device)
        keys = self.kernels.row_keys(self.sample_ids, positions, stream)[rows]
        self.kernels.add_noise_(y, keys, self.column_offset, std, self.seed)

    def add_langevin(self, y: Tensor, step: int, rows: slice | None = None) -> None:
        """Add the Langevin noise of step `step` to logits y of all rows, or of some, in place."""
        if self.thinking.langevin_noise > 0:
            self._add_noise(y, 1 + step, self.thinking.langevin_noise, rows or self._all)

    def perturb(self, step: int) -> None:
        """Langevin noise before step `step`."""
        self.perturbed = step + 1
        if not self._regenerated:
            self.add_langevin(self._stored_logits, step)

    def _whole(self) -> Tensor:
        return self._make(self._all) if self.y is None else self.y

    @property
    def logits(self) -> Tensor:
        """The current logits [S, B, V / TP]."""
        return self._whole().to(self.dtype).view(self.length, self.batch, -1)

    def most_likely(self) -> Tensor:
        """The token that the current prediction gives the highest probability; int64 [S, B], the same on every rank."""
        parts = [y[:, : self.valid].max(1) for _, y in self._parts()] if self.valid else []
        if parts:
            values, columns = _join([v for v, _ in parts]), _join([c for _, c in parts]) + self.column_offset
        else:  # a rank that holds padding alone
            values = torch.full_like(self.target, -math.inf, dtype=self.dtype)
            columns = self.target
        best = self.group.max(values)
        # Of ranks that have it, the one of the lowest token.
        token = -self.group.max(torch.where(values == best, -columns, torch.iinfo(torch.int64).min))
        return token.view(self.length, self.batch)

    @property
    def final(self) -> Tensor:
        """The logits at the end of thinking as they are stored, [S, B, V / TP], for the replay buffer."""
        return (self._whole() if self._end is None else self._end).view(self.length, self.batch, -1)

    # --- one step -----------------------------------------------------------------------

    def embed(self) -> Tensor:
        """Embed the current prediction: x = softmax(y) W, [S(/TP), B, D]."""
        parts = [self.kernels.vocab_embed(y, self.table.detach(), self.valid) for _, y in self._parts()]
        x, lse = (_join(t) for t in zip(*parts, strict=True))
        self.lse = self.group.log_sum_exp(lse)
        x = x * (lse - self.lse).exp()[:, None]
        self.x = self.group.to_hidden(self._hidden(x))
        return self.embedded

    @property
    def embedded(self) -> Tensor:
        """What `embed` returned last."""
        return self.x.to(self.table.dtype)

    def _hidden(self, flat: Tensor) -> Tensor:
        return flat.view(self.length, self.batch, -1)

    def _flat(self, hidden: Tensor) -> Tensor:
        return self.group.from_hidden(hidden).flatten(0, 1).to(self.dtype)

    def refine(self, energy_grad: Tensor, alpha: Tensor) -> Tensor:
        """Form the next prediction, without storing it.

        Args:
            energy_grad: G = dE/dx, [S(/TP), B, D].
            alpha: step size per position, [S, B].

        Returns:
            The cross-entropy of the next prediction per position, [S, B].
        """
        centre = self.group.from_hidden((self.x * energy_grad).sum(-1)).flatten()
        self.step = _Step(self.lse, self._flat(energy_grad), centre, alpha.flatten().to(self.dtype))
        stats = RefineStats.join([
            self.kernels.vocab_refine(y, s.lse, self.table.detach(), self.valid, s.energy_grad, s.centre, s.alpha,
                                      self.target[t], self.rule, self._next)
            for t, y, s in self._parts_of_step()
        ])  # fmt: skip
        self.lse_next = self.group.log_sum_exp(stats.lse_next)
        part = (stats.lse_next - self.lse_next).exp()
        present = self.target >= 0
        at_target = torch.where(present, stats.p_target if self.rule.by_logits else 1.0, 0.0)
        # sum_v r_v lambda_v W_v, of this rank's columns, as `along` is before it is summed over ranks
        self._lambda_embedded = (
            stats.embedded * part[:, None] - at_target[:, None] * self.table.detach()[self.target.clamp_min(0)]
        )
        along = torch.linalg.vecdot(self._lambda_embedded, self.step.energy_grad)
        sums = torch.stack([stats.target_logit, stats.p_target, stats.mean * part, along])
        target_logit, p_target, mean, along = self.group.sum(sums)
        loss = self.lse_next - target_logit
        self._norm = -torch.expm1(-loss).clamp_max(-1e-6)  # 1 - p'[target]
        if self.rule.by_logits:  # <p, lambda>, and <lambda, g> as g = p (G W^T - centre)
            self._mean = mean - p_target
            self._slope = along - centre * self._mean
        else:
            self._mean, self._slope = torch.zeros_like(mean), along
        return loss.view(self.length, self.batch)

    def slope(self) -> Tensor:
        """<dloss/dy', g> per position [S, B]: minus the loss's derivative by the step size."""
        return self._slope.view(self.length, self.batch)

    def tangent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The direction to learn along: the loss's gradient lambda, divided by 1 - p'[target] per position.

        Its norm is then between 1 and sqrt(2). Scaling costs nothing, because the energy's tangent is linear in
        its direction; it keeps low precision from losing the small gradients of a confident prediction.

        Args:
            weight: [S, B] of each position's loss.

        Returns:
            The tangent's embedding [S(/TP), B, D], and the norms [S, B] taken out of it
            (which include `weight`).
        """
        numerator = self.group.to_hidden(self._hidden(self._lambda_embedded))
        mean = self.group.own_positions(self._mean.view(self.length, self.batch))
        norm = self._norm.view(self.length, self.batch)
        self._scale, self._scaled_mean = 1 / self._norm, self._mean / self._norm
        xt = (numerator - mean[..., None] * self.x) / self.group.own_positions(norm)[..., None]
        return xt.to(self.table.dtype), norm * weight

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """Take gradients at the embedded value and tangent [S(/TP), B, D] to the embedding."""
        x_grad, xt_grad = self._flat(x_grad), self._flat(xt_grad)
        for t, y, s in self._parts_of_step():
            self.kernels.vocab_backward(
                y, s.lse, self.table.detach(), self.valid, s.energy_grad, s.centre, s.alpha, self.target[t],
                self.rule, self.lse_next[t], self._scale[t], self._scaled_mean[t], x_grad[t], xt_grad[t],
                gradient_buffer(self.table), self._next,
            )  # fmt: skip
        self._moved = self._next is None and not self._regenerated  # saves a pass over the vocabulary

    def advance(self, keep: bool) -> None:
        """Replace the prediction by the next one; with `keep`, `rewind` can come back before this step."""
        if keep:
            self.history.append((self.step, self.lse_next))
        if self._regenerated:
            self.steps.append(self.step)
        elif self._next is not None:
            self.y, self._next = self._next, self.y
        elif not self._moved:
            self._update(self._stored_logits, self.step)
        self._moved = False

    def _update(self, y: Tensor, s: _Step) -> None:
        self.kernels.vocab_update(
            y, s.lse, self.table.detach(), self.valid, s.energy_grad, s.centre, s.alpha, self.rule
        )

    # --- training through several steps -----------------------------------------------------
    # The adjoint lambda_i = dL/dy_i is then a full tensor. The predictions themselves are
    # made anew from their seed and each step's [T, D] gradient, so memory does not grow
    # with the number of steps.

    def begin_adjoint(self) -> None:
        """Start the way back, after the last `advance`."""
        if self.thinking.replay.enabled:
            self._end = self._whole().clone()
        shape = self._all.stop, self.table.shape[0]
        self.adjoint = torch.zeros(shape, dtype=self.dtype, device=self.table.device)

    def add_loss_gradient(self, step: int, weight: Tensor) -> None:
        """adjoint += weight * dloss/dy at the prediction after step `step`; weight [S, B]."""
        if self.perturbed > step + 1:  # `rewind` to the step after it has put noise on it
            self._unperturb(step + 1)
        weight, lse_next = weight.flatten().to(self.dtype), self.history[step][1]
        for t, y in self._parts():
            self.kernels.vocab_adjoint(y, lse_next[t], self.target[t], weight[t], self.valid, self.adjoint[t])

    def rewind(self, step: int) -> None:
        """Return to the prediction as it was before step `step`, with that step's noise."""
        self.steps, self.perturbed = [s for s, _ in self.history[:step]], step + 1
        if not self._regenerated:
            self.y = self._make(self._all)
        self.step = self.history[step][0]

    def _unperturb(self, step: int) -> None:
        """Take the noise before step `step` off again."""
        self.perturbed = step
        if self._regenerated or self.thinking.langevin_noise == 0:
            return
        if self._stored == self.dtype:
            self._add_noise(self._stored_logits, 1 + step, -self.thinking.langevin_noise, self._all)
        else:  # what was rounded does not come back by subtraction
            self.y = self._make(self._all)

    def adjoint_slope(self) -> Tensor:
        """<adjoint, g> of the rewound step, [S, B]."""
        parts = [
            self.kernels.vocab_dot_step(y, s.lse, self.table.detach(), self.valid, s.energy_grad, s.centre, self.rule,
                                        self.adjoint[t])
            for t, y, s in self._parts_of_step()
        ]  # fmt: skip
        slope, self._mean = self.group.sum(torch.stack([_join(part) for part in zip(*parts, strict=True)]))
        return slope.view(self.length, self.batch)

    def adjoint_tangent(self) -> tuple[Tensor, Tensor]:
        """As `tangent`, along the adjoint; call after `rewind`, `adjoint_slope` and `embed`."""
        parts = [
            self.kernels.vocab_tangent(y, self.lse[t], self.table.detach(), self.valid, self.rule, self.adjoint[t])
            for t, y in self._parts()
        ]
        norm2, embedded = (_join(part) for part in zip(*parts, strict=True))
        norm = self.group.sum(norm2).sqrt().clamp_min(1e-30)
        self._scale, self._scaled_mean = 1 / norm, self._mean / norm
        own, shape = self.group.own_positions, (self.length, self.batch, 1)
        xt = self.group.to_hidden(self._hidden(embedded))
        if self.rule.by_logits:
            xt = xt - own(self._mean.view(shape)) * self.x
        self.xt = xt / own(norm.view(shape))
        return self.xt.to(self.table.dtype), norm.view(self.length, self.batch)

    def adjoint_backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """As `backward`, without advancing; the adjoint becomes that before the step."""
        x, xt, x_grad, xt_grad = (self._flat(h) for h in (self.x, self.xt, x_grad, xt_grad))
        for t, y in self._parts():
            self.kernels.vocab_dense_backward(
                y, self.lse[t], self.table.detach(), self.valid, self.rule, self.adjoint[t], self._scale[t],
                self._scaled_mean[t], x[t], xt[t], x_grad[t], xt_grad[t], gradient_buffer(self.table),
            )  # fmt: skip

    def adjoint_past(self) -> None:
        """As `adjoint_backward`, of a step whose energy gradient is a constant."""
        if self.rule.from_probabilities:
            for t, y in self._parts():
                self.kernels.vocab_to_logits(y, self.step.lse[t], self.valid, self._mean[t], self.adjoint[t])

    # --- for the judge ------------------------------------------------------------------------

    def plain(self) -> PlainText:
        """See `Prediction.plain`; call it before the first step."""
        noise = self.thinking.langevin_noise > 0
        return PlainText(
            self.logits.flatten(0, 1), self.table, self.target, self.valid, self.rule, self._stored,
            self.add_langevin if noise else None,
        )  # fmt: skip
