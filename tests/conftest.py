"""Fixtures of all tests, and which come first."""

import pytest

from tests import distributed_utils

# Files and folders that take long. `make test` deals files to two processes: the last ones must be short.
LONG = (
    "tests/training/",
    "tests/launch/",
    "tests/checkpoint/",
    "tests/kernels/test_triton",
    "tests/core/",
    "tests/tools/",
    "tests/benchmarks/",
    "tests/examples/",
    "tests/data_prep/test_restart",
    "tests/evaluation/",
    "tests/model/test_fp8",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take long first."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture
def no_survivors():
    """Whatever a test starts (torchrun, mpirun and their ranks) ends with it, also after a timeout."""
    with distributed_utils.no_survivors():
        yield
