"""Tokens per step of the drafters that learn from the target's rows, and of own references.

    python benchmarks/recycling.py [--prompts N] [--max-new-tokens N] [--output FILE]

The included target continues openings of stories, greedily and at temperature 1, and the texts of
`drafters.py`: openings that were edited, and edited openings with the unedited story before them.
Every output is compared with plain decoding's. `token-recycling` begins knowing nothing, or has
served as many other openings before. `reference` gets the unedited story with each request; in the
last workload, as in `drafters.py`, a text is edited by whoever would say it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
from drafters import edited, replay

from foretoken import LLM, SamplingParams

MAX_NODES = (8, 24)
SPECS = {
    "prompt-lookup": ["prompt-lookup"],
    "token-recycling": ["token-recycling"],
    "token-recycling, warm": ["token-recycling"],
    "lookahead": ["lookahead"],
    "lookahead and token-recycling": ["lookahead", "token-recycling"],
    "reference": ["reference"],
}


def count(
    llm: LLM, prompts: Sequence[str], params: SamplingParams, references: Sequence[str]
) -> tuple[list[list[int]], dict[str, Any]]:
    """Generate one prompt after the other; return the tokens and the counts."""
    outputs = [
        llm.generate(prompt, params, references=reference)[0]
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    num_tokens = sum(len(output.token_ids) for output in outputs)
    num_steps = sum(output.stats.num_steps for output in outputs)
    num_drafted = sum(output.stats.num_draft_tokens for output in outputs)
    counts = {
        "tokens": num_tokens,
        "steps": num_steps,
        "tokens_per_step": round(num_tokens / num_steps, 3),
        "drafted_per_step": round(num_drafted / num_steps, 1),
    }
    return [output.token_ids for output in outputs], counts


def main() -> None:
    """Measure each drafter on each workload and write a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    openings = record.OPENINGS.read_text(encoding="utf-8").splitlines()
    given = [text for text in openings if edited(text) != text][: arguments.prompts]
    others = [text for text in openings if text not in given][: len(given)]
    greedy = SamplingParams(max_new_tokens=arguments.max_new_tokens)
    sampled = SamplingParams(max_new_tokens=arguments.max_new_tokens, temperature=1.0, seed=7)
    plain = LLM("stories", drafters="none", threads=1)
    stories = [opening + plain.generate(opening, greedy)[0].text for opening in given]
    nothing = [""] * len(given)
    workloads = {
        "openings, greedy": (given, greedy, nothing),
        "openings, temperature 1": (given, sampled, nothing),
        "edited openings": ([edited(text) for text in given], greedy, stories),
        "given text in the prompt": (
            [f"{story}\n{edited(text)}" for story, text in zip(stories, given, strict=True)],
            greedy,
            stories,
        ),
    }
    results: dict[str, Any] = {}
    for workload, (prompts, params, references) in workloads.items():
        wanted, _ = count(plain, prompts, params, nothing)
        rows = results[workload] = {}
        for name, specs in SPECS.items():
            for max_nodes in MAX_NODES:
                llm = LLM("stories", drafters=specs, max_nodes=max_nodes, threads=1)
                if name.endswith("warm"):
                    count(llm, others, greedy, nothing)
                token_ids, counts = count(llm, prompts, params, references)
                rows[f"{name}, {max_nodes}"] = {**counts, "equal_to_plain": token_ids == wanted}
    encode = plain.encode
    edits = [(encode(story), encode(edited(story))) for story in stories]
    results["replayed edits"] = {
        f"reference, {max_nodes}": replay(["reference"], [], edits, max_nodes, has_references=True)
        for max_nodes in MAX_NODES
    }
    settings = {"model": "stories", "prompts": len(given), "max_new_tokens": greedy.max_new_tokens}
    what = "Tokens per step of drafters that learn from the target's rows, and of references"
    record.write(what, {"settings": settings, "workloads": results}, arguments.output)


if __name__ == "__main__":
    main()
