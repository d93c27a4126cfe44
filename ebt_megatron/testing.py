"""Holds an energy of your own to double backward, in float64: on one process, and on layouts.

from ebt_megatron.testing import judge

judge(Points, plain_energy, batch, ["data.sequence_length=6"], layouts=[["parallel.tensor=2"]])
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.core.timing import Timers
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.model.initialization import named_weights
from ebt_megatron.objectives import build_objective
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import cut_dimension
from ebt_megatron.parallel.setup import initialize, shutdown
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.interface import Sample, Task

Gradients = dict[str, Tensor]
# (model, embedded context, step, embedded predictions [S, B, D]) -> energies [S, B], differentiable twice
PlainEnergy = Callable[[Any, Tensor, int, Tensor], Tensor]
MODES = ("detached", "full", "truncated")
_NO_STEP = "optimizer.lr=1e-3"  # a recipe must say one; no step is taken
_SAME, _SUM = "same", "sum"  # how gradients of ranks are joined; or the dimension that they are cut along


def judge(
    task_of: Callable[[Recipe], Task],
    plain_energy: PlainEnergy,
    batch: MicroBatch,
    overrides: Sequence[str] = (),
    layouts: Sequence[Sequence[str]] = (),
    modes: Sequence[str] = MODES,
    tolerance: float = 1e-10,
) -> dict[str, float]:
    """Compare the gradients of training with those of plain double backward, for every weight.

    Weights are drawn away from zeros and ones. A layout's ranks are processes of this machine, so what is given must
    be found by import, and a script needs `if __name__ == "__main__":`.

    Args:
        task_of: makes the task, whose energy model is judged.
        plain_energy: the same energy in plain torch on the same parameters, for one process.
        batch: a micro-batch of an even number of samples, as the loader gives them.
        overrides: of the recipe: key=value.
        layouts: overrides of each layout, with tensor and pipeline parallelism; data parallelism is not for this.
        modes: of thinking.gradient.
        tolerance: the largest relative error of a weight's gradient.

    Returns:
        The largest relative error of each mode on one process and on each layout.

    Raises:
        AssertionError: for a gradient that is wrong, or a weight that gets none, naming it.
    """
    settings = [[*overrides, f"thinking.gradient={mode}", "model.kernels=torch"] for mode in modes]
    ranks = {" ".join(layout): _on_ranks(task_of, batch, [[*own, *layout] for own in settings]) for layout in layouts}
    errors: dict[str, float] = {}
    for i, (mode, own) in enumerate(zip(modes, settings, strict=True)):
        expected = _judged(task_of, plain_energy, batch, own)
        if still := [name for name, gradient in expected.items() if not gradient.abs().max() > 0]:
            raise AssertionError(f"{mode}: {still[0]} gets no gradient, so nothing is compared: change the weights")
        found = {"one process": _joined([_part(task_of, batch, own)])}
        found |= {where: _joined([parts[i] for parts in of_ranks]) for where, of_ranks in ranks.items()}
        for where, gradients in found.items():
            by_name = {name: _relative_error(gradients[name], gradient) for name, gradient in expected.items()}
            worst = max(by_name, key=lambda name: by_name[name])
            errors[f"{mode}, {where}"] = by_name[worst]
            if not by_name[worst] <= tolerance:
                raise AssertionError(
                    f"{mode}, {where}: the gradient of {worst} is off by {by_name[worst]:.3g} (relative; allowed "
                    f"{tolerance:g})"
                )
    return errors


def _relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


class _Exact:
    """A task whose samples are float64."""

    def __init__(self, task: Task):
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        sample = self.task.sample(batch, device)
        values = {f.name: getattr(sample, f.name) for f in fields(sample)}
        exact = {n: v.double() for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(sample, **exact)


def _shaken(model: nn.Module) -> None:
    """Move weights away from what they start at, the same on every layout."""
    group = TensorGroup()
    for name, parameter in named_weights(model):
        if parameter.dim():
            shape, dim = list(parameter.shape), cut_dimension(parameter)
            if dim is not None:
                shape[dim] *= group.size
            generator = torch.Generator().manual_seed(stable_seed("judge", name))
            noise = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) / max(shape[-1], 1) ** 0.5
            with torch.no_grad():
                parameter.add_(noise if dim is None else noise.chunk(group.size, dim)[group.rank])


def _trained(
    task_of: Callable[[Recipe], Task], batch: MicroBatch, overrides: Sequence[str], plain: PlainEnergy | None = None
) -> nn.Module:
    """This rank's model, with the gradients of a training batch."""
    count = len(batch.sample_ids)
    sizes = [f"training.global_batch_size={count}", f"training.micro_batch_size={count // 2}"]
    recipe = load_recipe(None, [_NO_STEP, *overrides, *sizes])
    state = initialize(recipe.parallel, recipe.training.seed)
    task: Any = _Exact(task_of(recipe))
    model = build_model(recipe, task).double()
    model.config.params_dtype = torch.float64
    _shaken(model)
    if plain is not None:
        model.plain_energy = partial(plain, model)  # `double_backward.energies_of` takes it
    halves = [batch.part(0, count // 2), batch.part(count // 2, count)]
    build_objective(model, recipe, task, state, Timers()).train_batch(halves, 0)
    return model


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _judged(
    task_of: Callable[[Recipe], Task], plain: PlainEnergy, batch: MicroBatch, overrides: Sequence[str]
) -> Gradients:
    model = _trained(task_of, batch, [*overrides, "thinking.engine=double_backward"], plain)
    return {name: _gradient(p) for name, p in named_weights(model) if p.requires_grad}


Part = dict[str, tuple[str | int, Tensor]]


def _part(task_of: Callable[[Recipe], Task], batch: MicroBatch, overrides: Sequence[str]) -> Part:
    """This rank's gradients by name, with how those of all ranks are joined."""
    model = _trained(task_of, batch, overrides)
    out: Part = {}
    for name, parameter in named_weights(model):
        how: str | int | None = cut_dimension(parameter)
        if how is None:
            how = _SUM if getattr(parameter, "sequence_parallel", False) else _SAME
        out[name] = how, _gradient(parameter)
    return out


def _joined(ranks: Sequence[Mapping[str, tuple[str | int, Tensor]]]) -> Gradients:
    out: Gradients = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        held = [rank[name] for rank in ranks if name in rank]
        how, parts = held[0][0], [gradient for _, gradient in held]
        if isinstance(how, int):
            out[name] = torch.cat(parts, how)
        else:
            out[name] = sum(parts[1:], parts[0]) if how == _SUM else parts[0]
            if how == _SAME and not all(torch.equal(part, parts[0]) for part in parts):
                raise AssertionError(f"the gradient of {name} differs from rank to rank, and each holds it whole")
    return out


def _on_ranks(
    task_of: Callable[[Recipe], Task], batch: MicroBatch, settings: Sequence[Sequence[str]]
) -> list[list[Part]]:
    """What each rank of a layout has of each of the settings, which are of one layout."""
    parallel = load_recipe(None, [_NO_STEP, *settings[0]]).parallel
    world = parallel.tensor * parallel.pipeline
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = world, port, folder, task_of, batch, settings
        processes.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
        return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(world)]


def _rank(
    rank: int,
    world: int,
    port: int,
    folder: str,
    task_of: Callable[[Recipe], Task],
    batch: MicroBatch,
    settings: Sequence[Sequence[str]],
) -> None:
    """A rank of a layout, in a process of its own."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.save([_part(task_of, batch, own) for own in settings], Path(folder, str(rank)))
    shutdown()
