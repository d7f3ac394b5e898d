"""Time of a target's pass behind what heads do with its states, in torch and in our own code.

    python benchmarks/torch_threads.py --model DIR [--dtype bfloat16] [--threads 2] [--output FILE]

A pass is timed right behind each of: nothing, a product of joined states, and taking rows of
states. All take turns, in an order that rotates, and ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import record
import torch

from foretoken.models.batch import Segment
from foretoken.models.heads.fusion import serve_fusion
from foretoken.models.loading import load_model
from foretoken.models.packed import pack_matrix
from foretoken.models.state_rows import join_columns, take_rows

NUM_LAYERS, NUM_KEPT, HEAD_WIDTH, NUM_CACHED, WARM_UP = 3, 11, 384, 64, 3


def works(width: int, num_rows: int) -> dict[str, Callable[[], object]]:
    """Return what may come before a pass: of three layers' states and a head of 3 x 128."""
    torch.manual_seed(0)
    weight = torch.randn(HEAD_WIDTH, NUM_LAYERS * width)
    packed, fused = pack_matrix(weight), serve_fusion(weight, None)
    hidden = [torch.randn(num_rows, width) for _ in range(NUM_LAYERS)]
    kept = [states[:NUM_KEPT].clone() for states in hidden]
    product = packed or (lambda rows: rows @ weight.T)
    return {
        "nothing": lambda: None,
        "product by torch": lambda: product(torch.cat(kept, 1)),
        "product of ours": lambda: fused(join_columns(kept)),
        "rows by torch": lambda: [states[list(range(num_rows))] for states in hidden],
        "rows of ours": lambda: [take_rows(states, range(num_rows)) for states in hidden],
    }


def ratio(times: Iterable[float], plain: Iterable[float]) -> float:
    """Return the median of the ratios within rounds."""
    return round(statistics.median(one / other for one, other in zip(times, plain, strict=True)), 3)


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = load_model(args.model, dtype=args.dtype)
    cache = target.new_cache(NUM_CACHED + 2 * args.rows)
    sequence = cache.open()
    chain = Segment(sequence, [1] * NUM_CACHED, range(-1, NUM_CACHED - 1))
    target.forward(target.batch(cache, [chain]), [])
    cache.commit([(sequence, range(NUM_CACHED))])

    def time_pass() -> float:
        """Return the milliseconds of a pass over a chain of new rows."""
        segment = Segment(sequence, [2] * args.rows, range(-1, args.rows - 1))
        with cache.speculate([sequence]):
            batch = target.batch(cache, [segment])
            start_s = time.perf_counter()
            target.forward(batch, range(args.rows))
            return 1000 * (time.perf_counter() - start_s)

    before = works(target.info.hidden_size, 24)
    names = list(before)
    work_ms: dict[str, list[float]] = {name: [] for name in names}
    pass_ms: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds + WARM_UP):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(0.01)  # whoever still spins from the last turn has gone to sleep
            start_s = time.perf_counter()
            before[name]()
            work_ms[name].append(1000 * (time.perf_counter() - start_s))
            pass_ms[name].append(time_pass())
    result = {}
    for name in names:
        work, mine, plain = (
            times[WARM_UP:] for times in (work_ms[name], pass_ms[name], pass_ms["nothing"])
        )
        both = map(sum, zip(work, mine, strict=True))
        result[name] = {
            "work_ms": record.spread(work),
            "pass_ms": record.spread(mine),
            "pass_over_that_behind_nothing": ratio(mine, plain),
            "both_over_a_pass_behind_nothing": ratio(both, plain),
        }
    record.write("milliseconds of a pass behind what heads do", result, args.output)


if __name__ == "__main__":
    main()
