"""Time of a step outside the model passes, 8-node trees.

    python benchmarks/overhead.py [--requests N] [--temperature T] [--rounds N] [--output FILE]

Wraps the forward of target and draft in timers, and the call in which the draft grows its trees;
what is left of the step is scheduling, drafting book-keeping, batch building, verification, commit,
decoding to text and emission. With several
requests at once, only steps that serve all of them count: those until the first one ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import torch

from foretoken import LLM, SamplingParams
from foretoken.models.adapter import LanguageModel
from foretoken.models.decoder import CompiledDecoder


class Stopwatch:
    """Adds up the time spent in wrapped calls."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.total_s += time.perf_counter() - start_s

        return timed


def serve(llm: LLM, prompts: Sequence[str], temperature: float) -> int:
    """Run prompts together until the first one ends; return the number of steps."""
    requests = [
        llm.engine.add_request(
            llm.encode(prompt),
            SamplingParams(temperature=temperature, seed=index, max_new_tokens=128),
        )
        for index, prompt in enumerate(prompts)
    ]
    num_steps = 0
    while all(request.finish_reason is None for request in requests):
        llm.engine.step()
        num_steps += 1
    for request in requests:
        llm.engine.abort(request.request_id)
    return num_steps


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=1, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8, help="per round, at least --requests")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    passes = Stopwatch()
    # Both models are LanguageModel objects, so one wrapped method times every pass.
    LanguageModel.forward = passes.wrap(LanguageModel.forward)  # type: ignore[method-assign]
    CompiledDecoder.grow = passes.wrap(CompiledDecoder.grow)  # type: ignore[method-assign]
    torch.set_num_threads(args.threads)
    llm = LLM("stories", max_nodes=8, adaptive=False, max_requests=args.requests)
    prompts = record.OPENINGS.read_text(encoding="utf-8").splitlines()
    prompts = prompts[: max(args.prompts, args.requests)]
    groups = [
        prompts[start : start + args.requests]
        for start in range(0, len(prompts) - args.requests + 1, args.requests)
    ]

    outside_ms, inside_ms, num_steps = [], [], 0
    for _ in range(args.rounds + 1):  # the first warms up
        passes.total_s, start_s = 0.0, time.perf_counter()
        num_steps = sum(serve(llm, group, args.temperature) for group in groups)
        total_s = time.perf_counter() - start_s
        outside_ms.append(1000 * (total_s - passes.total_s) / num_steps)
        inside_ms.append(1000 * passes.total_s / num_steps)
    record.write(
        "milliseconds per step, 8-node trees, embedded pair",
        {
            "temperature": args.temperature,
            "requests": args.requests,
            "steps_per_round": num_steps,
            "outside_passes_ms": record.spread(outside_ms[1:]),
            "inside_passes_ms": record.spread(inside_ms[1:]),
        },
        args.output,
    )


if __name__ == "__main__":
    main()
