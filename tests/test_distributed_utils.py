"""What tests start, they end."""

import os
import subprocess
import sys
import time

import psutil

from tests.distributed_utils import no_survivors

STARTS_ANOTHER = """
import subprocess, sys
print(subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL).pid, flush=True)
sys.exit() if sys.argv[1:] else input()
"""


def test_no_process_of_a_test_outlives_it():
    with no_survivors():
        started = [
            subprocess.Popen(
                [sys.executable, "-c", STARTS_ANOTHER, *ends], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for ends in ([], ["ends"])
        ]
        family = [psutil.Process(pid) for p in started for pid in (p.pid, int(p.stdout.readline()))]
        started[1].wait()
        deadline = time.monotonic() + 10
        while family[3].ppid() == started[1].pid and time.monotonic() < deadline:
            time.sleep(0.01)
        assert family[1].is_running() and family[3].is_running()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert "STARTED_BY" not in os.environ
