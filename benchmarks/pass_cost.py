"""Time of one pass of target and draft over one row and over a step's rows.

    python benchmarks/pass_cost.py [--model DIR --draft DIR] [--rows 1 9] [--output FILE]

As in a step, one pass of the target is followed by several of the draft (its mean counts), so the
draft's first pass finds the processor's caches full of the target's weights. Alternating also lets
a drift of the machine hit both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import record
import torch

from foretoken.assets import EMBEDDED
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.loading import load_model


def prepare(model: LanguageModel, num_cached: int) -> tuple[LanguageModel, KVCache, CachedSequence]:
    """Return a model with a sequence of some cached tokens."""
    cache = model.new_cache(num_cached + 64)
    sequence = cache.open()
    prompt = Segment(sequence, [1] * num_cached, range(-1, num_cached - 1))
    model.forward(model.batch(cache, [prompt]), [])
    cache.commit([(sequence, range(num_cached))])
    return model, cache, sequence


def time_pass(
    model: LanguageModel, cache: KVCache, sequence: CachedSequence, num_rows: int
) -> float:
    """Return the milliseconds of one pass over a chain of new rows, all with logits."""
    chain = Segment(sequence, [2] * num_rows, range(-1, num_rows - 1))
    with cache.speculate([sequence]):
        batch = model.batch(cache, [chain])
        start_s = time.perf_counter()
        model.forward(batch, range(num_rows))
        return 1000 * (time.perf_counter() - start_s)


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(EMBEDDED["stories"].target))
    parser.add_argument("--draft", default=str(EMBEDDED["stories"].draft))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 9])
    parser.add_argument("--cached", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--draft-passes", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    target = prepare(load_model(args.model), args.cached)
    draft = prepare(load_model(args.draft), args.cached)
    result = {}
    for num_rows in args.rows:
        pairs = [
            (
                time_pass(*target, num_rows),
                statistics.mean(time_pass(*draft, num_rows) for _ in range(args.draft_passes)),
            )
            for _ in range(args.rounds + 20)
        ][20:]
        target_ms, draft_ms = zip(*pairs, strict=True)
        result[f"{num_rows}_rows"] = {
            "target_ms": record.spread(target_ms),
            "draft_ms": record.spread(draft_ms),
            "target_over_draft": round(
                statistics.median(target_ms) / statistics.median(draft_ms), 3
            ),
        }
    record.write("milliseconds of one pass of target and draft", result, args.output)


if __name__ == "__main__":
    main()
