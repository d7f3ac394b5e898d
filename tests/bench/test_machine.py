"""What is said of the machine."""

import os
from pathlib import Path

import pytest

from foretoken.bench.machine import BandwidthProbe, environment
from foretoken.bench.memory import memory, reset_peak_memory

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")


def test_the_probe_reads_at_a_credible_speed():
    probe = BandwidthProbe(threads=2, num_bytes=2**24)
    try:
        assert 1e8 < probe.measure() < 1e13
    finally:
        probe.close()


@needs_proc
def test_memory_grows_with_what_is_held():
    before = memory()["anonymous_bytes"]
    held = b"x" * 2**26
    grown = memory()["anonymous_bytes"] - before
    assert 0.9 * len(held) < grown < 2 * len(held)
    assert memory()["peak_resident_bytes"] >= memory()["anonymous_bytes"]


@needs_proc
def test_the_peak_starts_anew():
    held = b"x" * 2**26
    high = memory()["peak_resident_bytes"]
    del held
    reset_peak_memory()
    low = memory()["peak_resident_bytes"]
    assert low < high or not os.access("/proc/self/clear_refs", os.W_OK)


def test_the_environment_names_versions_and_no_folder():
    found = environment(threads=3)
    assert found["threads"] == 3
    assert {"torch", "transformers", "python", "processor", "cores"} <= found.keys()
    assert not any(os.sep in str(value) for value in found.values())
