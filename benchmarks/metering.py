"""What the server's metering costs per step: steps of a real run, counted again in a loop.

    python benchmarks/metering.py [--requests N ...] [--drafter SPEC ...] [--output FILE]

Works, drafts, verdicts and times of real steps are kept as the meter got them, requests as they
were then. They are then counted again and again by a new meter: at once, one after the other
(`warm`), and with the processor's caches swept before each (`swept`), as a model's pass does.
Microseconds of processor time, reading the clock included for `swept`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import record
import torch

from foretoken import LLM, SamplingParams
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_cache import load_or_measure
from foretoken.server.meter import Meter, MeteringPlanner
from foretoken.server.speedup import PlainPace

SWEPT_BYTES = 16 * 2**20
MIN_STEPS = 300  # of a measurement

Step = tuple[Any, ...]
"""What `Meter.add_step` takes."""


class KeepingMeter(Meter):
    """Keeps what it is told, since requests go on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def add_step(self, works: Sequence[Any], *others: Any) -> None:
        """Keep a step; of works, what meters look at."""
        names = ("num_known", "num_keys")
        kept = [
            SimpleNamespace(
                request=SimpleNamespace(token_ids=range(len(work.request.token_ids))),
                **{name: getattr(work, name) for name in names},
            )
            for work in works
        ]
        self.steps.append((kept, *others))


def steps_of(drafter: str, num_requests: int, num_tokens: int) -> tuple[list[Step], CostCurve]:
    """Return the steps of a run, and the cost curve of its target."""
    options: dict[str, Any] = {"adaptive": False, "max_requests": num_requests, "threads": 1}
    llm = LLM("stories", drafters=drafter, **options)
    meter, planner = KeepingMeter(), llm.engine.parts.planner
    llm.engine.parts = replace(llm.engine.parts, planner=MeteringPlanner(planner, meter))
    prompts = record.OPENINGS.read_text(encoding="utf-8").splitlines()[:num_requests]
    llm.generate(prompts, SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, seed=1))
    steps = meter.steps * -(-MIN_STEPS // len(meter.steps))
    return steps, load_or_measure(llm.engine.parts.target)


def warm_us(steps: Sequence[Step], curve: CostCurve) -> float:
    """Return the processor time of a step that is counted right after another."""
    meter = Meter(PlainPace(curve))
    start_s = time.process_time()
    for step in steps:
        meter.add_step(*step)
    meter.totals()  # counts what is left
    return 1e6 * (time.process_time() - start_s) / len(steps)


def swept_us(steps: Sequence[Step], curve: CostCurve, sweep: np.ndarray) -> float:
    """Return the time of a step when something else has filled the caches before it."""
    meter, spent_s = Meter(PlainPace(curve)), 0.0
    for step in steps:
        sweep += 1
        start_s = time.process_time()
        meter.add_step(*step)
        spent_s += time.process_time() - start_s
    start_s = time.process_time()
    meter.totals()
    return 1e6 * (spent_s + time.process_time() - start_s) / len(steps)


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, action="append", help="at once; 1 and 16")
    parser.add_argument("--drafter", action="append", help="auto and suffix")
    parser.add_argument("--tokens", type=int, default=100, help="per request")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sweep = np.zeros(SWEPT_BYTES, np.uint8)
    cells = []
    for drafter in args.drafter or ("auto", "suffix"):
        for num_requests in args.requests or (1, 16):
            steps, curve = steps_of(drafter, num_requests, args.tokens)
            drafts = [draft for _, scored, *_ in steps for draft in scored]
            cells.append(
                {
                    "drafter": drafter,
                    "requests": num_requests,
                    "steps": len(steps),
                    "draft_tokens_per_draft": round(
                        float(np.mean([draft.tree.num_draft_tokens for draft in drafts])), 1
                    ),
                    "warm_us": record.spread([warm_us(steps, curve) for _ in range(args.rounds)]),
                    "swept_us": record.spread([swept_us(steps, curve, sweep) for _ in range(3)]),
                }
            )
    record.write("microseconds of metering per step", {"cells": cells}, args.output)


if __name__ == "__main__":
    main()
