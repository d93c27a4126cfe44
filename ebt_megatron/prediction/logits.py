"""Text's predictions: distributions over the vocabulary, held as logits, while they think.

How the logits y [S * B, V / TP] are held is `ebt_megatron.prediction.stored_logits`; they are the only tensor of
vocabulary width, as everything else is reduced on the fly by the vocabulary kernels.

Notation: p = softmax(y), W the prediction embedding, G the energy's gradient at the
embedded prediction x = p W, and by `thinking.step_rule`

    probability_descent    y' = p - alpha g,    g = dE/dp = G W^T               (the paper's public code)
    logit_descent          y' = y - alpha g,    g = dE/dy = p * (G W^T - <x, G>)    (the paper's listing)
    mirror_descent         y' = y - alpha g,    g = dE/dp

    p' = softmax(y'),    loss = -log p'[target],    lambda = dloss/dy' = p' - 1[target]

With `thinking.initial=context`, y_0 = h U^T, with h the context's hidden states and U the output on its stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.kernels import Kernels, RefineStats, StepRule
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import gradient_buffer
from ebt_megatron.prediction.plain_logits import PlainText
from ebt_megatron.prediction.stored_logits import Step, StoredLogits


@dataclass(frozen=True)
class Rows:
    """Positions [S, B] as rows of the logits, S * B of them.

    Attributes:
        length, batch: S, B.
        group: the tensor-parallel group.
        dtype: of numbers by row.
    """

    length: int
    batch: int
    group: TensorGroup
    dtype: torch.dtype

    def positions(self, flat: Tensor) -> Tensor:
        """Rows [S * B, ...] -> [S, B, ...]."""
        return flat.view(self.length, self.batch, *flat.shape[1:])

    def own(self, flat: Tensor) -> Tensor:
        """Numbers by row [S * B] as factors of this rank's hidden states, [S(/TP), B, 1]."""
        return self.group.own_positions(self.positions(flat))[..., None]

    def flat(self, hidden: Tensor) -> Tensor:
        """Hidden states [S(/TP), B, D] -> [S * B, D]."""
        return self.group.from_hidden(hidden).flatten(0, 1).to(self.dtype)

    def hidden(self, partial: Tensor) -> Tensor:
        """Rows [S * B, D], each rank's part of a sum, -> hidden states [S(/TP), B, D]."""
        return self.group.to_hidden(self.positions(partial))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of some rows each, as one tensor."""
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
        targets, sample_ids, thinking, seed, start: as `Embeddings.prediction` takes them.
        output: this rank's rows of U, [V / TP, D], where thinking starts at the context's prediction.
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
        output: nn.Parameter | None = None,
    ):
        self.kernels, self.table, self.group, self.vocab_size, self.output = kernels, table, group, vocab_size, output
        batch, length = targets.shape
        local = table.shape[0]
        offset = local * group.rank
        self.valid = min(max(vocab_size - offset, 0), local)
        target = targets.t().reshape(-1) - offset
        self.target = torch.where((target >= 0) & (target < self.valid), target, -1)
        self.stored = StoredLogits(
            kernels,
            table,
            self.valid,
            offset,
            (length, batch),
            sample_ids,
            thinking,
            seed,
            start,
            None if output is None else output.detach(),
        )
        self.rows = Rows(length, batch, group, self.stored.dtype)
        self.rule, self.thinking = self.stored.rule, thinking
        self.history: list[tuple[Step, Tensor]] = []  # of each step: itself, and the log-sum-exp it ended with
        self.end: Tensor | None = None  # the last prediction, where going back overwrites it
        # What `refine` found of the next prediction on its way: p' W of this rank's columns, and its log-sum-exp; and
        # the same of the current one, where no noise has come between.
        self._embedded_next: tuple[Tensor, Tensor]
        self.embedded: tuple[Tensor, Tensor] | None = None

    # --- the logits ---------------------------------------------------------------------

    @property
    def y(self) -> Tensor | None:
        """The current logits [S * B, V / TP] where they are stored."""
        return self.stored.y

    @y.setter
    def y(self, y: Tensor) -> None:
        self.stored.y, self.stored.uniform, self.embedded = y, False, None

    def perturb(self, step: int) -> None:
        """Langevin noise before step `step`."""
        self.stored.perturb(step)

    @property
    def logits(self) -> Tensor:
        """The current logits [S, B, V / TP]."""
        return self.rows.positions(self.stored.whole().to(self.rows.dtype))

    @property
    def final(self) -> Tensor:
        """The logits at the end of thinking as they are stored, [S, B, V / TP], for the replay buffer."""
        return self.rows.positions(self.stored.whole() if self.end is None else self.end)

    # --- the start, where the context says it -----------------------------------------------

    def _embedded_by(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """softmax(y) table of this rank's columns [S * B, D], y's log-sum-exp over all, y at this rank's targets."""
        parts = [
            (*self.kernels.vocab_embed(y, table.detach(), self.valid), y.gather(1, self.target[t, None].clamp_min(0)))
            for t, y in self.stored.parts()
        ]
        x, own, at_target = (joined(t) for t in zip(*parts, strict=True))
        lse = self.group.log_sum_exp(own)
        return x * (own - lse).exp()[:, None], lse, torch.where(self.target >= 0, at_target[:, 0].to(lse.dtype), 0.0)

    def begin(self, hidden: Tensor) -> Tensor:
        """See `Prediction.begin`; p W is what the first step embeds, if no noise comes before it."""
        self.stored.begin(self.rows.flat(hidden))
        embedded, self.lse_initial, at_target = self._embedded_by(self.table)
        if self.thinking.langevin_noise == 0:
            self.embedded = embedded, self.lse_initial
        return self.rows.positions(self.lse_initial - self.group.sum(at_target))

    def begin_backward(self, weight: Tensor) -> Tensor:
        """See `Prediction.begin_backward`: lambda U, and (weight lambda)^T h to U's gradient."""
        assert self.output is not None and self.stored.hidden is not None
        hidden, output, weight = self.stored.hidden, self.output.detach(), weight.flatten().to(self.rows.dtype)
        embedded, lse, _ = self._embedded_by(output)
        weighted, zeros, ones = weight[:, None] * hidden, torch.zeros_like(lse), torch.ones_like(lse)
        for t, y in self.stored.parts():  # a step of no size, from y to y
            self.kernels.vocab_backward(
                y,
                lse[t],
                output,
                self.valid,
                hidden[t],
                zeros[t],
                zeros[t],
                self.target[t],
                StepRule.MIRROR,
                lse[t],
                ones[t],
                zeros[t],
                None,
                weighted[t],
                gradient_buffer(self.output),
                y,
            )
        at_target = (self.target >= 0)[:, None] * output[self.target.clamp_min(0)]
        return self.rows.hidden(weight[:, None] * (embedded - at_target))

    # --- one step -----------------------------------------------------------------------

    def embed(self) -> Tensor:
        """Embed the current prediction: x = softmax(y) W, [S(/TP), B, D].

        There is no product where all logits are 0 (x is W's mean row), nor after a step along dE/dp without noise,
        whose `refine` had it.
        """
        if self.stored.uniform:
            rows = self.stored.rows.stop
            mean = self.table.detach()[: self.valid].sum(0, dtype=self.rows.dtype) / self.vocab_size
            x, self.lse = mean.expand(rows, -1), mean.new_full((rows,), math.log(self.vocab_size))
        elif self.embedded is not None:
            x, self.lse = self.embedded
        else:
            x, self.lse, _ = self._embedded_by(self.table)
        self.embedded = None
        self.x = self.rows.hidden(x)
        return self.x.to(self.table.dtype)

    def refine(self, energy_grad: Tensor, alpha: Tensor) -> Tensor:
        """Form the next prediction, without storing it.

        Args:
            energy_grad: G = dE/dx, [S(/TP), B, D].
            alpha: step size per position, [S, B].

        Returns:
            The cross-entropy of the next prediction per position, [S, B].
        """
        centre = self.group.from_hidden((self.x * energy_grad).sum(-1)).flatten()
        self.step = Step(self.lse, self.rows.flat(energy_grad), centre, alpha.flatten().to(self.rows.dtype))
        stats = RefineStats.join(
            [
                self.kernels.vocab_refine(
                    y,
                    s.lse,
                    self.table.detach(),
                    self.valid,
                    s.energy_grad,
                    s.centre,
                    s.alpha,
                    self.target[t],
                    self.rule,
                    self.stored.next,
                )
                for t, y, s in self.stored.parts_of(self.step)
            ]
        )
        self.lse_next = self.group.log_sum_exp(stats.lse_next)
        part = (stats.lse_next - self.lse_next).exp()
        embedded = stats.embedded * part[:, None]
        self._embedded_next = embedded, self.lse_next
        present = self.target >= 0
        at_target = torch.where(present, stats.p_target if self.rule.by_logits else 1.0, 0.0)
        # sum_v r_v lambda_v W_v, of this rank's columns, as `along` is before it is summed over ranks
        self._lambda_embedded = embedded - at_target[:, None] * self.table.detach()[self.target.clamp_min(0)]
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
        return self.rows.positions(loss)

    def slope(self) -> Tensor:
        """<dloss/dy', g> per position [S, B]: minus the loss's derivative by the step size."""
        return self.rows.positions(self._slope)

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
        rows = self.rows
        self._scale, self._scaled_mean = 1 / self._norm, self._mean / self._norm
        xt = (rows.hidden(self._lambda_embedded) - rows.own(self._mean) * self.x) / rows.own(self._norm)
        return xt.to(self.table.dtype), rows.positions(self._norm) * weight

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """Take gradients at the embedded value and tangent [S(/TP), B, D] to the embedding."""
        x_grad, xt_grad, table_grad = self.rows.flat(x_grad), self.rows.flat(xt_grad), gradient_buffer(self.table)
        uniform = self.stored.uniform
        if uniform:  # p^T x_grad has the same row for every token
            table_grad[: self.valid] += x_grad.sum(0) / self.vocab_size
        for t, y, s in self.stored.parts_of(self.step):
            self.kernels.vocab_backward(
                y,
                s.lse,
                self.table.detach(),
                self.valid,
                s.energy_grad,
                s.centre,
                s.alpha,
                self.target[t],
                self.rule,
                self.lse_next[t],
                self._scale[t],
                self._scaled_mean[t],
                None if uniform else x_grad[t],
                xt_grad[t],
                table_grad,
                self.stored.next,
            )
        # saves a pass over the vocabulary
        self.stored.moved = self.stored.next is None and not self.stored.regenerated

    def advance(self, keep: bool) -> None:
        """Replace the prediction by the next one; with `keep`, `begin_adjoint` can go back before this step."""
        if keep:
            self.history.append((self.step, self.lse_next))
        hands_on = self.thinking.langevin_noise == 0 and not self.rule.by_logits
        self.embedded = self._embedded_next if hands_on else None
        self.stored.advance(self.step)

    def begin_adjoint(self) -> LogitsAdjoint:
        """The way back through the steps."""
        return LogitsAdjoint(self)

    # --- for the judge ------------------------------------------------------------------------

    def plain(self) -> PlainText:
        """See `Prediction.plain`; call it before the first step."""
        noise = self.thinking.langevin_noise > 0
        shape = self.stored.rows.stop, len(self.table)
        return PlainText(
            self.table.new_zeros(shape) if self.output is not None else self.logits.flatten(0, 1),
            self.table,
            self.target,
            self.valid,
            self.rule,
            self.stored.stored,
            self.stored.add_langevin if noise else None,
            self.output,
        )


def most_likely(prediction: TextPrediction) -> Tensor:
    """The token that a prediction gives the highest probability; int64 [S, B], the same on every rank."""
    valid, stored, group = prediction.valid, prediction.stored, prediction.group
    parts = [y[:, :valid].max(1) for _, y in stored.parts()] if valid else []
    if parts:
        values, columns = joined([v for v, _ in parts]), joined([c for _, c in parts]) + stored.column_offset
    else:  # a rank that holds padding alone
        values = torch.full_like(prediction.target, -math.inf, dtype=prediction.rows.dtype)
        columns = prediction.target
    best = group.max(values)
    # Of ranks that have it, the one of the lowest token.
    token = -group.max(torch.where(values == best, -columns, torch.iinfo(torch.int64).min))
    return prediction.rows.positions(token)


class LogitsAdjoint:
    """The adjoint dL/dy on the way back through the steps of a micro-batch, a `PredictionAdjoint`.

    It is a full tensor [S * B, V / TP]. The predictions themselves are made anew from their seed and each step's
    [S * B, D] gradient, so memory does not grow with the number of steps.

    Args:
        prediction: after its last step.
    """

    def __init__(self, prediction: TextPrediction):
        self.prediction, self.stored = prediction, prediction.stored
        self.table, self.valid, self.rule = prediction.table, prediction.valid, prediction.rule
        self.kernels = prediction.kernels
        if prediction.thinking.replay.enabled:
            prediction.end = self.stored.whole().clone()
        self.value = torch.zeros(
            self.stored.rows.stop, self.table.shape[0], dtype=prediction.rows.dtype, device=self.table.device
        )

    def add_loss_gradient(self, step: int, weight: Tensor) -> None:
        """+= weight * dloss/dy at the prediction after step `step`; weight [S, B]."""
        if self.stored.perturbed > step + 1:  # `rewind` to the step after it has put noise on it
            self.stored.unperturb(step + 1)
        self._add_loss_gradient(self.prediction.history[step][1], weight)

    def _add_loss_gradient(self, lse: Tensor, weight: Tensor) -> None:
        weight = weight.flatten().to(self.prediction.rows.dtype)
        for t, y in self.stored.parts():
            self.kernels.vocab_adjoint(y, lse[t], self.prediction.target[t], weight[t], self.valid, self.value[t])

    def begin_backward(self, weight: Tensor) -> Tensor:
        """See `PredictionAdjoint.begin_backward`: adjoint U, and adjoint^T h to U's gradient."""
        output, hidden = self.prediction.output, self.stored.hidden
        assert output is not None and hidden is not None
        self.stored.unperturb(0)
        self._add_loss_gradient(self.prediction.lse_initial, weight)
        adjoint, rows = self.value[:, : self.valid], output.detach()[: self.valid]
        gradient = gradient_buffer(output)
        gradient[: self.valid] += (adjoint.mT @ hidden).to(gradient.dtype)
        return self.prediction.rows.hidden(adjoint @ rows.to(adjoint.dtype))

    def rewind(self, step: int) -> None:
        """Return to the prediction as it was before step `step`, with that step's noise."""
        history = self.prediction.history
        self.stored.rewind([s for s, _ in history[:step]])
        self.prediction.step, self.prediction.embedded = history[step][0], None

    def slope(self) -> Tensor:
        """<adjoint, g> of the rewound step, [S, B]."""
        parts = [
            self.kernels.vocab_dot_step(
                y, s.lse, self.table.detach(), self.valid, s.energy_grad, s.centre, self.rule, self.value[t]
            )
            for t, y, s in self.stored.parts_of(self.prediction.step)
        ]
        sums = torch.stack([joined(part) for part in zip(*parts, strict=True)])
        slope, self._mean = self.prediction.group.sum(sums)
        return self.prediction.rows.positions(slope)

    def tangent(self) -> tuple[Tensor, Tensor]:
        """Do what `Prediction.tangent` does, along the adjoint; call after `rewind`, `slope` and `embed`."""
        prediction, rows = self.prediction, self.prediction.rows
        parts = [
            self.kernels.vocab_tangent(y, prediction.lse[t], self.table.detach(), self.valid, self.rule, self.value[t])
            for t, y in self.stored.parts()
        ]
        norm2, embedded = (joined(part) for part in zip(*parts, strict=True))
        norm = prediction.group.sum(norm2).sqrt().clamp_min(1e-30)
        self._scale, self._scaled_mean = 1 / norm, self._mean / norm
        xt = rows.hidden(embedded)
        if self.rule.by_logits:
            xt = xt - rows.own(self._mean) * prediction.x
        self.xt = xt / rows.own(norm)
        return self.xt.to(self.table.dtype), rows.positions(norm)

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """Do what `Prediction.backward` does, without advancing; the adjoint becomes that before the step."""
        prediction = self.prediction
        x, xt, x_grad, xt_grad = (prediction.rows.flat(h) for h in (prediction.x, self.xt, x_grad, xt_grad))
        for t, y in self.stored.parts():
            self.kernels.vocab_dense_backward(
                y,
                prediction.lse[t],
                self.table.detach(),
                self.valid,
                self.rule,
                self.value[t],
                self._scale[t],
                self._scaled_mean[t],
                x[t],
                xt[t],
                x_grad[t],
                xt_grad[t],
                gradient_buffer(self.table),
            )

    def past(self) -> None:
        """Do what `backward` does for a step whose energy gradient is a constant."""
        if self.rule.from_probabilities:
            for t, y in self.stored.parts():
                lse = self.prediction.step.lse[t]
                self.kernels.vocab_to_logits(y, lse, self.valid, self._mean[t], self.value[t])
