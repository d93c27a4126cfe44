"""Faults: bad steps are counted, spikes found, and a hang is blamed on the rank that causes it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebt_megatron.training.faults import BadSteps, SpikeDetector

ROOT = Path(__file__).parents[2]


def test_the_run_ends_after_so_many_bad_steps_in_a_row():
    bad = BadSteps(3)
    assert [bad.record(applied) for applied in (False, False, True, False, False, False)] == [False] * 5 + [True]
    assert bad.total == 5


def test_a_spike_is_far_above_the_recent_mean():
    spikes = SpikeDetector(2.0, 4)
    assert not any(spikes.is_spike(loss) for loss in (9.0, 1.0, 1.0, 1.0, 1.0, 1.9, math.nan))
    assert spikes.is_spike(3.0)
    assert not spikes.is_spike(3.0), "the window starts anew after a spike"


def test_without_a_factor_nothing_is_a_spike():
    assert not any(SpikeDetector(0.0, 2).is_spike(loss) for loss in (1.0, 1.0, 1e9))


HANG = """
import time, torch, torch.distributed as dist
from ebt_megatron.config import ParallelConfig
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.training.faults import Watchdog
from ebt_megatron.core.timing import Timers
state, timers = initialize(ParallelConfig(timeout_seconds=100), 0), Timers()
Watchdog(timers, 3.0).step = 7
with timers.phase("data"):
    if state.rank == 1:
        time.sleep(60)
with timers.phase("communication"):
    dist.all_reduce(torch.zeros(1))
"""


@pytest.mark.usefixtures("no_survivors")
def test_a_hang_names_the_rank_and_the_phase_and_ends_the_run(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode != 0
    assert "held up by rank 1 in phase 'data' of step 7; exiting" in done.stderr
