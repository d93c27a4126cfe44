"""Checkpoints: any layout loads what any other saved, damage is noticed, failures leave the old one."""

import resource
from pathlib import Path

import pytest
import torch

from ebt_megatron.checkpoint.checkpoints import Checkpoints
from ebt_megatron.checkpoint.history import CheckpointError, verify
from tests.distributed_utils import run_ranks
from tests.training.toy import Run, toy_recipe

DISTRIBUTED = "parallel.distributed_optimizer=true"


def _new(folder, overrides, **options):
    from ebt_megatron.parallel import setup

    setup.shutdown()
    run = Run(toy_recipe(*overrides))
    return run, Checkpoints(Path(folder), 2, {"width": 8}, **options)


def _load(run, checkpoints):
    step, extra, _ = checkpoints.load(checkpoints.newest_good(), run.model, run.optimizer, run.scheduler)
    run.step = step
    return extra


def _losses(history):
    return [(loss, update.grad_norm, update.lr) for loss, update in history]


def _save_and_go_on(folder, overrides):
    run, checkpoints = _new(folder, overrides)
    run.train(3)
    assert checkpoints.save(3, run.model, run.optimizer, run.scheduler, {"tokens": 96}) is None
    return _losses(run.train(3))


def _go_on(folder, layouts):
    answers = []
    for overrides in layouts:
        run, checkpoints = _new(folder, overrides)
        assert _load(run, checkpoints) == {"tokens": 96}
        answers.append(_losses(run.train(3)))
    return answers


TP2, SP = "parallel.tensor=2", "parallel.sequence_parallel=true"


@pytest.mark.parametrize("written", [(2, (TP2,)), (2, (DISTRIBUTED,)), (4, (TP2, SP, DISTRIBUTED))], ids=str)
def test_every_layout_goes_on_where_another_stopped(written, tmp_path):
    expected = run_ranks(_save_and_go_on, written[0], tmp_path, written[1])[0]
    for ranks, layouts in ((1, [(), (DISTRIBUTED,)]), (2, [(TP2,), (DISTRIBUTED,)])):
        for layout, answer in zip(layouts, run_ranks(_go_on, ranks, tmp_path, layouts)[0], strict=True):
            for ours, theirs in zip(answer, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=2e-6), (written, ranks, layout)


def test_the_same_layout_goes_on_bit_for_bit(tmp_path):
    expected = run_ranks(_save_and_go_on, 2, tmp_path, (DISTRIBUTED,))
    assert [a[0] for a in run_ranks(_go_on, 2, tmp_path, [(DISTRIBUTED,)])] == expected


def _faults(folder):
    """Retention, damage, another model, a full disk on one rank, an asynchronous save."""
    run, checkpoints = _new(folder, ())

    def save(step, **options):
        return checkpoints.save(step, run.model, run.optimizer, run.scheduler, {"step": step}, **options)

    for step in (1, 2, 3):
        run.train(1)
        assert save(step, rank_state={"rank": torch.tensor(run.state.rank)}) is None
    names = [p.name for p in checkpoints.published()]
    assert names == ["step-00000002", "step-00000003"], "only the newest two stay"
    *_, rank_states = checkpoints.load(checkpoints.newest_good(), run.model)
    assert [int(s["rank"]) for s in rank_states] == [0, 1]

    # Rank 1's disk is full: no process may write a file beyond some bytes.
    if run.state.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    error = save(4, rank_state={"rank": torch.tensor(run.state.rank)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "rank 1" in error and "File too large" in error, error
    assert [p.name for p in checkpoints.published()] == names
    assert not list(checkpoints.folder.glob("*.partial"))

    torch.distributed.barrier()
    newest = checkpoints.published()[-1]
    if run.state.rank == 0:
        damaged = next(newest.glob("*.distcp"))
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        (checkpoints.folder / "step-00000009.partial").mkdir()  # left by a run that was killed
    torch.distributed.barrier()
    reports = []
    assert checkpoints.newest_good(reports.append).name == "step-00000002"
    if run.state.rank == 0:
        assert "step-00000003" in reports[0] and "checksum" in reports[0]

    other = Checkpoints(checkpoints.folder, 2, {"width": 16})
    with pytest.raises(ValueError, match="width=8, this run has width=16"):
        other.load(checkpoints.folder / "step-00000002", run.model)

    background = Checkpoints(checkpoints.folder / "background", 2, {}, asynchronous=True)
    frozen = [p.detach().clone() for p in run.model.parameters()]
    assert background.save(5, run.model, run.optimizer, run.scheduler, {}) is None
    run.train(1)
    polls = 0
    while not background.published():
        assert background.poll() is None
        torch.distributed.barrier()
        polls += 1
    background.load(background.newest_good(), run.model)
    assert all(torch.equal(a, b) for a, b in zip(frozen, run.model.parameters(), strict=True))
    return polls


def test_faults(tmp_path):
    assert min(run_ranks(_faults, 2, tmp_path)) >= 1


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"checksums.json cannot be read"):
        verify(tmp_path)
    (tmp_path / "checksums.json").write_text('{"common.pt": "0"}')
    with pytest.raises(CheckpointError, match=r"common.pt is missing"):
        verify(tmp_path)
