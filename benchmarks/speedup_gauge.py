"""How right the server's speed-up gauge is, and what its metering costs.

    python benchmarks/speedup_gauge.py [--model NAME] [--inflate SIZES] [--drafter SPEC ...]
        [--output FILE]

Every round serves the same openings plainly and with drafts, in turn, with two engines of one
process. More are served than run at once: the gauge is about the rate at which those that run
get tokens, and where nobody waits, the slowest alone decides when all are done. Only the engine
with drafts is metered, so what the gauge knows of plain decoding is what a server would know.

`truth` is the ratio of both engines' seconds in steps; `gauge` is what plain decoding was
estimated to take by the metered seconds. Both are given over rounds.

With `--clock cpu` all seconds are those that the processor worked for this process, which other
programs of a shared machine disturb less. One thread only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record

from foretoken import LLM, SamplingParams
from foretoken.bench.inflate import Shape, cache_folder, inflate
from foretoken.engine import step
from foretoken.engine.names import resolve_model
from foretoken.planner.cost_measure import measure_cost
from foretoken.server.metrics import ServerMetrics
from foretoken.server.windows import Totals

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class TimedMetrics(ServerMetrics):
    """Metrics whose counting of steps is timed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(measure=partial(measure_cost, clock=clock), clock=clock)
        self.spent_s: list[float] = []
        add_step = self.meter.add_step

        def timed(*args: Any) -> None:
            start_s = clock()
            add_step(*args)
            self.spent_s.append(clock() - start_s)

        self.meter.add_step = timed  # type: ignore[method-assign]


def serve(
    llm: LLM, metrics: TimedMetrics, prompts: list[str], tokens: int, temperature: float
) -> Totals:
    """Serve all prompts at once; return what their steps did."""
    before = metrics.meter.totals()
    params = [
        SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=seed, ignore_eos=True)
        for seed in range(len(prompts))
    ]
    llm.generate(prompts, params)
    return metrics.meter.totals().since(before)


def compare(
    args: argparse.Namespace, model: str, drafter: str, num_requests: int
) -> dict[str, Any]:
    """Serve plainly and with drafts in turn; return the gauge beside the measured ratio."""
    options = {"threads": args.threads, "dtype": args.dtype, "max_requests": num_requests}
    plain = LLM(model, drafters="none", **options)
    fast = LLM(model, drafters=drafter, **options)
    watches = []
    for llm in (plain, fast):
        watch = TimedMetrics(CLOCKS[args.clock])
        watch.watch(llm.engine)
        watches.append(watch)
    openings = record.OPENINGS.read_text(encoding="utf-8").splitlines()
    truths, gauges, totals = [], [], Totals()
    start = watches[1].meter.totals()
    for number in range(args.rounds + 1):
        count = args.per_place * num_requests
        first = number * count % (len(openings) - count)
        prompts = openings[first : first + count]
        work = (prompts, args.tokens, args.temperature)
        seconds = sum(serve(plain, watches[0], *work).step_s.values())
        totals = serve(fast, watches[1], *work)
        if number:  # the first is for warming up
            truths.append(seconds / sum(totals.step_s.values()))
            gauges.append(totals.speedup)
        else:
            watches[1].spent_s.clear()
    totals = watches[1].meter.totals().since(start)
    spent_us = [1e6 * spent for spent in watches[1].spent_s]
    return {
        "drafter": drafter,
        "requests": num_requests,
        "truth": record.spread(truths),
        "gauge": record.spread(gauges),
        "gauge_by_truth": record.spread([g / t for g, t in zip(gauges, truths, strict=True)]),
        "tokens_per_step": round(totals.tokens_per_request_step or 0.0, 3),
        "share_of_plain_steps": round(totals.steps["plain"] / totals.steps.total(), 3),
        "metering_us": {
            "median": round(statistics.median(spent_us), 1),
            "p99": round(sorted(spent_us)[int(0.99 * len(spent_us))], 1),
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories")
    parser.add_argument("--inflate", help="sizes of a wider copy, such as hidden=512,layers=12")
    parser.add_argument("--drafter", action="append", default=None)
    parser.add_argument("--requests", type=int, action="append", default=None)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--per-place", type=int, default=3, help="requests, so that some wait")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    step.perf_counter = CLOCKS[args.clock]
    model = args.model
    if args.inflate:
        shape = Shape.parse(args.inflate)
        folder = cache_folder()
        model = str(inflate(Path(resolve_model(model)), shape, dtype="float32", folder=folder))
    rows = [
        compare(args, model, drafter, num_requests)
        for drafter in args.drafter or ("auto", "prompt-lookup")
        for num_requests in args.requests or (1, 4, 16)
    ]
    result = {"model": args.model, "inflate": args.inflate, "clock": args.clock, "rows": rows}
    record.write("the live speed-up against a measured one", result, args.output)


if __name__ == "__main__":
    main()
