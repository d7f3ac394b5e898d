"""What the adaptive planner itself takes of a step, bookkeeping of acceptance included.

    python benchmarks/planner.py [--model DIR] [--drafter SPEC ...] [--output FILE]

Wraps the planner's three calls in timers and serves openings, greedily and at temperature 1, one
and sixteen at once. Steps that read prompts do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch

from foretoken import LLM, SamplingParams

CALLS = ("order", "choose", "observe")


class Watch:
    """Time of the planner's calls, step by step."""

    def __init__(self, planner: Any) -> None:
        self.steps: list[tuple[float, float]] = []  # planner's and whole step's seconds
        self._spent_s = 0.0
        for name in CALLS:
            setattr(planner, name, self._timed(name, getattr(planner, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(shares: Any, *args: Any) -> Any:
            start_s = time.perf_counter()
            result = call(shares, *args)
            self._spent_s += time.perf_counter() - start_s
            if name == "observe":
                if all(share.num_rows == 1 for share in shares):
                    self.steps.append((self._spent_s, args[-1].total_s + self._spent_s))
                self._spent_s = 0.0
            return result

        return timed


def measure(llm: LLM, watch: Watch, num_requests: int, temperature: float) -> dict[str, Any]:
    """Serve openings; return what the planner took."""
    openings = record.OPENINGS.read_text(encoding="utf-8").splitlines()[:64]
    watch.steps.clear()
    for start in range(0, 64, num_requests):
        prompts = openings[start : start + num_requests]
        params = [
            SamplingParams(
                temperature=temperature, seed=start + index, max_new_tokens=96, ignore_eos=True
            )
            for index in range(len(prompts))
        ]
        llm.generate(prompts, params)
    own_s = [own for own, _ in watch.steps]
    return {
        "requests": num_requests,
        "temperature": temperature,
        "steps": len(own_s),
        "mean_ms": round(1000 * statistics.mean(own_s), 4),
        "median_ms": round(1000 * statistics.median(own_s), 4),
        "p99_ms": round(1000 * sorted(own_s)[int(0.99 * len(own_s))], 4),
        "share_of_steps": round(sum(own_s) / sum(whole for _, whole in watch.steps), 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories")
    parser.add_argument("--drafter", action="append", default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    drafters = tuple(options.drafter or ("auto",))
    llm = LLM(options.model, drafters=drafters, adaptive=True, threads=options.threads)
    watch = Watch(llm.engine.parts.planner)
    results = [
        measure(llm, watch, num_requests, temperature)
        for num_requests in (1, 16)
        for temperature in (0.0, 1.0)
    ]
    record.write(
        "milliseconds that the planner takes of a step", {"results": results}, options.output
    )


if __name__ == "__main__":
    main()
