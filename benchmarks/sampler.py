"""Time of one choice of the target, from its row of logits to the token, for sets of controls.

    python benchmarks/sampler.py [--vocab N] [--rounds N] [--threads N] [--output FILE]

Every round emits one token, as plain decoding does, so that its share of the noise, its hash
included, counts; then it visits three nodes below it, as a tree's accepted path does. Each is
timed with histories of 1,000 and of 16,000 tokens, which are made up to have the repetitions of
text. The first choice, which reads the whole history once, stands beside the others. Processor
time stands beside wall time: what else runs on the machine hardly lengthens it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import record
import torch
from numpy.typing import NDArray

from foretoken import SamplingParams
from foretoken.core.sampling import Sampler

HISTORY_LENGTHS = (1_000, 16_000)
PATH_LENGTH = 3
NUM_ROWS = 16
EDITS = {
    "logit_bias": dict.fromkeys(range(100, 200), 1.0),
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
}
BANS = {
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[token_id, token_id + 1] for token_id in range(100)],
    "suppress_tokens": [3, 4],
    "min_new_tokens": 2,
}
FILTERS = {"top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}
CASES = {
    "greedy": ({}, False),
    "temperature": ({"temperature": 0.8}, False),
    "top-k": ({"temperature": 0.8, "top_k": 50}, False),
    "top-p": ({"temperature": 0.8, "top_p": 0.9}, False),
    "min-p": ({"temperature": 0.8, "min_p": 0.05}, False),
    "typical": ({"temperature": 0.8, "typical_p": 0.9}, False),
    "bias and penalties": (EDITS, False),
    "bans": (BANS, False),
    "grammar": ({}, True),
    "all": ({**EDITS, **BANS, **FILTERS, "temperature": 0.8, "top_k": 50}, True),
    "all but top-k": ({**EDITS, **BANS, **FILTERS, "temperature": 0.8}, True),
}


class HalfGrammar:
    """Stands for a grammar: half of the tokens are allowed, at no cost of its own."""

    def __init__(self, generator: np.random.Generator, vocab_size: int) -> None:
        self._allowed = generator.random(vocab_size) < 0.5

    def allowed(self, *_history: object) -> NDArray[np.bool_]:
        """Return the same mask always."""
        return self._allowed


def measure(name: str, history_length: int, vocab_size: int, num_rounds: int) -> dict[str, float]:
    """Return milliseconds of the first choice, of emitted tokens and of nodes below them."""
    generator = np.random.default_rng(0)
    values, has_grammar = CASES[name]
    grammar = HalfGrammar(generator, vocab_size) if has_grammar else None
    # Zipf's law: a few tokens come again and again, many come once.
    token_ids = [int(rank) % vocab_size for rank in generator.zipf(1.2, history_length)]
    logits = generator.standard_normal((NUM_ROWS, vocab_size)).astype(np.float32) * 3
    rows = list(torch.from_numpy(logits))
    sampler = Sampler(SamplingParams(**values), 7, history_length // 2, grammar=grammar)
    new_ids = generator.integers(0, vocab_size, (num_rounds, PATH_LENGTH + 1)).tolist()
    first = timed_ms(sampler, rows[0], token_ids, ())
    emitted, below = [], []
    for index, (token_id, *path) in enumerate(new_ids):
        token_ids.append(token_id)
        emitted.append(timed_ms(sampler, rows[index % NUM_ROWS], token_ids, ()))
        for length in range(1, PATH_LENGTH + 1):
            row = rows[(index + length) % NUM_ROWS]
            below.append(timed_ms(sampler, row, token_ids, path[:length]))
    if sampler.failure is not None:
        raise sampler.failure
    return {
        "first_ms": round(first[0], 3),
        "first_cpu_ms": round(first[1], 3),
        **summary("emitted", emitted),
        **summary("below", below),
    }


def timed_ms(
    sampler: Sampler, row: torch.Tensor, token_ids: Sequence[int], path: Sequence[int]
) -> tuple[float, float]:
    """Return how long one choice takes, by the clock and of the processor."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    sampler.choose(row, token_ids, path)
    end_s, end_cpu_s = time.perf_counter(), time.process_time()
    return (end_s - start_s) * 1e3, (end_cpu_s - start_cpu_s) * 1e3


def summary(name: str, times_ms: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return mean and median of the clock, and the mean of the processor."""
    wall, cpu = zip(*times_ms, strict=True)
    return {
        f"{name}_mean_ms": round(statistics.mean(wall), 3),
        f"{name}_median_ms": round(statistics.median(wall), 3),
        f"{name}_cpu_mean_ms": round(statistics.mean(cpu), 3),
    }


def main() -> None:
    """Measure every set of controls and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    shown = ["first_ms"]
    shown += [f"{at}_{kind}mean_ms" for at in ("emitted", "below") for kind in ("", "cpu_")]
    print(f"{'controls':20s} history", *(f"{name:>20s}" for name in shown))
    for name in CASES:
        measure(name, 100, options.vocab, 3)  # compile, or load what is compiled
        for length in HISTORY_LENGTHS:
            found = measure(name, length, options.vocab, options.rounds)
            results[f"{name}, history {length}"] = found
            print(f"{name:20s} {length:7d}", *(f"{found[column]:20.3f}" for column in shown))
    if options.output is not None:
        result = {"vocab_size": options.vocab, "rounds": options.rounds, "choices": results}
        what = "milliseconds per choice of the target, float32 rows"
        record.write(what, result, options.output)


if __name__ == "__main__":
    main()
