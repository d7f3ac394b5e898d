"""What the processor can do at most, beside what the matrix products reach.

    python benchmarks/roofline.py [--threads 1 2] [--rounds N] [--rows 1 16] [--output FILE]

Peak rates of the instructions behind the products (registers only, no memory), read bandwidth, and
`kernels.multiply` with a matrix in the cache and one far larger than it. All of them take turns
within a round, and the best round of each counts: a shared machine only ever takes away. From
these follows what a pass of several rows costs at least, in passes of one row: the matrices have
to be read once for either, and multiplied with every row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import record
from numba.core import cgutils, types
from numba.extending import intrinsic

from foretoken.core.jit import jit
from foretoken.models import kernels, llvm, simd
from foretoken.models.products import BFLOAT16_PAIRS, HAS_BFLOAT16_PRODUCTS, PANEL

NUM_SUMS = 24  # independent, as many as a block of twelve rows has: enough to hide the latency
UNROLLED = 8
LANES = llvm.LANES
DEPTH = 1536
IN_CACHE_BYTES = 512 << 10  # per thread; half of a core's second level here
OUT_OF_CACHE_BYTES = 192 << 20  # per thread; six times the third level here


def _registers_only(name: str, add: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """Return an intrinsic that applies one instruction `UNROLLED * NUM_SUMS` times per turn.

    Its factors are arguments, because the compiler would leave out products of constants.
    """

    def loop(typing_context: Any, num_turns: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            cells = [cgutils.alloca_once(builder, llvm.FLOATS) for _ in range(NUM_SUMS)]
            for cell in cells:
                builder.store(llvm.constant(0.0), cell)
            with cgutils.for_range(builder, args[0]):
                for _ in range(UNROLLED):
                    for cell in cells:
                        builder.store(add(builder, builder.load(cell), *args[1:]), cell)
            total = builder.load(cells[0])
            for cell in cells[1:]:
                total = builder.fadd(total, builder.load(cell))
            return llvm.reduce(builder, total, builder.fadd)

        return types.float32(types.intp, simd.VECTOR, simd.VECTOR), generate

    loop.__name__ = loop.__qualname__ = name
    return intrinsic(loop)


def _add_float32(builder: Any, total: Any, a: Any, b: Any) -> Any:
    return llvm.fma(builder, a, b, total)


def _add_bfloat16(builder: Any, total: Any, a: Any, b: Any) -> Any:
    pairs = [builder.bitcast(value, BFLOAT16_PAIRS) for value in (a, b)]
    return llvm.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", llvm.FLOATS, [total, *pairs])


_float32_turns = _registers_only("_float32_turns", _add_float32)
_bfloat16_turns = _registers_only("_bfloat16_turns", _add_bfloat16)


@jit
def float32_peak(num_turns, a, b):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Run float32 multiply-adds."""
    return _float32_turns(num_turns, simd.splat(a), simd.splat(b))


@jit
def bfloat16_peak(num_turns, a, b):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Run bfloat16 multiply-adds, two to a lane."""
    return _bfloat16_turns(num_turns, simd.splat(a), simd.splat(b))


@jit
def read_all(data):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Read an array of float32 once."""
    a = b = c = d = simd.splat(np.float32(0))
    for i in range(0, len(data), 4 * LANES):
        a = simd.add(a, simd.load(data, i))
        b = simd.add(b, simd.load(data, i + LANES))
        c = simd.add(c, simd.load(data, i + 2 * LANES))
        d = simd.add(d, simd.load(data, i + 3 * LANES))
    return simd.total(simd.add(simd.add(a, b), simd.add(c, d)))


@jit
def multiply_all(x, num_rows, w, depth, out, num_times):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Multiply rows with a packed matrix, as a pass does, so many times."""
    num_panels = len(w) // (depth * PANEL)
    step = kernels.panels_per_task(num_rows, num_panels)
    for _ in range(num_times):
        for panel in range(0, num_panels, step):
            stop = min(panel + step, num_panels)
            following = stop if stop < num_panels else 0
            kernels.multiply(
                x, depth, num_rows, w, 0, panel, stop, following, depth, out, num_panels * PANEL
            )


class Race:
    """Times one kind of work, the same on every thread, on arrays of each thread's own.

    Args:
        work: Called with the number of the thread; lets other threads run meanwhile.
        amount: What one call does, in units of which the rate per second is wanted.
    """

    def __init__(self, work: Callable[[int], Any], amount: float) -> None:
        self._work = work
        self._amount = amount
        self.rates: list[float] = []
        work(0)  # compiles

    def run(self, pool: ThreadPoolExecutor, num_threads: int) -> None:
        """Measure once; the rate is that of all threads together."""
        start_s = time.perf_counter()
        list(pool.map(self._work, range(num_threads)))
        self.rates.append(num_threads * self._amount / (time.perf_counter() - start_s))


def peaks(num_turns: int = 40_000) -> dict[str, Race]:
    """Return races of bare instructions; their amounts are multiply-adds."""
    per_turn = UNROLLED * NUM_SUMS * LANES
    factors = np.float32(1.5), np.float32(0.5)
    amount = num_turns * per_turn
    races = {"float32_macs": Race(lambda _: float32_peak(num_turns, *factors), amount)}
    if HAS_BFLOAT16_PRODUCTS:
        races["bfloat16_macs"] = Race(lambda _: bfloat16_peak(num_turns, *factors), 2 * amount)
    return races


def reading(max_threads: int) -> dict[str, Race]:
    """Return the race for reading memory; its amount is bytes."""
    arrays = [np.ones(OUT_OF_CACHE_BYTES // 4, np.float32) for _ in range(max_threads)]
    return {"read_bytes": Race(lambda thread: read_all(arrays[thread]), OUT_OF_CACHE_BYTES)}


def products(kind: Any, rows: Sequence[int], max_threads: int) -> dict[str, Race]:
    """Return races of matrix products; their amounts are multiply-adds."""
    name = "bfloat16" if kind is np.uint16 else "float32"
    races = {}
    for place, num_bytes in (("in_cache", IN_CACHE_BYTES), ("memory", OUT_OF_CACHE_BYTES)):
        panel_bytes = DEPTH * PANEL * np.dtype(kind).itemsize
        num_panels = num_bytes // panel_bytes
        matrices = [np.zeros(num_panels * DEPTH * PANEL, kind) for _ in range(max_threads)]
        for matrix in matrices:
            matrix.fill(1)  # a page of its own for every page, none of zeros that all share
        num_times = max(1, OUT_OF_CACHE_BYTES // 8 // (num_panels * panel_bytes))
        for num_rows in rows:
            x = np.ones(num_rows * DEPTH, kind)
            out = [np.zeros(num_rows * num_panels * PANEL, np.float32) for _ in range(max_threads)]
            races[f"{name}_{num_rows}_rows_{place}_macs"] = Race(
                lambda thread, x=x, n=num_rows, w=matrices, out=out, times=num_times: multiply_all(
                    x, n, w[thread], DEPTH, out[thread], times
                ),
                num_rows * num_times * num_panels * PANEL * DEPTH,
            )
    return races


def bounds(best: dict[str, float], rows: Sequence[int]) -> dict[str, Any]:
    """Return for each type what passes of several rows cost, in passes of one row.

    At least: what reading or multiplying takes, whichever is more. Reached: by `multiply`.
    """
    found: dict[str, Any] = {}
    for name, num_bytes in (("bfloat16", 2), ("float32", 4)):
        one = f"{name}_1_rows_memory_macs"
        if f"{name}_macs" not in best or one not in best:
            continue
        weights_per_s = best["read_bytes"] / num_bytes
        for num_rows in rows:
            macs_per_s = best[f"{name}_{num_rows}_rows_memory_macs"]
            found[f"{name}_{num_rows}_rows"] = {
                "at_least": round(max(1.0, num_rows * weights_per_s / best[f"{name}_macs"]), 3),
                "reached": round(num_rows * best[one] / macs_per_s, 3),
                "share_of_peak": round(macs_per_s / best[f"{name}_macs"], 3),
            }
    return found


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    most = max(args.threads)
    result: dict[str, Any] = {"depth": DEPTH, "rounds": args.rounds}
    with ThreadPoolExecutor(most) as pool:
        for num_threads in args.threads:
            races = peaks() | reading(most)
            for kind in (np.uint16, np.float32):
                races |= products(kind, args.rows, most)
            for _ in range(args.rounds):
                for race in races.values():
                    race.run(pool, num_threads)
            best = {name: max(race.rates) for name, race in races.items()}
            result[f"{num_threads}_threads"] = {
                "billions_per_s": {
                    name: {
                        "max": round(best[name] / 1e9, 2),
                        "median": round(statistics.median(race.rates) / 1e9, 2),
                    }
                    for name, race in races.items()
                },
                "in_passes_of_one_row": bounds(best, args.rows),
            }
    record.write(
        "multiply-adds and bytes per second: peak, and of the matrix products", result, args.output
    )


if __name__ == "__main__":
    main()
