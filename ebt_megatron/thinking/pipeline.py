"""Thinking with the model split over pipeline stages.

What each pass does is `ebt_megatron.thinking.dual_stream.Thinker`'s; here is when, and what goes
from stage to stage. Keys and values of the context stay on the stage of their layers. Each stage runs
its passes in the order `ebt_megatron.thinking.schedule.simulate` gives, the same on every
rank, so receives are posted in the order in which the sender sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.prediction.interface import EnergyModel
from ebt_megatron.thinking.dual_stream import Thinker
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.schedule import FORWARD, Schedule, StagePass, simulate

_groups: dict[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = {}  # by the pipeline group that they are of


def direction_groups() -> dict[str, dist.ProcessGroup]:
    """A pipeline group for messages down the stages and one for messages up.

    Two, because NCCL runs a communicator's messages in the order they were posted on each
    side: opposite directions on one communicator could wait for each other. All ranks must
    call this together the first time.
    """
    own = parallel_state.get_pipeline_model_parallel_group()
    if own not in _groups:
        _groups.clear()  # of a world that is gone
        made: dict[str, dist.ProcessGroup] = {}
        members: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(members, dist.get_process_group_ranks(own))
        for ranks in sorted({tuple(m) for m in members}):
            for direction in ("down", "up"):
                group = dist.new_group(list(ranks))
                if dist.get_rank() in ranks:
                    made[direction] = group
        _groups[own] = made
    return _groups[own]


@dataclass(frozen=True)
class Message:
    """What a pass sends, and where: `part` is "hidden" or "weight"."""

    work: StagePass
    part: str
    destination: int


class Mail:
    """Point-to-point messages of one optimizer step, in the order the schedule fixes."""

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        sent_by: Callable[[StagePass], list[Message]],
        shape_of: Callable[[Message], tuple[tuple, torch.dtype]],
    ):
        self.stage, self.shape_of = stage, shape_of
        self.ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        self.inbound = {
            source: [message for work in order for message in sent_by(work) if message.destination == stage]
            for source, order in enumerate(schedule.order)
            if source != stage
        }
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

    def receive(self, wanted: Message, source: int, device: torch.device) -> Tensor:
        """Wait for a message; earlier ones of the same sender are put by."""
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


class Pipeline:
    """Runs the micro-batches of one optimizer step through this stage.

    A micro-batch is made for its first pass here and handed over after its last: what it holds (its prediction's
    logits, say) is held for as many micro-batches as are in flight, not for all.

    Args:
        model: this stage of the energy.
        plan: what to think and learn.
        sizes: samples in each micro-batch of this rank.
        length: positions of a sample.
        begin: makes the micro-batch of an index.
        end: is given each micro-batch's index and itself when its passes here are done.
        in_flight: as in `simulate`.
        reuse: whether learn passes take tensors from propose passes, as each `Thinker` is told.
        phase: a context manager told what is being done, for timing.
    """

    def __init__(
        self,
        model: EnergyModel,
        plan: Plan,
        sizes: Sequence[int],
        length: int,
        begin: Callable[[int], Thinker],
        end: Callable[[int, Thinker], None],
        in_flight: int | None,
        reuse: bool,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.model, self.plan, self.phase, self.begin, self.end = model, plan, phase, begin, end
        self.sizes, self.length = sizes, length
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.group, self.device = TensorGroup(bool(model.config.sequence_parallel)), next(model.parameters()).device
        self.schedule = simulate(self.stages, len(sizes), plan.sweeps(model.context_sees_step), in_flight=in_flight)
        # The weight of each energy's tangent is known where the loss is, and used where the energy is, and by tapes.
        self._to_weigh = range(1, self.stages) if reuse and plan.learned else range(self.stages - 1, self.stages)
        self.mail = Mail(self.schedule, self.stage, self._sent_by, self._shape)
        self.events: list[tuple[StagePass, float, float]] = []  # what ran when, for checking the planner

    def _shape(self, message: Message) -> tuple[tuple, torch.dtype]:
        size = self.sizes[message.work.micro_batch]
        if message.part == "weight":
            return (self.length, size), torch.promote_types(self.model.config.params_dtype, torch.float32)
        length = self.length + self.model.step_tokens
        local = length // self.group.size if self.group.sequence_parallel else length
        if message.work.kind.startswith("context") and self.model.context_rows is not None:
            local = self.model.context_rows
        streams = 2 if message.work.kind.startswith("learn") else 1
        return (local, streams * size, self.model.config.hidden_size), self.model.config.params_dtype

    def _sent_by(self, work: StagePass) -> list[Message]:
        """What the stage that did `work` sends, in order."""
        out = []
        if work.kind == "learn_forward" and work.stage == 0:
            out += [Message(work, "weight", stage) for stage in self._to_weigh if stage]
        last = self.stages - 1
        if work.kind == "initial_backward":
            out.append(Message(work, "hidden", last))
        elif work.kind == "context_forward" and work.stage == last and self.plan.initial_weight is not None:
            out.append(Message(work, "hidden", 0))
        elif work.kind != "initial_forward":
            neighbour = work.stage + (1 if work.kind in FORWARD else -1)
            if 0 <= neighbour <= last:
                out.append(Message(work, "hidden", neighbour))
        return out

    def _taken_by(self, work: StagePass) -> Message | None:
        """The hidden states, or the gradient, that `work` begins with, where another stage sends them.

        Where thinking starts at the context's prediction, what its stream ended with goes from the last stage to the
        first, and the gradient back.
        """
        last = self.stages - 1
        if work.kind == "initial_forward":
            origin = replace(work, index=work.index - 1, kind="context_forward", stage=last)
        elif work.kind == "context_backward" and work.stage == last and self.plan.initial_weight is not None:
            origin = replace(work, index=work.index - 1, kind="initial_backward", stage=0)
        else:
            origin = replace(work, stage=work.stage - (1 if work.kind in FORWARD else -1))
        taken = work.kind != "initial_backward" and 0 <= origin.stage <= last
        return Message(origin, "hidden", self.stage) if taken else None

    def run(self) -> None:
        """Execute the schedule."""
        direction_groups()
        order = self.schedule.order[self.stage]
        last = {work.micro_batch: work for work in order}
        live: dict[int, Thinker] = {}
        for work in order:
            index, begin = work.micro_batch, time.perf_counter()
            if index not in live:
                live[index] = self.begin(index)
            with self.phase(work.kind.partition("_")[0]):
                self._run(work, live[index])
            if work is last[index]:
                self.end(index, live.pop(index))
            self.events.append((work, begin, time.perf_counter()))
        self.mail.finish()

    def _receive(self, message: Message) -> Tensor:
        with self.phase("communication"):
            return self.mail.receive(message, message.work.stage, self.device)

    def _run(self, work: StagePass, batch: Thinker) -> None:
        given: list[Tensor] = []
        taken = self._taken_by(work)
        if taken is not None:
            given.append(self._receive(taken))
            if work.kind == "learn_forward" and self.stage in self._to_weigh:
                given.append(self._receive(Message(replace(work, stage=0), "weight", self.stage)))
        out = getattr(batch, work.kind)(work.step, *given)
        for message in self._sent_by(work):
            if message.part == "weight":
                assert batch.weight is not None
                self.mail.send(message, batch.weight.to(self._shape(message)[1]))
            else:
                self.mail.send(message, out)
