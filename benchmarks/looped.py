"""Tokens in flight on the embedded model `looped`: ticks per token, and what stepping aside costs.

    OMP_NUM_THREADS=1 python benchmarks/looped.py --output FILE

Ticks do not depend on the machine's load. Times do: plain decoding, the pipelined loop with whole
passes only, and `auto` take turns, so that their ratios suffer less.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from record import spread, write

from foretoken import LLM, SamplingParams
from foretoken.engine.pipelined import Pipelined
from foretoken.planner.in_flight import FixedFlightPlanner, FlightPlan

PROMPTS = ["Once upon a time", "The little dog", "Lily went to the", "One day, a boy named Tim"]
NUM_TICKED = 96  # tokens per prompt
NUM_TIMED = 200
WAYS = (
    ("coupled", "speed:exit_loop=1"),
    ("coupled", "speed:exit_loop=1,check=lazy"),
    ("coupled", "loopspec:first_exit=1,second_exit=0"),
    ("coupled", "loopspec:first_exit=1,second_exit=2"),
    ("mss", "loopspec:first_exit=1,second_exit=0"),
    ("mss", "loopspec:first_exit=1,second_exit=2"),
)


def ticks(verifier: str, drafter: str, temperature: float) -> dict[str, Any]:
    """Return ticks and draft tokens per token behind each prompt's first."""
    llm = LLM("looped", drafters=drafter, verifier=verifier, adaptive=False)
    params = [
        SamplingParams(
            max_new_tokens=NUM_TICKED, temperature=temperature, seed=seed, ignore_eos=True
        )
        for seed in range(len(PROMPTS))
    ]
    outputs = llm.generate(PROMPTS, params)
    num_tokens = sum(len(output.token_ids) - 1 for output in outputs)
    return {
        "verifier": verifier,
        "drafter": drafter,
        "temperature": temperature,
        "ticks_per_token": round(sum(it.stats.num_ticks for it in outputs) / num_tokens, 3),
        "drafted_per_token": round(
            sum(it.stats.num_draft_tokens for it in outputs) / num_tokens, 3
        ),
    }


def stepping_aside(num_rounds: int) -> dict[str, Any]:
    """Return how long greedy decoding takes against the engine without drafters."""
    whole = LLM("looped", drafters="speed", threads=1)
    sequential = FixedFlightPlanner(FlightPlan(exit_loop=1, max_in_flight=1))
    whole.engine.loop = Pipelined("speed", 4, sequential)
    ways = {
        "plain": LLM("looped", drafters="none", threads=1),
        "whole passes of the pipelined loop": whole,
        "auto": LLM("looped", threads=1),
    }
    rounds = [{name: _seconds(llm) for name, llm in ways.items()} for _ in range(1 + num_rounds)]
    return {
        name: spread([times[name] / times["plain"] for times in rounds[1:]])
        for name in ways
        if name != "plain"
    }


def _seconds(llm: LLM) -> float:
    start_s = time.perf_counter()
    llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=NUM_TIMED, ignore_eos=True))
    return time.perf_counter() - start_s


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    counted = [
        ticks(verifier, drafter, temperature)
        for temperature in (0.0, 1.0)
        for verifier, drafter in WAYS
        if temperature or verifier == "coupled"
    ]
    result = {"ticks": counted, "time_over_plain": stepping_aside(args.rounds)}
    write("tokens in flight on looped", result, args.output)


if __name__ == "__main__":
    main()
