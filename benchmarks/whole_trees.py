"""Time of drafting with the embedded pair: trees grown in one call, and level by level.

    python benchmarks/whole_trees.py [--requests N] [--temperature T] [--rounds N] [--output FILE]

The same requests are served in both ways and by plain decoding, in turns, by one engine; only
steps that serve all requests at once count. Drafts and tokens are the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import record
import torch

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.core.draft import Draft
from foretoken.drafters.base import DraftContext
from foretoken.drafters.model_drafter import ModelDrafter

WAYS = ("whole", "by level", "plain")


class Timer:
    """Serves prompts in one way or another; remembers times of steps, in milliseconds.

    Attributes:
        steps_ms: Of all steps since the last turn began.
        drafts_ms: Of drafting in them.
    """

    def __init__(self, llm: LLM, temperature: float) -> None:
        self.steps_ms: list[float] = []
        self.drafts_ms: list[float] = []
        self._llm = llm
        self._temperature = temperature
        [self._drafter] = [
            drafter for drafter in llm.engine.drafters.values() if isinstance(drafter, ModelDrafter)
        ]
        self._whole = self._drafter._whole_trees
        propose = self._drafter.propose

        def timed(contexts: Sequence[DraftContext]) -> list[Draft]:
            start_s = time.perf_counter()
            drafts = propose(contexts)
            self.drafts_ms.append(1000 * (time.perf_counter() - start_s))
            return drafts

        self._drafter.propose = timed  # type: ignore[method-assign]

    def turn(self, way: str, groups: Sequence[Sequence[str]]) -> float:
        """Serve groups of prompts, each until one of them ends; return milliseconds per token."""
        self._drafter._whole_trees = self._whole if way == "whole" else None
        self.steps_ms.clear()
        self.drafts_ms.clear()
        num_tokens = sum(self._serve(group, () if way == "plain" else None) for group in groups)
        return sum(self.steps_ms) / num_tokens

    def _serve(self, prompts: Sequence[str], drafters: tuple[str, ...] | None) -> int:
        engine = self._llm.engine
        requests = [
            engine.add_request(
                self._llm.encode(prompt),
                SamplingParams(temperature=self._temperature, seed=index, max_new_tokens=96),
                drafters=drafters,
            )
            for index, prompt in enumerate(prompts)
        ]
        while all(request.finish_reason is None for request in requests):
            start_s = time.perf_counter()
            engine.step()
            self.steps_ms.append(1000 * (time.perf_counter() - start_s))
        num_tokens = sum(len(request.output_ids) for request in requests)
        for request in requests:
            engine.abort(request.request_id)
        return num_tokens


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=1, help="at once")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(1)
    pair = EMBEDDED["stories"]
    options = ",".join(f"{name}={value}" for name, value in pair.draft_options.items())
    llm = LLM(
        "stories",
        drafters=f"draft-model:path={pair.draft},{options}",
        max_nodes=8,
        adaptive=False,
        max_requests=args.requests,
    )
    prompts = record.OPENINGS.read_text(encoding="utf-8").splitlines()[:16]
    groups = [
        prompts[start : start + args.requests] for start in range(0, len(prompts), args.requests)
    ]
    timer = Timer(llm, args.temperature)
    found: dict[str, dict[str, list[float]]] = {
        way: {"step_ms": [], "draft_ms": [], "ms_per_token": []} for way in WAYS
    }
    for turn in range(args.rounds + 1):  # the first warms up
        for way in WAYS if turn % 2 else WAYS[::-1]:
            ms_per_token = timer.turn(way, groups)
            if turn:
                found[way]["step_ms"].append(median(timer.steps_ms))
                found[way]["draft_ms"].append(median(timer.drafts_ms or [0.0]))
                found[way]["ms_per_token"].append(ms_per_token)
    record.write(
        "milliseconds, medians of steps by round, embedded pair",
        {
            "temperature": args.temperature,
            "requests": args.requests,
            **{
                way: {name: record.spread(values) for name, values in times.items()}
                for way, times in found.items()
            },
        },
        args.output,
    )


if __name__ == "__main__":
    main()
