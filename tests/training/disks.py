"""A disk that is full, as the system itself says so."""

import resource
from contextlib import contextmanager


@contextmanager
def small_disk(num_bytes):
    """Let no file become larger: writing beyond it is an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
