"""What the machine itself can do, and what it is: read bandwidth, processor, versions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from foretoken.core.jit import jit
from foretoken.planner.cost_cache import processor_name

BUFFER_BYTES = 512 * 2**20  # far beyond any cache
NUM_REPEATS = 4
PACKAGES = ("torch", "transformers", "numpy", "numba", "safetensors")


@jit
def _sum_words(words: Any) -> int:
    # Integers: their order of addition is free, so that the compiler can use wide registers.
    total = 0
    for index in range(words.size):
        total += words[index]
    return total


class BandwidthProbe:
    """Reads a large array with all threads, two ways, and keeps the faster one.

    A compiled loop per thread and torch's own sum come out about equal where both are given the
    cores; which one wins depends on the machine.

    Args:
        threads: As the systems under test.
        num_bytes: Size of the array; None for one far beyond any cache.
    """

    def __init__(self, threads: int, num_bytes: int | None = None) -> None:
        num_bytes = num_bytes or BUFFER_BYTES
        # Written once, so that every page is there; as floats they are ones.
        self._words = np.full(num_bytes // 8, 0x3F800000_3F800000, dtype=np.int64)
        self._parts = np.array_split(self._words, threads)
        self._floats = torch.from_numpy(self._words.view(np.float32))
        self._pool = ThreadPoolExecutor(threads)
        _sum_words(self._words[:8])  # compiles

    def measure(self) -> float:
        """Return bytes per second: the best of several readings, because others only slow it."""
        best_s = min(
            _seconds(read)
            for _ in range(NUM_REPEATS)
            for read in (self._read_in_threads, self._floats.sum)
        )
        return self._words.nbytes / best_s

    def _read_in_threads(self) -> list[int]:
        return list(self._pool.map(_sum_words, self._parts))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _seconds(function: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


def environment(threads: int) -> dict[str, Any]:
    """Return versions, processor, memory and load; nothing that names this machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


__all__ = ["BandwidthProbe", "environment"]
