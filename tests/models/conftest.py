"""Fixtures of the tests of models."""

import pytest
import torch


@pytest.fixture
def threads():
    """Return a function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
