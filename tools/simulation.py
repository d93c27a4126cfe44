"""The real training step of any rank of any layout, without its memory and without the other ranks.

Tensors are torch's fake ones: they have shapes and no numbers. The process groups are fake, too: what is sent goes
nowhere, and what is received is memory of the right shape. Everything else is what trains: the model, its wrapper, the
optimizer, the objective and the pipeline's schedule, with every micro-batch of the step. A `Ledger` writes down what
happens.

Triton kernels are not launched. They allocate nothing and write into memory that the code around them has made, so
memory is exact; the FLOPs of attention are counted from what its kernels are given.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Work
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.testing._internal.distributed.fake_pg import FakeStore

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.core.launch import Launch
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.kernels.noise import quantiles
from ebt_megatron.parallel.setup import ParallelState, initialize, shutdown
from ebt_megatron.tasks import Task
from ebt_megatron.thinking.pipeline import direction_groups
from ebt_megatron.tools.ledger import Account, Ledger, tensors_of
from ebt_megatron.training.optimizer import apply_gradients, zero_gradients
from ebt_megatron.training.trainer import Trainer


@dataclass(frozen=True)
class Simulated:
    """What a rank does in a step, and what it took to find out.

    Attributes:
        account: of the rank.
        seconds, cpu_seconds: of the simulation, on the clock and of the processor.
        memory: the most that its process held, in bytes.
    """

    account: Account
    seconds: float
    cpu_seconds: float
    memory: int


class _Message(Work):
    """A message on its way, which is nowhere."""

    def __init__(self, arrived: bool):
        super().__init__()
        self.arrived = arrived

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return self.arrived


_MESSAGES = {arrived: _Message(arrived) for arrived in (False, True)}
_CPU = torch.device("cpu")


class FakeLedger(Ledger):
    """A `Ledger` of fake tensors: messages are not sent, and every number that is asked for is 1.

    Args:
        phase, axes_of, logits: as `Ledger`.
        at_once: messages arrive at once, as NCCL's that the device has come to; else when they are waited for, as
            gloo's. What is sent is kept until then.
        shortcut: go past torch's bookkeeping of devices, since all tensors are on one. It takes most of the time.
    """

    def __init__(self, *args: Any, at_once: bool = True, shortcut: bool = True):
        super().__init__(*args)
        self.message, self.shortcut = _MESSAGES[at_once], shortcut

    def carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation, or what stands for it."""
        if func.namespace == "c10d":
            work = self.message.boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        first = args[0] if args else None
        real = (isinstance(a, Tensor) and not isinstance(a, FakeTensor) for a in args)
        if not self.shortcut or not isinstance(first, FakeTensor) or "device" in kwargs or any(real):
            return func(*args, **kwargs)
        with in_kernel_invocation_manager(first.fake_mode):
            out = func(*args, **kwargs)
        return _faked(first.fake_mode, out)

    def launched(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """What a Triton kernel would compute (called in place of `JITFunction.run`)."""
        from ebt_megatron.kernels.triton_attention import PRODUCTS  # triton is there where a kernel is

        moved = sum(t.nbytes for t in tensors_of(args))
        products = PRODUCTS.get(kernel.__name__)
        if products is None:
            self.compute(0, moved)
            return
        *_, batch, heads, _, length, size, _ = args  # the last arguments of all three
        neighbours = kwargs["CAUSAL"]
        pairs = length * (length + neighbours) // 2 if neighbours else length**2
        of_keys = kwargs["KT"] if "KT" in kwargs else not kwargs["OWN"]
        products_done = products[kwargs["TANGENT"] * (1 + of_keys)]
        self.compute(2 * products_done * batch * heads * pairs * size, moved)


def _faked(mode: FakeTensorMode, out: Any) -> Any:
    """What an operation on shapes returned, as fake tensors."""
    if isinstance(out, Tensor):
        return out if isinstance(out, FakeTensor) else FakeTensor(mode, out, _CPU)
    return type(out)(_faked(mode, part) for part in out) if isinstance(out, list | tuple) else out


def axes_of(recipe: Recipe, ranks: Sequence[int]) -> str:
    """What differs between ranks, e.g. "tensor" or "data x pipeline"; ranks lie as `setup.initialize` lays them out."""
    tensor = recipe.parallel.tensor
    data = dist.get_world_size() // (tensor * recipe.parallel.pipeline)
    places = [(r % tensor, r // tensor % data, r // (tensor * data)) for r in ranks]
    different = [len(set(axis)) > 1 for axis in zip(*places, strict=True)]
    names = ("tensor", "data", "pipeline")
    return " x ".join(name for name, differs in zip(names, different, strict=True) if differs) or "itself"


def account_of_step(
    kind: Callable[..., Ledger], recipe: Recipe, task: Task, state: ParallelState, batches: list[MicroBatch]
) -> Account:
    """What this rank does in a training step, the first after the one update that makes the optimizer's state.

    Args:
        kind: of ledger: `Ledger` measures real tensors, `FakeLedger` fake ones.
        recipe, task, state: of the run.
        batches: this rank's micro-batches.
    """
    cost = task.cost()
    rows = recipe.training.micro_batch_size * task.length
    logits = (rows, cost.width // recipe.parallel.tensor) if cost.distribution else None
    ledger = kind(partial(axes_of, recipe), logits)
    if state.pipeline_size > 1:
        direction_groups()  # a run makes them once
    with ledger:
        trainer = Trainer(recipe, task, state)
        ledger.phase = lambda: trainer.timers.current
        ledger.assign("weights", (*trainer.model.parameters(), *trainer.model.buffers()))
        ledger.assign("gradients", (b.grad_data for chunk in trainer.chunks for b in chunk.buffers))
        ledger.assign_rest("optimizer state")
        zero_gradients(trainer.chunks, trainer.optimizer)
        with trainer.timers.phase("optimizer"):
            apply_gradients(trainer.chunks, trainer.optimizer, trainer.scheduler)
        account = ledger.begin()
        trainer.train_step(batches, 0)
    return account


def made_up_batches(recipe: Recipe, task: Task, data_size: int) -> list[MicroBatch]:
    """Micro-batches that say nothing, of one rank."""
    size = recipe.training.micro_batch_size
    count = recipe.training.global_batch_size // (size * data_size)
    return [task.made_up(torch.arange(size) + i * size) for i in range(count)]


@contextmanager
def _fake_world(rank: int, size: int) -> Iterator[None]:
    """Be one of so many ranks, of which the others say and hold what this one does."""

    def alike(answers: list[Any], answer: Any, group: Any = None) -> None:
        answers[:] = [answer] * len(answers)

    def norm(_: int, __: Any, tensors: list[list[Tensor]], *___: Any) -> tuple[Tensor, None]:
        """Megatron's own reads each tensor's norm as a number where there is neither Apex nor Transformer Engine."""
        return torch.stack([t.norm() for part in tensors for t in part]).norm().view(1), None

    def stays(module: nn.Module, *_: Any) -> nn.Module:
        """Modules of fake tensors cannot be moved."""
        return module

    quantiles.cache_clear()  # those from before have numbers
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    with (
        mock.patch.object(dist, "all_gather_object", alike),
        mock.patch("megatron.core.optimizer.clip_grads.l2_norm_impl", norm),
        mock.patch.object(nn.Module, "to", stays),
    ):
        try:
            yield
        finally:
            shutdown()
            quantiles.cache_clear()  # those made here have no numbers


@contextmanager
def no_launches() -> Iterator[None]:
    """Tell the ledger at work of a Triton kernel in place of launching it."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        ledger = _get_current_dispatch_mode()
        assert isinstance(ledger, FakeLedger)
        ledger.launched(kernel, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", run):
        yield


def simulate_rank(recipe: Recipe, task: Task, rank: int, size: int, **options: bool) -> Account:
    """What a rank of `size` does in a training step; process groups must not exist, and are gone afterwards.

    Args:
        recipe: the run; its kernels are as it says.
        task: its modality.
        rank, size: which of how many.
        options: of `FakeLedger`.
    """
    with _fake_world(rank, size), no_launches():
        state = initialize(recipe.parallel, recipe.training.seed, Launch("single", rank, size, 0, ""))
        state = replace(state, device=_CPU)
        with FakeTensorMode(allow_non_fake_inputs=True):  # a task may hold numbers of its own: a schedule of noise
            batches = made_up_batches(recipe, task, state.data_size)
            return account_of_step(partial(FakeLedger, **options), recipe, task, state, batches)


def _simulated(recipe: Recipe, task: Task, size: int, rank: int) -> Simulated:
    warnings.simplefilter("ignore")  # of libraries, which a run says once
    begin = time.perf_counter(), time.process_time()
    account = simulate_rank(recipe, task, rank, size)
    seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    return Simulated(account, seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Simulator:
    """Processes that simulate ranks, each in one of its own; to be used in a `with`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")  # imports once
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(os.cpu_count() or 1, context, max_tasks_per_child=1)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, recipe: Recipe, task: Task, size: int, ranks: Sequence[int]) -> list[Future[Simulated]]:
        """Begin to simulate some ranks of a layout.

        With `model.kernels=auto` the kernels are those of a GPU, if triton is installed.

        Args:
            recipe: the run, which fits `size` ranks.
            task: its modality.
            size: how many ranks there are.
            ranks: those to simulate.

        Raises:
            RecipeError: for a task of one's own that makes no micro-batch up.
        """
        if not hasattr(task, "made_up"):
            raise RecipeError(
                f"data.modality={recipe.data.modality} makes up no micro-batch to simulate with: give its task "
                "`made_up` (docs/extending.md)"
            )
        if recipe.model.kernels == "auto" and importlib.util.find_spec("triton"):
            recipe = replace(recipe, model=replace(recipe.model, kernels="triton"))
        with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore"):  # of libraries, in every process that it starts
            forkserver.ensure_running()
        return [self._pool.submit(_simulated, recipe, task, size, rank) for rank in ranks]


def simulate(recipe: Recipe, task: Task, size: int, ranks: Sequence[int]) -> list[Simulated]:
    """Simulate some ranks of a layout; arguments and errors as of `Simulator.begin`."""
    with Simulator() as simulator:
        return [future.result() for future in simulator.begin(recipe, task, size, ranks)]


def ranks_of_stages(recipe: Recipe, size: int) -> dict[str, int]:
    """The first tensor- and data-parallel rank of the first, a middle and the last pipeline stage, by the stage."""
    stages = recipe.parallel.pipeline
    shown = sorted({0, stages // 2, stages - 1})
    return {f"stage {stage + 1} of {stages}": stage * size // stages for stage in shown}
