"""What it takes to ask drafters what their drafts along a text would have given.

    python benchmarks/retracing.py [--texts N] [--output FILE]

Texts of 64 new tokens, as the planner hears of when a request ends: tokens by Zipf's law after a
prompt of 32, edits (64 tokens again, one in twelve exchanged), and tokens all equally likely.
`suffix` has 1,000 earlier outputs of the first kind. Beside it stands what the same drafts take
one by one, each proposed to the request as in a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import record

from foretoken.core.draft import DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, Drafter, RequestView, Retracer
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.suffix import PastOutputs, SuffixDrafter, SuffixOptions

VOCAB_SIZE, NUM_NEW, MAX_NODES = 4096, 64, 16
NUM_PAST = 1000


def texts_of(kind: str, count: int, generator: np.random.Generator) -> list[tuple[list[int], int]]:
    """Return texts and how many tokens of each are its prompt."""
    law = 1.0 / np.arange(1, VOCAB_SIZE + 1)
    law /= law.sum()
    texts = []
    for _ in range(count):
        prompt = generator.choice(VOCAB_SIZE, NUM_NEW if kind == "edit" else 32, p=law)
        if kind == "edit":
            is_other = generator.random(NUM_NEW) < 1 / 12
            output = np.where(is_other, generator.integers(0, VOCAB_SIZE, NUM_NEW), prompt)
        else:
            output = generator.choice(VOCAB_SIZE, NUM_NEW, p=law if kind == "zipf" else None)
        texts.append((np.concatenate((prompt, output)).tolist(), len(prompt)))
    return texts


def one_by_one(drafter: Drafter, text: Sequence[int], num_known: int) -> list[int]:
    """Return what `retrace` does, by proposals."""
    counts = [0] * (1 + MAX_NODES)
    budget = DraftBudget(max_nodes=MAX_NODES, max_depth=MAX_NODES)
    sampler = Sampler(SamplingParams(), 0, num_known)
    drafter.start(RequestView(request_id="r", prompt_ids=text[:num_known]))
    while num_known < len(text):
        context = DraftContext(
            request_id="r", token_ids=text[:num_known], sampler=sampler, budget=budget
        )
        path = drafter.propose([context])[0].tree.match(text[num_known:])
        for place in (0, *path):
            counts[place] += 1
        num_known += len(path) + 1
    return counts


def measure(drafter: Drafter, texts: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    """Return what both ways take per text, in turns, and what the drafts give."""
    retracer = cast(Retracer, drafter)
    times_us: list[tuple[float, float]] = []
    counts = np.zeros(1 + MAX_NODES, np.int64)
    for place, (text, num_prompt_ids) in enumerate([texts[0], *texts]):
        start_s = time.perf_counter()
        told = retracer.retrace(text, num_prompt_ids + 1, MAX_NODES)
        middle_s = time.perf_counter()
        proposed = one_by_one(drafter, text, num_prompt_ids + 1)
        end_s = time.perf_counter()
        if told.tolist() != proposed:
            raise AssertionError("drafts along a text are not those that it was told of")
        if place:  # the first one compiles
            times_us.append(((middle_s - start_s) * 1e6, (end_s - middle_s) * 1e6))
            counts += told
    retraced, proposed_us = zip(*times_us, strict=True)
    return {
        "drafts_per_text": round(int(counts[0]) / len(texts), 1),
        "tokens_per_draft": round(int(counts[1:].sum()) / int(counts[0]), 2),
        "retraced_us": record.spread(retraced),
        "proposed_us": record.spread(proposed_us),
    }


def main() -> None:
    """Measure each drafter on each kind of text and write a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    info = SimpleNamespace(vocab_size=VOCAB_SIZE)
    host: Any = SimpleNamespace(target=SimpleNamespace(info=info), tokenizer=None)
    past = PastOutputs(SuffixOptions(), host)
    for text, _ in texts_of("zipf", NUM_PAST, generator):
        past.add(text)
    found: dict[str, Any] = {}
    for kind in ("zipf", "edit", "random"):
        texts = texts_of(kind, arguments.texts, generator)
        drafters: dict[str, Drafter] = {
            "prompt-lookup": PromptLookupDrafter(PromptLookupOptions()),
            "suffix": SuffixDrafter(SuffixOptions(), past),
        }
        found[kind] = {name: measure(drafter, texts) for name, drafter in drafters.items()}
    record.write(
        "Asking drafters what their drafts along a text would have given, per text",
        {"settings": {"texts": arguments.texts, "new_tokens": NUM_NEW}, "kinds": found},
        arguments.output,
    )


if __name__ == "__main__":
    main()
