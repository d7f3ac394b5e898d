"""Memory and times of the index behind the drafter `suffix`, at several sizes.

    python benchmarks/suffix.py [--tokens N ...] [--queries N] [--at-once] [--output FILE]

Outputs of 256 tokens are added up to a size. Each is made of four runs of 64 tokens, every other
of which begins like a phrase of a pool for up to its whole length; the rest is drawn by Zipf's
law. So every length of match occurs. Then come the look-ups: contexts from outputs that are held,
one token in 64 changed, each followed by the best tree of 8 and of 64 nodes. Each context comes
once per size of tree, so the processor's caches know little of it. Adding is timed with the index
full: every output evicts one. Processor time stands beside wall time: what else runs on the
machine hardly lengthens it. Peak memory is that of the process, above what it had before.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
from numpy.typing import NDArray

from foretoken.drafters.copying import Shape, best_tree
from foretoken.drafters.suffix_index import SuffixIndex

TEXT_LENGTH = 256
VOCAB_SIZE = 32_000
RUN_LENGTH = 64
NUM_PHRASES = 20_000
MAX_MATCH = MAX_PLACES = 64


class Outputs:
    """Makes outputs; the same ones in every run."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)
        self._phrases = self._fresh((NUM_PHRASES, RUN_LENGTH))
        self._left: list[NDArray[np.int32]] = []

    def next(self) -> NDArray[np.int32]:
        """Return the next output."""
        if not self._left:
            self._left = list(self._many(1024))
        return self._left.pop()

    def _many(self, count: int) -> NDArray[np.int32]:
        shape = (count, TEXT_LENGTH // RUN_LENGTH)
        phrases = self._phrases[self._generator.zipf(1.3, shape) % NUM_PHRASES]
        lengths = self._generator.integers(-RUN_LENGTH, RUN_LENGTH + 1, shape)  # half copy nothing
        is_copied = np.arange(RUN_LENGTH) < lengths[..., None]
        runs = np.where(is_copied, phrases, self._fresh((*shape, RUN_LENGTH)))
        return runs.reshape(count, TEXT_LENGTH).astype(np.int32)

    def _fresh(self, shape: tuple[int, ...]) -> NDArray[np.int32]:
        return (self._generator.zipf(1.2, shape) % VOCAB_SIZE).astype(np.int32)


def measure(max_tokens: int, num_queries: int, *, at_once: bool) -> dict[str, Any]:
    """Fill an index and return what it takes."""
    outputs = Outputs()
    warm = SuffixIndex(10_000)
    for _ in range(50):  # what is called below is compiled now
        warm.add_text(outputs.next())
    look_up(warm, warm.texts()[9:73], Shape(8, 8, 8, 1.0, 4, 0.1))
    before_bytes = peak_bytes()
    index = SuffixIndex(max_tokens, max_tokens if at_once else 0)
    start_s = time.perf_counter()
    making_s = 0.0
    worst_add_s = 0.0
    while index.num_tokens + TEXT_LENGTH + 1 <= max_tokens:
        made_s = time.perf_counter()
        output = outputs.next()
        add_s = time.perf_counter()
        index.add_text(output)
        making_s += add_s - made_s
        worst_add_s = max(worst_add_s, time.perf_counter() - add_s)
    fill_s = time.perf_counter() - start_s - making_s
    news = [outputs.next() for _ in range(num_queries)]
    adds_us = np.array([timed_us(index.add_text, output) for output in news])
    result = {
        "max_tokens": max_tokens,
        "index_bytes_per_token": round(index.num_bytes / max_tokens, 2),
        "index_gib": round(index.num_bytes / 2**30, 3),
        "peak_gib_above_start": round((peak_bytes() - before_bytes) / 2**30, 3),
        "fill_us_per_token": round(fill_s * 1e6 / index.num_tokens, 4),
        "longest_growth_s": round(worst_add_s, 3),
        "add_and_evict_us_per_token": percentiles(adds_us / TEXT_LENGTH),
    }
    queries = contexts(index.texts(), num_queries)
    for max_nodes in (8, 64):
        shape = Shape(max_nodes, max_nodes, max_nodes, 1.0, 4, 0.1)
        times_us = np.array([timed_us(look_up, index, query, shape) for query in queries])
        result[f"look_up_us_{max_nodes}_nodes"] = percentiles(times_us)
    num_places = [len(index.find(query, MAX_PLACES).starts) for query in queries]
    result["mean_places_found"] = round(float(np.mean(num_places)), 1)
    return result


def contexts(texts: NDArray[np.int32], num_queries: int) -> list[NDArray[np.int32]]:
    """Return contexts that occur, up to one changed token in 64."""
    generator = np.random.default_rng(1)
    queries = []
    while len(queries) < num_queries:
        end = int(generator.integers(TEXT_LENGTH, len(texts)))
        query = texts[end - MAX_MATCH : end].copy()
        query[generator.integers(0, MAX_MATCH)] = 5
        if (query >= 0).all():
            queries.append(query)
    return queries


def look_up(index: SuffixIndex, query: NDArray[np.int32], shape: Shape) -> None:
    """Do what the drafter does for past outputs in a step."""
    best_tree(index.find(query, MAX_PLACES), shape)


def timed_us(function: Any, *arguments: Any) -> tuple[float, float]:
    """Return how long a call takes, by the clock and of the processor."""
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    function(*arguments)
    end_s, end_cpu_s = time.perf_counter(), time.thread_time()
    return (end_s - start_s) * 1e6, (end_cpu_s - start_cpu_s) * 1e6


def percentiles(times_us: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Return median, 99th percentile and maximum of (clock, processor) times, [N, 2]."""
    return {
        name: dict(
            zip(
                ("p50", "p99", "max"),
                np.percentile(column, [50, 99, 100]).round(3).tolist(),
                strict=True,
            )
        )
        for name, column in zip(("wall", "cpu"), times_us.T, strict=True)
    }


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each size and write a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--at-once", action="store_true", help="make room first, as for a file")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sizes = [
        measure(size, arguments.queries, at_once=arguments.at_once)
        for size in sorted(arguments.tokens)
    ]
    record.write(
        "Index of the drafter suffix: memory, adding, look-ups",
        {"settings": {"text_length": TEXT_LENGTH, "queries": arguments.queries}, "sizes": sizes},
        arguments.output,
    )


if __name__ == "__main__":
    main()
