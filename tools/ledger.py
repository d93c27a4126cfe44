"""What a rank holds, computes and sends in a training step, written down operation by operation.

A `Ledger` stands at torch's dispatcher and sees every operation, of real tensors and of fake ones alike. So the same
ledger measures a step that runs, and says what one would take that does not fit this machine.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PARTS = (
    "weights",
    "gradients",
    "optimizer state",
    "context activations",
    "prediction and tangent activations",
    "logits",
    "communication buffers",
    "other",
)
# What is made in a phase (`ebt_megatron.core.timing.Timers`) and is not said to be something else.
_MADE_IN = {
    "context": "context activations",
    "initial": "context activations",
    "propose": "prediction and tangent activations",
    "learn": "prediction and tangent activations",
    "communication": "communication buffers",
    "optimizer": "optimizer state",
}
_RECEIVING = {"_allgather_base_", "allgather_", "recv_"}  # whose first argument is what was sent
_aten = torch.ops.aten
# Neither read nor write what they are given or return.
_IDLE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.detach, _aten._local_scalar_dense}
_LOOKUPS = {_aten.embedding, _aten.index_select, _aten.gather}  # which read as much of a table as they return


@dataclass
class Traffic:
    """Messages of one kind.

    Attributes:
        calls: how many.
        size: bytes of all of them: of what is sent or received, or, of a collective, of the whole that the group
            makes together (a gathered tensor, one that is reduced).
    """

    calls: int = 0
    size: int = 0


@dataclass
class Account:
    """What a `Ledger` found.

    Attributes:
        peak: bytes held at the moment when most were, by part.
        phase_peaks: the most bytes held at once in each phase.
        flops: of each phase's matrix products and attention.
        work: how many operations of each (phase, FLOPs, bytes read and written), without views of what is there.
        collectives: by operation and by what differs between the ranks of its group ("tensor", "data").
        messages: from stage to stage, by ("send" or "receive", the other one's rank).
    """

    peak: dict[str, int] = field(default_factory=dict)
    phase_peaks: dict[str, int] = field(default_factory=dict)
    flops: Counter[str] = field(default_factory=Counter)
    work: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    collectives: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    messages: dict[tuple[str, int], Traffic] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most bytes held at once."""
        return sum(self.peak.values())


def _product(_: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> int:
    """Of a product that is added in place."""
    return 2 * a.numel() * b.shape[-1]


def _attention(query: int, causal: int, products: int) -> Callable[..., int]:
    """Of torch's attention on a CPU: so many products as large as the scores, or as half of them where it is causal.

    Args:
        query, causal: which arguments the queries [B, N, S, H] are, before the keys, and whether it is causal.
        products: 2 forward; 5 backward, which takes the scores again.
    """

    def formula(*args: Any, **kwargs: Any) -> int:
        q, k = args[query : query + 2]
        scores = 2 * q.numel() * k.shape[-2]
        return products * scores // (2 if len(args) > causal and args[causal] else 1)

    return formula


# What torch's own counter has no formula for.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.addmm_: _product,
    _aten.baddbmm_: _product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention(0, 4, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(1, 7, 5),
}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in what an operation takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


class Ledger(TorchDispatchMode):
    """Writes down what operations allocate, compute and send.

    Memory is that of storages that are alive, without what a device's allocator adds, and what libraries take inside an
    operation.

    Args:
        axes_of: the layout's name for the ranks of a group.
        logits: rows and columns [S * B, V / TP] of stored logits, where there are any.

    Attributes:
        phase: says what is being done now, e.g. "propose"; None: nothing with a name.
        account: of what has happened since `begin`.
    """

    def __init__(self, axes_of: Callable[[Sequence[int]], str], logits: tuple[int, int] | None = None):
        super().__init__()
        self.axes_of, self.logits = axes_of, logits
        self.phase: Callable[[], str | None] = lambda: None
        self.account = Account()
        self._held = dict.fromkeys(PARTS, 0)
        self._total = self._most = 0
        self._alive: dict[int, tuple[str, int, Any]] = {}  # by a storage's id: its part, its bytes, a reference to it
        self._formulas: dict[Any, Callable[..., int] | None] = {}
        self._idle: dict[Any, bool] = {}
        self._axes: dict[str, str] = {}  # by a group's name

    def begin(self) -> Account:
        """A new account, of what is held now and comes from here on."""
        self.account, self._most = Account(peak=dict(self._held)), self._total
        return self.account

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what part these tensors are."""
        for tensor in tensors:
            self._note(tensor, part)
            key = id(tensor.untyped_storage())
            before, size, reference = self._alive[key]
            self._alive[key] = part, size, reference
            self._held[before] -= size
            self._held[part] += size

    def assign_rest(self, part: str) -> None:
        """Say what part everything is that is held and is no part yet."""
        for key, (before, size, reference) in list(self._alive.items()):
            if before == "other":
                self._alive[key] = part, size, reference
                self._held["other"] -= size
                self._held[part] += size

    # --- what happens ---------------------------------------------------------------------------

    def carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked of fake tensors at every turn
            return args[0].fake_device
        if func.namespace == "c10d":
            self._send(func, args)
        out = self.carry_out(func, args, kwargs or {})
        if func not in self._formulas:
            packet = func._overloadpacket
            self._formulas[func] = _FORMULAS.get(packet) or flop_registry.get(packet)
            self._idle[func] = func.is_view or packet in _IDLE or func.namespace == "c10d"
        formula = self._formulas[func]
        flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        if not self._idle[func]:
            read = tensors_of(out if func._overloadpacket in _LOOKUPS else args)
            self.compute(flops, sum(t.nbytes for t in read) + sum(t.nbytes for t in tensors_of(out)))
        for tensor in tensors_of(out):
            self._note(tensor)
        return out

    def compute(self, flops: int, moved: int) -> None:
        """Write down an operation of so many FLOPs that reads and writes so many bytes."""
        phase = self.phase() or "other"
        self.account.work[phase, flops, moved] += 1
        if flops:
            self.account.flops[phase] += flops

    def _part_of(self, tensor: Tensor) -> str:
        """What a new tensor is."""
        phase = self.phase()
        if self.logits is not None and phase != "optimizer":
            rows, columns = self.logits
            if tensor.dim() == 2 and tensor.shape[1] == columns and tensor.shape[0] in (1, rows):
                return "logits"
        return _MADE_IN.get(phase or "", "other")

    def _note(self, tensor: Tensor, part: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        part, size = part or self._part_of(tensor), storage.nbytes()
        self._alive[key] = part, size, weakref.ref(storage, partial(self._free, key))
        self._held[part] += size
        self._total += size
        account, phase = self.account, self.phase() or "other"
        if self._total > account.phase_peaks.get(phase, 0):
            account.phase_peaks[phase] = self._total
        if self._total > self._most:
            self._most, account.peak = self._total, dict(self._held)

    def _free(self, key: int, _: Any) -> None:
        part, size, _ = self._alive.pop(key)
        self._held[part] -= size
        self._total -= size

    def _send(self, func: Any, args: Any) -> None:
        operation = func._opname
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        size = max(sum(t.nbytes for t in tensors_of(a)) for a in args)
        if operation in ("send", "recv_"):
            name = "send" if operation == "send" else "receive"
            key = name, dist.get_process_group_ranks(group)[args[2]]
            traffic = self.account.messages.setdefault(key, Traffic())
        else:
            if group.group_name not in self._axes:
                self._axes[group.group_name] = self.axes_of(dist.get_process_group_ranks(group))
            key = operation.strip("_"), self._axes[group.group_name]
            traffic = self.account.collectives.setdefault(key, Traffic())
        traffic.calls += 1
        traffic.size += size
        if operation in _RECEIVING:
            self.assign("communication buffers", tensors_of(args[0]))
