"""What a grammar costs per visited node, and how many tokens it drafts for free.

    python benchmarks/grammar.py --tokenizer FILE [--vocab-size V] [--texts N] [--output FILE]

Texts are written under the mask of a realistic schema by random logits that favour ending strings
early. At each token a tree of draft nodes is asked about, as a step does; then the same texts are
replayed to count the steps that plain decoding and forced drafts would take.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import record
from transformers import PreTrainedTokenizerFast

from foretoken.core.grammar import GrammarState
from foretoken.core.params import SamplingParams
from foretoken.models.grammar import GrammarCompiler
from foretoken.models.tokenizer import Tokenizer

ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 30},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["street", "city", "zip"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 10**9},
        "name": {"type": "string", "minLength": 1, "maxLength": 60},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["administrator", "editor", "viewer"]},
        "active": {"type": "boolean"},
        "score": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "shipping_address": ADDRESS,
        "billing_address": ADDRESS,
        "created_at": {"type": "string", "format": "date-time"},
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])
EXAMPLE = {
    "id": 48213,
    "name": "Maria Fernanda Lopez",
    "email": "maria.lopez@example.com",
    "role": "editor",
    "active": True,
    "score": 17.5,
    "tags": ["garden", "weekly letter"],
    "shipping_address": {"street": "12 Orchard Lane", "city": "Springfield", "zip": "62704"},
    "billing_address": {"street": "9 Harbour Street", "city": "Portland", "zip": "97201"},
    "created_at": "2026-03-14T09:26:53Z",
}
EOS_ID = 0
MAX_TOKENS = 400
WIDTH, DEPTH = 2, 4  # of the trees that are asked about


def quantiles(times_s: list[float]) -> dict[str, float]:
    """Return what a call takes, in milliseconds."""
    times_ms = 1000 * np.array(times_s)
    names = {"median_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}
    found = {name: round(float(np.percentile(times_ms, q)), 4) for name, q in names.items()}
    return {"num_calls": len(times_s), **found}


def timed_mask(
    state: GrammarState, token_ids: list[int], path: list[int], times_s: list[float]
) -> np.ndarray:
    """Return a mask and note what it took, in processor time: other programs do not count."""
    start_s = time.thread_time()
    row = state.allowed(token_ids, path)
    times_s.append(time.thread_time() - start_s)
    return row


def write_text(
    state: GrammarState,
    prompt_ids: list[int],
    likes: np.ndarray,
    rng: random.Random,
    times_s: list[float],
) -> list[int]:
    """Write one text and ask about a tree at each of its tokens; return prompt and text."""
    token_ids = list(prompt_ids)
    while not state.is_complete(token_ids) and len(token_ids) < MAX_TOKENS:
        row = timed_mask(state, token_ids, [], times_s)
        paths: list[list[int]] = [[]]
        for _ in range(DEPTH):
            grown = []
            for path in paths:
                seen = timed_mask(state, token_ids, path, times_s) if path else row
                choices = np.flatnonzero(seen)
                grown += [[*path, int(rng.choice(choices))] for _ in range(WIDTH) if len(choices)]
            paths = grown[:WIDTH]
        noise = np.random.default_rng(rng.randrange(2**32)).standard_normal(len(row))
        token_ids.append(int(np.argmax(np.where(row, noise + likes, -np.inf))))
        if token_ids[-1] == EOS_ID:
            token_ids.pop()
            break
    return token_ids


def replay(state: GrammarState, token_ids: list[int], num_prompt_ids: int) -> dict[str, Any]:
    """Return how many steps a text takes with forced drafts; plain decoding takes one a token."""
    position, num_steps, num_forced = num_prompt_ids, 0, 0
    while position < len(token_ids):
        forced = state.forced(token_ids[:position])
        rest = token_ids[position:]
        num_right = 0
        while num_right < min(len(forced), len(rest)) and forced[num_right] == rest[num_right]:
            num_right += 1
        num_forced += num_right
        position += num_right + 1  # the target's own token comes with each step
        num_steps += 1
    num_tokens = len(token_ids) - num_prompt_ids
    return {
        "num_tokens": num_tokens,
        "num_forced": num_forced,
        "num_steps": num_steps,
        "tokens_per_step": round(num_tokens / num_steps, 3),
    }


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--texts", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(args.tokenizer)))
    compiler = GrammarCompiler(tokenizer, args.vocab_size, [EOS_ID])
    params = SamplingParams(json_schema=json.dumps(SCHEMA))
    prompt_ids = tokenizer.encode("Write one customer as JSON:\n")

    def compile_once() -> float:
        start_s = time.perf_counter()
        compiler.compile(params, len(prompt_ids))
        return round(1000 * (time.perf_counter() - start_s), 3)

    result: dict[str, Any] = {
        "llguidance": llguidance.get_version(),
        "tokens": len(tokenizer.vocabulary),
        "first_compile_ms": compile_once(),  # with the table of tokens
        "same_grammar_again_ms": compile_once(),
    }
    likes = np.zeros(args.vocab_size)
    for text, token_id in tokenizer.vocabulary.items():
        likes[token_id] = 4.0 if text[:1] in '",@' and token_id < args.vocab_size else 0.0
    rng, times_s, long_times_s, lengths = random.Random(0), [], [], []
    for _ in range(args.texts):
        state = compiler.compile(params, len(prompt_ids))
        token_ids = write_text(state, prompt_ids, likes, rng, times_s)
        lengths.append(len(token_ids) - len(prompt_ids))
    result["text_tokens"] = record.spread(lengths)
    result["mask_per_node"] = quantiles(times_s)

    values = SamplingParams(json_schema='{"type": "array", "items": {"type": "integer"}}')
    state = compiler.compile(values, len(prompt_ids))
    text_ids = tokenizer.encode(json.dumps(list(range(1500))))
    for end in range(1000, 3000, 4):
        for path in ([], text_ids[end : end + 1], text_ids[end : end + 3]):
            timed_mask(state, prompt_ids + text_ids[:end], path, long_times_s)
    result["mask_per_node_after_1000_to_3000_tokens"] = quantiles(long_times_s)

    for name, separators in {"compact": (",", ":"), "spaced": (", ", ": ")}.items():
        chosen = {"whitespace_flexible": False} if name == "compact" else {}
        schema = {**SCHEMA, **({"x-guidance": chosen} if chosen else {})}
        state = compiler.compile(SamplingParams(json_schema=json.dumps(schema)), len(prompt_ids))
        text_ids = tokenizer.encode(json.dumps(EXAMPLE, separators=separators))
        result[f"example_{name}"] = replay(state, [*prompt_ids, *text_ids], len(prompt_ids))
    record.write("milliseconds of a grammar's masks, and what it forces", result, args.output)


if __name__ == "__main__":
    main()
