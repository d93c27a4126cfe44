"""Where this package reaches behind megatron-core's public interface, why, and what it relies on there.

Two modules change megatron-core: `parallel/cpu_backend.py` (its devices, and one repair) and
`checkpoint/checkpoints.py` (its writer). `training/optimizer.py` lends it an AdamW while it builds an optimizer. The
others read or call what is not promised to stay.

To move to another version, set VERSION here and the pin in setup.py, and run
`pytest tests/parallel/test_megatron_edges.py`. Mend each module that it names, or drop what megatron-core has by now.
Then run the suite, `make test-slow` (layouts, resharding) and `make test-gpu`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

VERSION = "0.16.1"


@dataclass(frozen=True)
class Edge:
    """What one module relies on in another.

    Attributes:
        user: our module.
        why: what for.
        module: of megatron-core, below `megatron.core`.
        names: that it has; dotted ones are of its classes.
        source: lines that stand in its code.
    """

    user: str
    why: str
    module: str
    names: tuple[str, ...] = ()
    source: tuple[str, ...] = ()


EDGES = (
    Edge(
        "parallel/cpu_backend.py",
        "mends tensor-parallel reductions of strided tensors: a contiguous copy is reduced and the original returned",
        "tensor_parallel.mappings",
        ("_reduce",),
        ("torch.distributed.all_reduce(input_.contiguous(), group=group)\n\n    return input_",),
    ),
    Edge(
        "parallel/cpu_backend.py",
        "keeps random states of the CPU's generator where there is no CUDA",
        "tensor_parallel.random",
        ("CudaRNGStatesTracker.fork", "_get_cuda_rng_state", "_set_cuda_rng_state"),
        ("self.states_",),
    ),
    Edge(
        "parallel/cpu_backend.py",
        "answers Tensor.type() with CUDA's names on CPU",
        "optimizer.distrib_optimizer",
        (),
        ("torch.cuda.FloatTensor",),
    ),
    Edge("parallel/cpu_backend.py", "turns compilation off on CPU", "jit", ("disable_jit_fuser",)),
    Edge(
        "parallel/parameters.py",
        "notes how weights are cut, and reads where gradients are summed",
        "tensor_parallel.layers",
        ("set_tensor_model_parallel_attributes",),
        ("partition_dim", "tensor_model_parallel"),
    ),
    Edge(
        "parallel/parameters.py",
        "reads where gradients are summed",
        "distributed.param_and_grad_buffer",
        (),
        ("param.main_grad =",),
    ),
    Edge(
        "parallel/parameters.py", "reads the optimizer's copies", "optimizer.distrib_optimizer", (), (".main_param =",)
    ),
    Edge(
        "checkpoint/checkpoints.py",
        "writes in a thread: forked processes and a manager hang without a __main__ guard",
        "dist_checkpointing.strategies.filesystem_async",
        (
            "_get_write_results_queue",
            "FileSystemWriterAsync.write_preloaded_data",
            "FileSystemWriterAsync.write_preloaded_data_multiproc",
            "FileSystemWriterAsync.get_save_function_and_args",
            "FileSystemWriterAsync.retrieve_write_results",
            "FileSystemWriterAsync.finish",
        ),
        ("self.results_queue = _get_write_results_queue()",),
    ),
    Edge(
        "checkpoint/checkpoints.py",
        "plans a save and leaves writing to the caller",
        "dist_checkpointing.strategies.torch",
        ("FileSystemWriterAsync", "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks"),
        ("writer = FileSystemWriterAsync(",),
    ),
    Edge(
        "checkpoint/checkpoints.py",
        "checks and cuts a state",
        "dist_checkpointing.state_dict_utils",
        ("save_preprocess",),
    ),
    Edge(
        "checkpoint/checkpoints.py",
        "notes the format",
        "dist_checkpointing.core",
        ("CheckpointingConfig", "save_config"),
    ),
    Edge(
        "checkpoint/optimizer_state.py",
        "gathers the distributed optimizer's slices as whole tensors of weights",
        "optimizer.distrib_optimizer",
        (
            "DistributedOptimizer.sharded_param_state_fully_reshardable",
            "DistributedOptimizer.load_parameter_state_from_fully_reshardable",
        ),
        ("self.gbuf_ranges = []", "self.buffers = "),
    ),
    Edge(
        "checkpoint/optimizer_state.py",
        "makes the moments of parameters that never had a gradient",
        "optimizer.optimizer",
        (),
        ("self.init_state_fn = init_state_fn", "self.chained_optimizers = "),
    ),
    Edge(
        "training/optimizer.py",
        "has an AdamW of ours built in place of torch's",
        "optimizer",
        ("USING_PYTORCH_OPTIMIZER", "Adam"),
    ),
)


def moved() -> list[str]:
    """What EDGES rely on and the installed megatron-core has not, a line for each."""
    lines = []
    for edge in EDGES:
        place = f"megatron.core.{edge.module}"
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            lines.append(f"{place} is gone ({error}); {edge.user} {edge.why}")
            continue
        for name in edge.names:
            found: object = module
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is None:
                lines.append(f"{place} has no {name}; {edge.user} {edge.why}")
        code = inspect.getsource(module) if edge.source else ""
        lines += [f"{place} has no more {line!r}; {edge.user} {edge.why}" for line in edge.source if line not in code]
    return lines
