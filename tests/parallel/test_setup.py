"""Bring-up: launcher detection, layouts, and tensor-parallel layers on gloo."""

import os

import pytest
import torch

from ebt_megatron import config
from ebt_megatron.parallel import setup
from tests.distributed_utils import RankError, run_ranks


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("single", 0, 1, 0, "")),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "MASTER_ADDR": "head",
                "MASTER_PORT": "29500",
            },
            ("torchrun", 3, 4, 1, "env"),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_NODELIST": "gpu[003-007,9]",
                "SLURM_JOB_ID": "1234",
            },
            ("slurm", 5, 8, 1, "gpu003:21234"),
        ),
        # A batch script's own shell is task 0 of many to Slurm, but no task of a step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ("single", 0, 1, 0, "")),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ("mpi", 2, 4, 0, "mpi"),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500"},
            ("mpi", 1, 2, 0, "head:29500"),
        ),
    ],
)
def test_each_launcher_is_recognised(variables, expected):
    assert setup.detect_launch(variables) == setup.Launch(*expected)


def _layout(tensor: int, pipeline: int):
    parallel = config.ParallelConfig(tensor=tensor, pipeline=pipeline)
    state = setup.initialize(parallel, seed=7)
    again = setup.initialize(parallel, seed=7)
    assert again == state
    return (state.tensor_rank, state.data_rank, state.pipeline_rank), (
        state.tensor_size,
        state.data_size,
        state.pipeline_size,
    )


def test_ranks_are_laid_out_tensor_then_data_then_pipeline():
    results = run_ranks(_layout, 4, 2, 1)
    assert [place for place, _ in results] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert {sizes for _, sizes in results} == {(2, 2, 1)}
    results = run_ranks(_layout, 4, 1, 2)
    assert [place for place, _ in results] == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]


def test_a_layout_that_does_not_fit_is_one_clear_line():
    with pytest.raises(RankError, match="number of ranks=2 is not divisible by"):
        run_ranks(_layout, 2, 4, 1)


def _single():
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    state = setup.initialize(config.ParallelConfig(), seed=7)
    first = torch.rand(3)
    setup.shutdown()
    setup.initialize(config.ParallelConfig(), seed=7)
    assert torch.equal(first, torch.rand(3))
    setup.shutdown()
    return state.world_size, str(state.device)


def test_a_plain_process_needs_no_launcher_and_can_start_twice():
    assert run_ranks(_single, 1) == [(1, "cpu")]


def _tensor_parallel_layers():
    """A column-parallel then a row-parallel layer, with a gradient that arrives strided."""
    from megatron.core import tensor_parallel

    state = setup.initialize(config.ParallelConfig(tensor=2), seed=7)
    recipe = config.load_recipe(None, ["model.size=4xs", "parallel.tensor=2"])
    transformer = setup.transformer_config(recipe)
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 4, generator=generator), torch.randn(4, 8, generator=generator)
    x = torch.randn(5, 3, 4, generator=generator, requires_grad=True)

    options = {"config": transformer, "init_method": torch.nn.init.ones_, "bias": False}
    column = tensor_parallel.ColumnParallelLinear(4, 8, gather_output=False, **options)
    row = tensor_parallel.RowParallelLinear(8, 4, input_is_parallel=True, skip_bias_add=False, **options)
    with torch.no_grad():
        column.weight.copy_(up.chunk(2, 0)[state.tensor_rank])
        row.weight.copy_(down.chunk(2, 1)[state.tensor_rank])
    strided = torch.randn(3, 4, 5, generator=generator).permute(2, 0, 1)
    assert not strided.is_contiguous()
    output = row(column(x)[0])[0]
    (output * strided).sum().backward()
    expected = x.detach().requires_grad_()
    reference = expected @ up.T @ down.T
    (reference * strided).sum().backward()
    torch.testing.assert_close(output, reference)
    torch.testing.assert_close(x.grad, expected.grad)

    # The collectives by themselves: a strided gradient into copy's backward, a strided value into reduce.
    y = torch.ones(4, 3, requires_grad=True)
    weights = torch.arange(12.0).reshape(3, 4).T
    copied = tensor_parallel.copy_to_tensor_model_parallel_region(y)
    copied.backward(weights)
    torch.testing.assert_close(y.grad, 2 * weights)
    torch.testing.assert_close(
        tensor_parallel.reduce_from_tensor_model_parallel_region(weights.clone().T.contiguous().T),
        2 * weights,
    )

    tracker = tensor_parallel.get_cuda_rng_tracker()
    torch.manual_seed(3)
    outer = torch.rand(2)
    torch.manual_seed(3)
    with tracker.fork():
        inner = torch.rand(2)
    assert torch.equal(outer, torch.rand(2)), "a fork must leave the outer random state alone"
    return inner.tolist()


def test_tensor_parallel_layers_equal_plain_ones_and_keep_random_states_apart():
    first, second = run_ranks(_tensor_parallel_layers, 2)
    assert first != second, "tensor-parallel ranks draw their own numbers inside a fork"


def test_a_failing_rank_shows_its_traceback():
    with pytest.raises(RankError, match=r"rank 1 failed:(.|\n)*KeyError: 'no such rank'"):
        run_ranks(_fail_on_rank_one, 2)


def _fail_on_rank_one():
    state = setup.initialize(config.ParallelConfig(), seed=0)
    if state.rank == 1:
        raise KeyError("no such rank")
    return state.rank
