"""Bring-up: who am I among the ranks, process groups, seeds, and megatron-core's view of the recipe.

The same program starts under torchrun, Slurm (`srun`), an MPI launcher, or as a plain process.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

from ebt_megatron.config import ParallelConfig, Recipe, RecipeError
from ebt_megatron.core.launch import Launch, detect_launch
from ebt_megatron.parallel import cpu_backend

_bring_ups = itertools.count()
ALONE = Launch("single", 0, 1, 0, "")


@dataclass(frozen=True)
class ParallelState:
    """This rank's place in the layout, and the groups it shares."""

    rank: int
    world_size: int
    local_rank: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.pipeline_rank == self.pipeline_size - 1


def _own_address() -> str:
    """An address of this machine that other machines can reach, loopback when it has no other."""
    if address := os.environ.get("EBT_HOST_ADDRESS"):
        return address
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _meeting(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that exactly the ranks alive now agree on, in a store that may hold leftovers.

    torchrun's agents keep one store over all restarts and tell its uses apart by each agent's own count
    of failures, which differs between nodes when only one of them lost a rank. Here every rank signs in
    with a fresh name, rank 0 publishes the list, and it holds once all have found themselves on it.

    Raises:
        TimeoutError: naming the ranks that did not sign in.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    others = range(1, world_size)
    store.set(f"sign-in/{rank}", me)
    published: dict[str, Any] = {}
    while time.monotonic() < deadline:
        if rank == 0:
            keys = [f"sign-in/{r}" for r in others]
            if all(store.check([key]) for key in keys):
                names = [me, *(store.get(key).decode() for key in keys)]
                if names != published.get("names"):
                    published = {"names": names, "meeting": uuid.uuid4().hex}
                    store.set("attendance", json.dumps(published))
                meeting = published["meeting"]
                if all(store.check([f"{meeting}/{r}"]) for r in others):
                    store.set(f"{meeting}/held", "")
                    return meeting
        elif store.check(["attendance"]):
            published = json.loads(store.get("attendance"))
            if len(published["names"]) == world_size and published["names"][rank] == me:
                meeting = published["meeting"]
                store.set(f"{meeting}/{rank}", "")
                if store.check([f"{meeting}/held"]):
                    return meeting
        time.sleep(0.02)
    absent = [r for r in others if not store.check([f"sign-in/{r}"])]
    raise TimeoutError(f"rank {rank}: the ranks did not meet within {timeout}; never signed in: {absent}")


def _store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store the ranks meet at."""
    if launch.master == "env":
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return next(dist.rendezvous("env://", timeout=timeout))[0]
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        shared = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        return dist.PrefixStore(_meeting(shared, launch.rank, launch.world_size, timeout), shared)
    if launch.launcher == "single":
        return dist.HashStore()
    leader = launch.rank == 0
    if launch.master != "mpi":
        host, _, given = launch.master.rpartition(":")
        return dist.TCPStore(host, int(given), launch.world_size, leader, timeout, wait_for_workers=False)
    try:
        from mpi4py import MPI
    except ImportError:
        raise RecipeError(
            "started by an MPI launcher without mpi4py: pip install 'ebt-megatron[mpi]', or export "
            "MASTER_ADDR and MASTER_PORT to every rank (mpirun -x MASTER_ADDR -x MASTER_PORT)"
        ) from None
    if not leader:
        host, port = MPI.COMM_WORLD.bcast(None, root=0)
        return dist.TCPStore(host, port, launch.world_size, False, timeout)
    # Port 0: the system picks a free one, so nothing can take it between choosing and binding.
    store = dist.TCPStore("0.0.0.0", 0, launch.world_size, True, timeout, wait_for_workers=False)
    MPI.COMM_WORLD.bcast((_own_address(), store.port), root=0)
    return store


def _join(launch: Launch, backend: str, timeout: timedelta) -> None:
    """Meet the other ranks; raises RecipeError where they cannot be met."""
    try:
        dist.init_process_group(
            backend=backend,
            # A store may outlive the groups (torchrun's agent serves it): never meet stale addresses.
            store=dist.PrefixStore(f"bring-up-{next(_bring_ups)}", _store(launch, timeout)),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except (dist.DistError, TimeoutError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if launch.master == "env" else launch.master
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason or "address already in use" in reason:
            raise RecipeError(f"{where} is in use by another program: export another MASTER_PORT") from None
        raise RecipeError(
            f"rank {launch.rank} could not meet the other {launch.world_size - 1} at {where} ({reason}): "
            "see that all are started and reach it; unset RANK and WORLD_SIZE if they are left over "
            "from another program"
        ) from None


def initialize(parallel: ParallelConfig, seed: int, launch: Launch | None = None) -> ParallelState:
    """Join the other ranks, build the process groups and seed the generators.

    Ranks are laid out tensor-parallel innermost, then data-parallel, then pipeline (megatron-core's order).
    The backend is NCCL with gloo for CPU tensors where CUDA exists, else gloo. A second call returns the
    state of the groups that exist.

    Args:
        parallel: sizes of the axes; data parallelism takes the ranks that are left.
        seed: of the default generator (equal on all ranks) and of megatron-core's tensor-parallel states.
        launch: this process's place; default: what the launcher says.

    Raises:
        RecipeError: when the number of ranks is no multiple of tensor × pipeline, or they cannot be met.
    """
    cpu_backend.install()
    launch = launch or detect_launch()
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        ranks_per_model = parallel.tensor * parallel.pipeline
        if launch.world_size % ranks_per_model:
            raise RecipeError(
                f"number of ranks={launch.world_size} is not divisible by parallel.tensor x "
                f"parallel.pipeline={ranks_per_model}: start a multiple of that many ranks"
            )
        if cuda:
            torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
        _join(launch, "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=parallel.timeout_seconds))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            distributed_timeout_minutes=math.ceil(parallel.timeout_seconds / 60),
            create_gloo_process_groups=False,  # every group already takes CPU tensors over gloo
            # Embeddings live on the first stage only: no stage shares them, nothing is to be reduced.
            get_embedding_ranks=lambda stages, *_: stages[:1],
            get_position_embedding_ranks=lambda stages, *_: stages[:1],
        )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=launch.local_rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def shutdown() -> None:
    """Leave the process groups; harmless when there are none. A later `initialize` starts afresh."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """megatron-core's configuration of the recipe's network.

    Fusions that need apex, Transformer Engine or a compiler stay off; our own kernels take their place.
    Weights are initialised by the model itself on the CPU generator, so that they do not depend on the
    tensor-parallel size. Gradients are summed, not averaged, over data-parallel ranks
    (`calculate_per_token_loss`): the loss is already divided by the global number of tokens.
    """
    model, parallel = recipe.model, recipe.parallel
    bf16 = recipe.training.precision != "fp32"
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.hidden_size // model.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=False,
    )
