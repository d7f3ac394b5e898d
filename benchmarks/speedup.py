"""Speculative against plain decoding, in turn, in one process.

    python benchmarks/speedup.py [--model NAME] [--drafter SPEC] [--temperature T]
        [--prompts FILE] [--output FILE]

Every round runs all prompts plainly and speculatively, one request at a time, the order changing
from round to round. Ratios are formed round by round. Tokens must be equal, or it ends with
status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import record

from foretoken import LLM, RequestOutput, SamplingParams


def run(
    llm: LLM, prompts: list[str], params: list[SamplingParams], **how: Any
) -> tuple[list[RequestOutput], float]:
    """Return the outputs of all prompts, one request at a time, and the seconds they took."""
    start_s = time.perf_counter()
    outputs = [
        llm.generate(prompt, wanted, **how)[0]
        for prompt, wanted in zip(prompts, params, strict=True)
    ]
    return outputs, time.perf_counter() - start_s


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stories")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--max-nodes", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=Path, default=record.OPENINGS)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    llm = LLM(
        args.model,
        drafters=args.drafter,
        adaptive=False,
        max_nodes=args.max_nodes,
        threads=args.threads,
        dtype=args.dtype,
    )
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()[: args.num_prompts]
    params = [
        SamplingParams(temperature=args.temperature, seed=seed, max_new_tokens=args.tokens)
        for seed in range(len(prompts))
    ]
    plain_rates, fast_rates, outputs = [], [], []
    run(llm, prompts[:2], params[:2])  # warm-up
    for number in range(args.rounds):
        if number % 2:
            outputs, fast_s = run(llm, prompts, params)
            plain, plain_s = run(llm, prompts, params, drafters=())
        else:
            plain, plain_s = run(llm, prompts, params, drafters=())
            outputs, fast_s = run(llm, prompts, params)
        differing = [
            a.index for a, b in zip(plain, outputs, strict=True) if a.token_ids != b.token_ids
        ]
        if differing:
            sys.exit(f"prompts {differing} got other tokens with speculation")
        num_tokens = sum(len(output.token_ids) for output in outputs)
        plain_rates.append(num_tokens / plain_s)
        fast_rates.append(num_tokens / fast_s)
    stats = [output.stats for output in outputs]
    num_tokens = sum(item.num_tokens for item in stats)
    num_steps = sum(item.num_steps for item in stats)
    num_drafted = sum(item.num_draft_tokens for item in stats)
    record.write(
        "tokens per second, one request at a time, prefill included",
        {
            "num_tokens": num_tokens,
            "tokens_per_step": round(num_tokens / num_steps, 4),
            "draft_tokens_per_step": round(num_drafted / num_steps, 4),
            "acceptance_rate": round(
                sum(item.num_accepted for item in stats) / max(1, num_drafted), 4
            ),
            "plain_tokens_per_s": record.spread(plain_rates),
            "speculative_tokens_per_s": record.spread(fast_rates),
            "speed_up": record.spread(
                [fast / plain for fast, plain in zip(fast_rates, plain_rates, strict=True)]
            ),
        },
        args.output,
    )


if __name__ == "__main__":
    main()
