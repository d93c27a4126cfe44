"""Logits of a micro-batch of predictions, and how they are held: kept, kept in bf16, or made anew for every pass.

The logits y [S * B, V / TP] are the only tensor of vocabulary width. They are a function of the seed and of the steps
taken, each known by its [S * B, D] gradient: so they can be made again, whole or some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.kernels import Kernels, StepRule


@dataclass
class Step:
    """What a step's gradient is made of: enough to form y' from y again."""

    lse: Tensor  # [T] log-sum-exp of y over the whole vocabulary
    energy_grad: Tensor  # G [T, D]
    centre: Tensor  # <x, G> [T]
    alpha: Tensor  # [T]

    def of(self, rows: slice) -> Step:
        """Return the step of some rows."""
        return Step(self.lse[rows], self.energy_grad[rows], self.centre[rows], self.alpha[rows])


class StoredLogits:
    """This rank's columns of the logits, where thinking has brought them.

    Args:
        kernels: how the hot operations run.
        table: this rank's rows of the prediction embedding W, [V / TP, D].
        valid: how many of them are tokens; the rest is padding.
        column_offset: the first one's token.
        shape: S, B.
        sample_ids: int64 [B] global sample indices, which fix the noise.
        thinking: noise, step rule and storage.
        seed: the run's.
        start: [S, B, V / TP] initial logits instead of noise where not NaN.
        output: this rank's rows of the output U on the context stream, [V / TP, D], which says where logits start;
            there are none before `begin`.

    Attributes:
        uniform: whether every prediction is the uniform distribution, all of its logits 0.
        y: the logits [S * B, V / TP], None where they are made anew; while `uniform` one row for all, not to be
            written.
        next: where y' is kept until it becomes y (`thinking.reuse`, and while `uniform`), else None.
        moved: whether y' has been written over y.
    """

    def __init__(
        self,
        kernels: Kernels,
        table: nn.Parameter,
        valid: int,
        column_offset: int,
        shape: tuple[int, int],
        sample_ids: Tensor,
        thinking: ThinkingConfig,
        seed: int,
        start: Tensor | None,
        output: Tensor | None = None,
    ):
        self.kernels, self.table, self.valid, self.column_offset = kernels, table, valid, column_offset
        self.length, self.thinking, self.seed, self.start, self.output = shape[0], thinking, seed, start, output
        self.sample_ids = sample_ids.to(table.device)
        self.dtype = torch.promote_types(table.dtype, torch.float32)
        self.stored = torch.bfloat16 if thinking.logits_dtype == "bfloat16" else self.dtype
        self.rule = StepRule(thinking.step_rule)
        self.rows = slice(0, shape[0] * shape[1])
        # What the current logits are made of: the steps to them, and how many had Langevin noise before them.
        self.steps: list[Step] = []
        self.perturbed = 0
        self.regenerated = thinking.regenerate > 0
        self._starts_uniform = start is None and not thinking.noisy and output is None
        self.uniform = self._starts_uniform
        self.hidden: Tensor | None = None  # of the context, [T, D], from `begin`
        self.y = self._first() if output is None else None
        self.next: Tensor | None
        self.next = self._place() if self.y is not None and (thinking.reuse or self.uniform) else None
        self.moved = False

    def begin(self, hidden: Tensor) -> None:
        """Start at the logits U h of the context's hidden states h [T, D]."""
        self.hidden = hidden
        self.y = self._first()
        self.next = self._place() if self.y is not None and self.thinking.reuse else None

    def _first(self) -> Tensor | None:
        """The logits before any step, as they are stored."""
        if self.regenerated:
            return None
        if self.uniform:
            row = torch.zeros(1, self.table.shape[0], dtype=self.stored, device=self.table.device)
            return row.expand(self.rows.stop, -1)
        return self._make(self.rows)

    def _place(self) -> Tensor:
        """Memory for logits."""
        shape = self.rows.stop, self.table.shape[0]
        place = torch.empty(shape, dtype=self.stored, device=self.table.device)
        place[:, self.valid :] = 0
        return place

    def _make(self, rows: slice, buffer: Tensor | None = None) -> Tensor:
        """The logits from the seed and the steps taken, [rows, V / TP]; into a buffer if given."""
        shape = rows.stop - rows.start, self.table.shape[0]
        if buffer is None:
            y = torch.zeros(shape, dtype=self.stored, device=self.table.device)
        else:
            y = buffer[: shape[0]].zero_()
        if self.hidden is not None:  # a step from 0 along -h U^T
            assert self.output is not None
            h = self.hidden[rows]
            zeros = h.new_zeros(len(h))
            self.kernels.vocab_update(y, zeros, self.output, self.valid, h, zeros, zeros - 1, StepRule.MIRROR)
        if self.thinking.starts_at_noise:
            self._add_noise(y, stream=0, std=self.thinking.initial_std, rows=rows)
        if self.start is not None:
            start = self.start.flatten(0, 1)[rows].to(y)
            y = torch.where(start.isnan(), y, start)
        for i in range(max(self.perturbed, len(self.steps))):
            if i < self.perturbed:
                self.add_langevin(y, i, rows)
            if i < len(self.steps):
                self._update(y, self.steps[i].of(rows))
        return y

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits: all, where they are stored, else some at a time, each in the same memory."""
        if self.y is not None:
            yield self.rows, self.y
            return
        size = min(self.thinking.regenerate, self.rows.stop)
        buffer: Tensor | None = None
        for begin in range(0, self.rows.stop, size):
            rows = slice(begin, min(begin + size, self.rows.stop))
            y = self._make(rows, buffer)
            buffer = y if buffer is None else buffer
            yield rows, y

    def parts_of(self, step: Step) -> Iterator[tuple[slice, Tensor, Step]]:
        """Yield the same parts as `parts`, with what a step from them is made of."""
        for rows, y in self.parts():
            yield rows, y, step.of(rows)

    def whole(self) -> Tensor:
        """All logits, as they are stored."""
        return self._make(self.rows) if self.y is None else self.y

    def _add_noise(self, y: Tensor, stream: int, std: float, rows: slice) -> None:
        positions = torch.arange(self.length, device=y.device)
        keys = self.kernels.row_keys(self.sample_ids, positions, stream)[rows]
        self.kernels.add_noise_(y, keys, self.column_offset, std, self.seed)

    def add_langevin(self, y: Tensor, step: int, rows: slice | None = None) -> None:
        """Add the Langevin noise of step `step` to logits y of all rows, or of some, in place."""
        if self.thinking.langevin_noise > 0:
            self._add_noise(y, 1 + step, self.thinking.langevin_noise, rows or self.rows)

    def perturb(self, step: int) -> None:
        """Add the noise before step `step`."""
        self.perturbed = step + 1
        if self.y is not None:
            self.add_langevin(self.y, step)

    def unperturb(self, step: int) -> None:
        """Take the noise before step `step` off again."""
        self.perturbed = step
        if self.y is None or self.thinking.langevin_noise == 0:
            return
        if self.stored == self.dtype:
            self._add_noise(self.y, 1 + step, -self.thinking.langevin_noise, self.rows)
        else:  # what was rounded does not come back by subtraction
            self.y = self._make(self.rows)

    def advance(self, step: Step) -> None:
        """Make the logits those after `step`."""
        if self.y is None:
            self.steps.append(step)
        elif self.next is not None:
            kept, self.y = self.y, self.next
            self.next = (self._place() if self.uniform else kept) if self.thinking.reuse else None
        elif not self.moved:
            self._update(self.y, step)
        self.moved = self.uniform = False

    def rewind(self, steps: list[Step]) -> None:
        """Make the logits those after `steps`, with the noise before the step that follows."""
        self.steps, self.perturbed = steps, len(steps) + 1
        self.uniform = self._starts_uniform and not steps
        if self.y is not None:
            self.y = self._first() if self.uniform else self._make(self.rows)

    def _update(self, y: Tensor, s: Step) -> None:
        self.kernels.vocab_update(
            y, s.lse, self.table.detach(), self.valid, s.energy_grad, s.centre, s.alpha, self.rule
        )
