"""Thinking with the model split over pipeline stages.

The prediction, its update and the loss live on the first stage, the energy head on the
last; keys and values of the context stay on the stage of their layers. Each stage executes
its tasks in the order `ebt_megatron.parallel.schedule.simulate` gives, the same on every
rank, so receives are posted in the order in which the sender sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.schedule import FORWARD, Schedule, Task, chain, simulate
from ebt_megatron.thinking.dual_stream import ContextPass, Descent, Thought, frozen
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.prediction import EnergyModel

_groups: dict[str, dist.ProcessGroup] = {}


def direction_groups() -> dict[str, dist.ProcessGroup]:
    """A pipeline group for messages down the stages and one for messages up.

    Two, because NCCL runs a communicator's messages in the order they were posted on each
    side: opposite directions on one communicator could wait for each other. All ranks must
    call this together the first time.
    """
    if not _groups:
        own = parallel_state.get_pipeline_model_parallel_group()
        members: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(members, dist.get_process_group_ranks(own))
        for ranks in sorted({tuple(m) for m in members}):
            for direction in ("down", "up"):
                group = dist.new_group(list(ranks))
                if dist.get_rank() in ranks:
                    _groups[direction] = group
    return _groups


@dataclass(frozen=True)
class Message:
    """What a task sends, and where: `part` is "hidden" or "weight"."""

    task: Task
    part: str
    destination: int


def messages_of(task: Task, stages: int) -> list[Message]:
    """What the stage that ran `task` sends, in order."""
    last = stages - 1
    out = []
    if task.kind in FORWARD:
        if task.kind == "learn_forward" and task.stage == 0 and last > 0:
            # The weight of each energy's tangent is known where the loss is, and used where the energy is.
            out.append(Message(task, "weight", last))
        if task.stage < last:
            out.append(Message(task, "hidden", task.stage + 1))
    elif task.stage > 0:
        out.append(Message(task, "hidden", task.stage - 1))
    return out


class Mail:
    """Point-to-point messages of one optimizer step, in the order the schedule fixes."""

    def __init__(self, schedule: Schedule, stage: int, shape_of: Callable[[Message], tuple[tuple, torch.dtype]]):
        self.stage, self.shape_of = stage, shape_of
        stages = len(schedule.order)
        self.ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        self.inbound = {
            source: [m for t in schedule.order[source] for m in messages_of(t, stages) if m.destination == stage]
            for source in range(stages) if source != stage
        }  # fmt: skip
        self.received: dict[Message, Tensor] = {}
        self.sending: list[tuple[Any, Tensor]] = []

    def _group(self, source: int, destination: int) -> dist.ProcessGroup:
        return direction_groups()["down" if destination > source else "up"]

    def send(self, message: Message, tensor: Tensor) -> None:
        """Start sending; the tensor is kept until it has left."""
        self.sending = [(work, kept) for work, kept in self.sending if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        group = self._group(self.stage, message.destination)
        work = dist.isend(tensor, self.ranks[message.destination], group=group)
        self.sending.append((work, tensor))

    def receive(self, source: int, task: Task, part: str, device: torch.device) -> Tensor:
        """Wait for a message; earlier ones of the same sender are put by."""
        wanted = Message(task, part, self.stage)
        while wanted not in self.received:
            message = self.inbound[source].pop(0)
            shape, dtype = self.shape_of(message)
            buffer = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(buffer, self.ranks[source], group=self._group(source, self.stage))
            self.received[message] = buffer
        return self.received.pop(wanted)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()


@dataclass
class StageBatch:
    """One micro-batch on one stage.

    Attributes:
        size: B, samples in it.
        embed_context: first stage: returns the embedded context [S(/TP), B, D], inside autograd.
        descent: first stage: the prediction's side.
        segments: int32 [B, S] documents, or None.
    """

    size: int
    embed_context: Callable[[], Tensor] | None
    descent: Descent | None
    segments: Tensor | None
    energies: list[Tensor] = field(default_factory=list)
    # what each forward pass leaves for its backward pass: (input, output)
    passes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    context: tuple[Tensor, ContextPass] | None = None  # and its input
    weight: Tensor | None = None


class Pipeline:
    """Runs the micro-batches of one optimizer step through this stage.

    Args:
        model: this stage of the energy.
        length: S.
        plan: what to think and learn.
        micro_batches: of this rank.
        in_flight: bound on live contexts; None: all micro-batches.
        phase: a context manager told what is being done, for timing.
    """

    def __init__(
        self,
        model: EnergyModel,
        length: int,
        plan: Plan,
        micro_batches: list[StageBatch],
        in_flight: int | None,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.model, self.length, self.plan, self.phase = model, length, plan, phase
        self.micro_batches = micro_batches
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.group = TensorGroup(bool(model.config.sequence_parallel))
        self.device = next(model.parameters()).device
        self.schedule = simulate(
            self.stages, len(micro_batches), chain(plan, model.context_sees_step), in_flight=in_flight
        )
        self.mail = Mail(self.schedule, self.stage, self._shape)
        self.events: list[tuple[Task, float, float]] = []  # what ran when, for checking the planner

    @property
    def first(self) -> bool:
        """Whether this stage holds predictions."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this stage holds the energy head."""
        return self.stage == self.stages - 1

    def _shape(self, message: Message) -> tuple[tuple, torch.dtype]:
        samples = self.micro_batches[message.task.micro_batch].size
        if message.part == "weight":
            return (self.length, samples), torch.promote_types(self.model.config.params_dtype, torch.float32)
        length = self.length + self.model.step_tokens
        local = length // self.group.size if self.group.sequence_parallel else length
        streams = 2 if message.task.kind.startswith("learn") else 1
        return (local, streams * samples, self.model.config.hidden_size), self.model.config.params_dtype

    def run(self) -> list[Thought]:
        """Execute the schedule; thoughts are complete on the first stage (losses) and last (energies)."""
        direction_groups()
        for task in self.schedule.order[self.stage]:
            begin = time.perf_counter()
            with self.phase(task.kind.split("_")[0]):
                getattr(self, "_" + task.kind)(task, self.micro_batches[task.micro_batch])
            self.events.append((task, begin, time.perf_counter()))
        self.mail.finish()
        for micro_batch in self.micro_batches:
            if micro_batch.descent is not None:
                micro_batch.descent.finish()
        return [self._thought(m) for m in self.micro_batches]

    def _thought(self, batch: StageBatch) -> Thought:
        shape = (self.plan.steps, self.length, batch.size)
        zeros = torch.zeros(shape, device=self.device)
        losses = torch.stack(batch.descent.losses) if batch.descent is not None else zeros
        return Thought(losses, torch.stack(batch.energies) if self.last else zeros)

    def _previous(self, task: Task) -> Tensor:
        source = self.stage - 1 if task.kind in FORWARD else self.stage + 1
        sent = Task(task.micro_batch, task.index, task.kind, task.step, source)
        with self.phase("communication"):
            return self.mail.receive(source, sent, "hidden", self.device)

    def _send(self, task: Task, tensor: Tensor) -> None:
        for message in messages_of(task, self.stages):
            if message.part == "hidden":
                self.mail.send(message, tensor)

    # --- the tasks ----------------------------------------------------------------------

    def _context_forward(self, task: Task, batch: StageBatch) -> None:
        learn = bool(self.plan.learned)
        if self.first:
            assert batch.embed_context is not None
            with torch.set_grad_enabled(learn):
                h = batch.embed_context()
        else:
            h = self._previous(task).requires_grad_()
        batch.context = h, ContextPass(self.model, h, self.length, batch.segments, task.step, learn)
        if not self.last:
            self._send(task, batch.context[1].out)

    def _context_backward(self, task: Task, batch: StageBatch) -> None:
        assert batch.context is not None
        h, context = batch.context
        context.backward(None if self.last else self._previous(task))
        if not self.first:
            assert h.grad is not None
            self._send(task, h.grad)
        batch.context = None

    def _forward(self, task: Task, batch: StageBatch, x: Tensor, tangent: bool) -> None:
        assert batch.context is not None
        x = x.detach().requires_grad_()
        key_values = batch.context[1].key_values(constant=not tangent)
        out = self.model.predict(x, key_values, self.length, batch.segments, task.step, tangent)
        batch.passes[task.kind.split("_")[0]] = (x, out)
        if not self.last:
            self._send(task, out)

    def _propose_forward(self, task: Task, batch: StageBatch) -> None:
        with frozen(self.model), torch.enable_grad():
            x = batch.descent.propose_input(task.step) if batch.descent is not None else self._previous(task)
            self._forward(task, batch, x, tangent=False)

    def _propose_backward(self, task: Task, batch: StageBatch) -> None:
        x, out = batch.passes.pop("propose")
        if self.last:
            batch.energies.append(self.group.from_hidden(out.detach()))
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))  # of its sum; also where none is recorded
        else:
            (grad,) = torch.autograd.grad(out, x, self._previous(task))
        if batch.descent is not None:
            batch.descent.propose_output(task.step, grad)
        else:
            self._send(task, grad)

    def _learn_forward(self, task: Task, batch: StageBatch) -> None:
        if batch.descent is not None:
            streams, batch.weight = batch.descent.learn_input(task.step)
            if not self.last:
                weight = next(w for w in messages_of(task, self.stages) if w.part == "weight")
                self.mail.send(weight, batch.weight.to(self._shape(weight)[1]))
        else:
            streams = self._previous(task)
        with torch.enable_grad():
            self._forward(task, batch, streams, tangent=True)

    def _learn_backward(self, task: Task, batch: StageBatch) -> None:
        streams, out = batch.passes.pop("learn")
        if self.last:
            weight = batch.weight
            if not self.first:
                sent = Task(task.micro_batch, task.index - 1, "learn_forward", task.step, 0)
                weight = self.mail.receive(0, sent, "weight", self.device)
            assert weight is not None
            (out * self.group.own_positions(weight).to(out.dtype)).sum().backward()
        else:
            torch.autograd.backward(out, self._previous(task))
        assert streams.grad is not None
        if batch.descent is not None:
            batch.descent.learn_output(task.step, streams.grad)
        else:
            self._send(task, streams.grad)
