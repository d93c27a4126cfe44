"""Text's predictions at inference: rows of logits, each at a position of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.kernels import Kernels, StepRule
from ebt_megatron.kernels.interface import compute_dtype
from ebt_megatron.kernels.noise import keys_of
from ebt_megatron.parallel.collectives import TensorGroup


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A product with a part of the table, in the precision of a; on a GPU a narrow table is not widened for it."""
    if a.dtype == b.dtype or not a.is_cuda:
        return a @ b.to(a.dtype)
    return torch.mm(a.to(b.dtype), b, out_dtype=a.dtype)


class LogitsState:
    """R distributions over the vocabulary, held as logits y [R, V / TP]; a `State`.

    The notation is that of `ebt_megatron.prediction.logits`, whose predictions these are, noise included. Rows are few
    here, so that a step is a product with the whole table and no tiles of it.

    Args:
        kernels: how the hot operations run.
        table: this rank's rows of the prediction embedding W, [V / TP, D].
        vocab_size: tokens; the rest of V is padding.
        group: the tensor-parallel group.
        sample_ids, positions: int64 [R], which fix the noise.
        thinking: where predictions start and how they step.
        seed: of the noise.
        y: the logits; None: where the recipe starts.
    """

    def __init__(
        self,
        kernels: Kernels,
        table: Tensor,
        vocab_size: int,
        group: TensorGroup,
        sample_ids: Tensor,
        positions: Tensor,
        thinking: ThinkingConfig,
        seed: int,
        y: Tensor | None = None,
    ):
        self.kernels, self.table, self.vocab_size, self.group = kernels, table.detach(), vocab_size, group
        self.sample_ids, self.positions = sample_ids.to(table.device), positions.to(table.device)
        self.thinking, self.seed, self.rule = thinking, seed, StepRule(thinking.step_rule)
        columns = table.shape[0]
        self.offset = columns * group.rank
        self.valid = min(max(vocab_size - self.offset, 0), columns)
        if y is None:
            wide = torch.promote_types(table.dtype, torch.float32)
            stored = torch.bfloat16 if thinking.logits_dtype == "bfloat16" else wide
            y = torch.zeros(len(sample_ids), columns, dtype=stored, device=table.device)
            if thinking.starts_at_noise:
                self._add_noise(y, 0, thinking.initial_std)
        self.y = y
        self._p = self._x = torch.empty(0)  # of what `embed` returned last

    def _with(self, sample_ids: Tensor, positions: Tensor, y: Tensor) -> Self:
        kept = self.kernels, self.table, self.vocab_size, self.group
        return type(self)(*kept, sample_ids, positions, self.thinking, self.seed, y)

    def _add_noise(self, y: Tensor, stream: int, std: float) -> None:
        self.kernels.add_noise_(y, keys_of(self.sample_ids, self.positions, stream), self.offset, std, self.seed)

    def begin(self, hidden: Tensor, output: Tensor) -> None:
        """Start at the logits that an output [V / TP, D] makes of the context's hidden states [R, D]."""
        wide = hidden.to(compute_dtype(self.y, self.table))
        self.y[:, : self.valid] = _product(wide, output.detach()[: self.valid].mT).to(self.y.dtype)

    def perturb(self, step: int, std: float) -> None:
        """See `State`."""
        self._add_noise(self.y, 1 + step, std)

    def embed(self) -> Tensor:
        """See `State`."""
        y = self.y[:, : self.valid].to(compute_dtype(self.y, self.table))
        top = y.amax(1) if self.valid else y.new_full((len(y),), -torch.inf)
        p = y.sub(self.group.max(top)[:, None]).exp_()
        self._p = p.div_(self.group.sum(p.sum(1))[:, None])
        self._x = self.group.sum(_product(self._p, self.table[: self.valid]))
        return self._x.to(self.table.dtype)[:, None]

    def step(self, energy_grad: Tensor, alpha: float) -> None:
        """See `State`."""
        gradient = energy_grad[:, 0].to(self._x.dtype)
        g = _product(gradient, self.table[: self.valid].mT)
        if self.rule.by_logits:
            g = g.sub_((self._x * gradient).sum(1, keepdim=True)).mul_(self._p)
        y = self.y[:, : self.valid]
        y.copy_(torch.add(self._p if self.rule.from_probabilities else y, g, alpha=-alpha))

    def _log_p(self) -> Tensor:
        """Log-probabilities of this rank's columns [R, V / TP]; -inf for padding."""
        y = self.y.to(compute_dtype(self.y, self.table))
        y = torch.cat([y[:, : self.valid], torch.full_like(y[:, self.valid :], -torch.inf)], 1)
        return y - self.group.log_sum_exp(y.logsumexp(1))[:, None]

    def log_probabilities(self) -> Tensor:
        """Return them for the whole vocabulary, [R, V], on every tensor-parallel rank."""
        return self.group.columns(self._log_p())[:, : self.vocab_size]

    def distance(self, other: Self) -> Tensor:
        """Total variation: half the sum of the probabilities' differences, from 0 to 1."""
        return self.group.sum((self._log_p().exp() - other._log_p().exp()).abs().sum(1)) / 2

    def confidence(self) -> Tensor:
        """See `State`."""
        return self.group.max(self._log_p().amax(1)).exp()

    def take(self, rows: Tensor) -> Self:
        """See `State`; what was embedded may take its step."""
        rows = rows.to(self.y.device)
        taken = self._with(self.sample_ids[rows], self.positions[rows], self.y[rows])
        if len(self._x):
            taken._p, taken._x = self._p[rows], self._x[rows]
        return taken

    def where(self, keep: Tensor, other: Self) -> Self:
        """See `State`."""
        return self._with(self.sample_ids, self.positions, torch.where(keep[:, None], self.y, other.y))

    def join(self, others: Sequence[Self]) -> Self:
        """See `State`."""
        every = [self, *others]
        return self._with(*(torch.cat(t) for t in zip(*((s.sample_ids, s.positions, s.y) for s in every), strict=True)))

    def mixed(self, weights: Tensor) -> Self:
        """See `State`; what comes of it are log-probabilities."""
        parts = self._log_p().unflatten(0, weights.shape) + weights.log()[..., None]
        y = parts.logsumexp(0)
        y[:, self.valid :] = 0
        rows = weights.shape[1]
        return self._with(self.sample_ids[:rows], self.positions[:rows], y.to(self.y.dtype))
