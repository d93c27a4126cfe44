"""Fixtures of all tests."""

import pytest

from tests import distributed_utils


@pytest.fixture
def no_survivors():
    """Whatever a test starts (torchrun, mpirun and their ranks) ends with it, also after a timeout."""
    with distributed_utils.no_survivors():
        yield
