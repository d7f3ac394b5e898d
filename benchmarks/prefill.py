"""What long prompts cost: the first token with and without a cached prefix, and steps with a chunk.

    python benchmarks/prefill.py [--model NAME] [--prompt-tokens N] [--rounds N] [--output FILE]

`first_token_ms`: from adding a request to its first token, one request at a time; by drafters and
prefix caching, for prompts that were not seen before (their first token differs) and for the same
ones again. The tokens of all are compared.

`step_ms`: a pass of the target with one request that decodes, and so many rows of another's prompt
beside it. Both are what docs/prefix-caching.md, decision 0014 and docs/serve.md quote.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import record
import torch

from foretoken import LLM, SamplingParams
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment

NUM_TOKENS = 24  # per request, so that drafters are heard too
CHUNKS = (0, 8, 16, 32, 64, 128, 256)
FIRST_ID = 100  # of the tokens by which prompts differ


def first_token(llm: LLM, prompt_ids: list[int]) -> tuple[float, list[int]]:
    """Return the milliseconds to the first token, and all tokens."""
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    start_s, first_s = time.perf_counter(), 0.0
    request = llm.engine.add_request(prompt_ids, params)
    while llm.engine.num_unfinished:
        if llm.engine.step() and not first_s:
            first_s = time.perf_counter() - start_s
    return 1000 * first_s, list(request.output_ids)


def story(llm: LLM, num_tokens: int) -> list[int]:
    """Return a text by the model itself, so that drafters have something to find."""
    prompt_ids = llm.encode("Once upon a time")
    num_new = num_tokens - len(prompt_ids)
    params = SamplingParams(max_new_tokens=num_new, temperature=1.0, seed=3, ignore_eos=True)
    return [*prompt_ids, *llm.generate([prompt_ids], params)[0].token_ids]


def first_tokens(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return times to the first token by drafters and prefix caching, in turn round by round."""
    llms = {
        (drafters, caching): LLM(
            args.model, drafters=drafters, prefix_caching=caching, threads=args.threads
        )
        for drafters in args.drafters or ("none", "auto")
        for caching in (False, True)
    }
    text = story(next(iter(llms.values())), args.prompt_tokens)
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in llms}
    for index in range(args.rounds + 1):  # the first warms up
        prompt_ids = [FIRST_ID + index, *text[1:]]
        outputs = []
        for key, llm in llms.items():
            new_ms, new_ids = first_token(llm, prompt_ids)
            again_ms, again_ids = first_token(llm, prompt_ids)
            times[key].append((new_ms, again_ms))
            outputs += [new_ids, again_ids]
        if any(output != outputs[0] for output in outputs):
            raise SystemExit("drafters or cached prefixes changed the tokens")
    return [
        {
            "drafters": drafters,
            "prefix_caching": caching,
            "not_seen_before": record.spread([new_ms for new_ms, _ in pairs[1:]]),
            "seen_before": record.spread([again_ms for _, again_ms in pairs[1:]]),
        }
        for (drafters, caching), pairs in times.items()
    ]


def mixed_ms(target: LanguageModel, context: int, num_rows: int, rounds: int) -> dict[str, float]:
    """Return the time of a pass over a decoding request and so many rows of a prompt."""
    cache = target.new_cache(4 * context + 64)
    decoding, prompt = cache.open(), cache.open()
    batch = target.batch(cache, [Segment(decoding, [1] * context, range(-1, context - 1))])
    target.forward(batch, [context - 1])
    cache.commit([(decoding, range(context))])
    spent_ms = []
    for _ in range(rounds + 1):
        segments = [Segment(decoding, [1], [-1])]
        if num_rows:
            segments.append(Segment(prompt, [2] * num_rows, range(-1, num_rows - 1)))
        start_s = time.perf_counter()
        with cache.speculate([segment.sequence for segment in segments]) as speculative:
            target.forward(target.batch(speculative, segments), [0]).wait()
        spent_ms.append(1000 * (time.perf_counter() - start_s))
    return record.spread(spent_ms[1:])


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stories")
    parser.add_argument("--drafters", action="append", help="none and auto")
    parser.add_argument("--prompt-tokens", type=int, default=472)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    first = first_tokens(args)
    target = LLM(args.model, drafters="none", threads=args.threads).engine.parts.target
    context = min(target.info.context_limit, 512) // 2
    steps = {
        rows: mixed_ms(target, context, rows, args.rounds)
        for rows in CHUNKS
        if rows < target.info.context_limit
    }
    record.write(
        "milliseconds to the first token, and of a pass with a chunk of a prompt beside",
        {
            "model": args.model,
            "prompt_tokens": args.prompt_tokens,
            "rounds": args.rounds,
            "first_token_ms": first,
            "decoding_context": context,
            "step_ms_by_prompt_rows": steps,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
