"""Tokens per step of the drafters without a model, on texts that are said again with edits.

    python benchmarks/drafters.py [--prompts N] [--max-nodes N] [--output FILE]

The included target continues openings of stories; these texts are *given*. Then each opening is
edited, names and a few words exchanged by a fixed table, and continued: what a user does who asks
again for nearly the same. In the second workload the given text stands in the prompt before the
edited opening, as a text to be edited does. Every output is compared with plain decoding's.

A target this small is no editor, so a third workload replays one: the prompt is a given text, the
output is that text edited by the table, whoever would say it. A draft then advances by its longest
path in the output, as with any rule that takes what the target would say; one more token is the
target's own. The draft model, which knows stories and not the edit, stands beside.

The drafters get what they are made for: `suffix` has served the given texts, `reference` and
`rest` have them as files.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

from foretoken import LLM, SamplingParams
from foretoken.core.draft import DraftBudget
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters.base import DraftContext, Outcome, RequestView
from foretoken.drafters.datastore import Datastore

EDITS = {
    "Lily": "Mia",
    "Tom": "Ben",
    "Tim": "Sam",
    "Timmy": "Sammy",
    "Sara": "Anna",
    "Lucy": "Jane",
    "Max": "Rex",
    "little": "small",
    "big": "large",
    "happy": "glad",
    "boy": "child",
    "girl": "child",
    "dog": "cat",
    "park": "garden",
}
SPECS = {
    "prompt-lookup": ["prompt-lookup"],
    "suffix, request alone": ["suffix:max_tokens=0"],
    "suffix": ["suffix"],
    "reference": ["reference:path={folder}/given.txt"],
    "rest": ["rest:path={folder}/given.datastore"],
    "draft-model": ["auto"],
}


def edited(text: str) -> str:
    """Return an opening with the words of the table exchanged; the first word stands."""
    words = text.split(" ")
    parts = [(word.rstrip(".,!?'\""), word) for word in words]
    return " ".join(EDITS.get(bare, bare) + word[len(bare) :] for bare, word in parts)


def run(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> dict[str, Any]:
    """Generate one prompt after the other; return the outputs and the counts."""
    outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
    num_tokens = sum(len(output.token_ids) for output in outputs)
    num_steps = sum(output.stats.num_steps for output in outputs)
    num_drafted = sum(output.stats.num_draft_tokens for output in outputs)
    num_accepted = sum(output.stats.num_accepted for output in outputs)
    return {
        "token_ids": [output.token_ids for output in outputs],
        "texts": [output.text for output in outputs],
        "counts": {
            "tokens": num_tokens,
            "steps": num_steps,
            "tokens_per_step": round(num_tokens / num_steps, 3),
            "drafted": num_drafted,
            "acceptance_rate": round(num_accepted / max(1, num_drafted), 3),
        },
    }


def measure(
    specs: Sequence[str],
    given: Sequence[str],
    prompts: Sequence[str],
    params: SamplingParams,
    max_nodes: int,
) -> dict[str, Any]:
    """Let drafters see the given texts, then count on the prompts."""
    llm = LLM("stories", drafters=specs, max_nodes=max_nodes, threads=1)
    for prompt in given:
        llm.generate(prompt, params)
    return run(llm, prompts, params)


def replay(
    specs: Sequence[str],
    seen: Sequence[tuple[list[int], list[int]]],
    edits: Sequence[tuple[list[int], list[int]]],
    max_nodes: int,
    *,
    has_references: bool = False,
) -> dict[str, Any]:
    """Draft along known outputs: those seen before, then those that count.

    With `has_references` each request brings its prompt, the text to be edited, as its reference.
    """
    [(name, drafter), *_] = LLM("stories", drafters=specs, threads=1).engine.drafters.items()
    sampler = Sampler(SamplingParams(), 0, 1)
    counts = {"tokens": 0, "steps": 0, "drafted": 0, "accepted": 0}
    for index, (prompt_ids, output_ids) in enumerate([*seen, *edits]):
        reference_ids = prompt_ids if has_references else ()
        drafter.start(
            RequestView(request_id=name, prompt_ids=prompt_ids, reference_ids=reference_ids)
        )
        token_ids, num_done = list(prompt_ids), 0
        while num_done < len(output_ids):
            num_left = len(output_ids) - num_done - 1
            budget = DraftBudget(max_nodes=max_nodes, max_depth=min(max_nodes, num_left))
            context = DraftContext(
                request_id=name, token_ids=token_ids, sampler=sampler, budget=budget
            )
            [draft] = drafter.propose([context])
            path = draft.tree.match(output_ids[num_done:])
            emitted = output_ids[num_done : num_done + len(path) + 1]
            token_ids += emitted
            num_done += len(emitted)
            verdict = Verdict(tuple(path), tuple(emitted), FinalKind.RECOVERED)
            drafter.commit([Outcome(request_id=name, verdict=verdict, draft=draft)])
            if index >= len(seen):
                counts["tokens"] += len(emitted)
                counts["steps"] += 1
                counts["drafted"] += draft.tree.num_draft_tokens
                counts["accepted"] += len(path)
        drafter.stop(name)
    return {
        "tokens": counts["tokens"],
        "steps": counts["steps"],
        "tokens_per_step": round(counts["tokens"] / counts["steps"], 3),
        "drafted": counts["drafted"],
        "acceptance_rate": round(counts["accepted"] / max(1, counts["drafted"]), 3),
    }


def main() -> None:
    """Measure each drafter on both workloads and write a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-nodes", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    openings = record.OPENINGS.read_text(encoding="utf-8").splitlines()
    changed = [text for text in openings if edited(text) != text][: arguments.prompts]
    params = SamplingParams(max_new_tokens=arguments.max_new_tokens)
    plain = LLM("stories", drafters="none", threads=1)
    texts = [
        opening + text
        for opening, text in zip(changed, run(plain, changed, params)["texts"], strict=True)
    ]
    workloads = {
        "edited openings": [edited(text) for text in changed],
        "given text in the prompt": [
            f"{given}\n{edited(opening)}" for given, opening in zip(texts, changed, strict=True)
        ],
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "given.txt").write_text("\n".join(texts), encoding="utf-8")
        if plain.tokenizer is None:
            raise SystemExit("the included pair has lost its tokenizer")
        datastore = Datastore.build(plain.tokenizer.encode(text) for text in texts)
        datastore.save(Path(folder, "given.datastore"), plain.tokenizer)
        for workload, prompts in workloads.items():
            wanted = run(plain, prompts, params)["token_ids"]
            rows = results[workload] = {}
            for name, specs in SPECS.items():
                filled = [spec.format(folder=folder) for spec in specs]
                result = measure(filled, changed, prompts, params, arguments.max_nodes)
                rows[name] = {
                    **result["counts"],
                    "equal_to_plain": result["token_ids"] == wanted,
                }
        encode = plain.tokenizer.encode
        edits = [(encode(text), encode(edited(text))) for text in texts]
        seen = [
            (encode(opening), encode(text)) for opening, text in zip(changed, texts, strict=True)
        ]
        results["replayed edits"] = {
            name: replay(
                [spec.format(folder=folder) for spec in specs], seen, edits, arguments.max_nodes
            )
            for name, specs in SPECS.items()
        }
    settings = {
        "model": "stories",
        "prompts": len(changed),
        "max_new_tokens": arguments.max_new_tokens,
        "max_nodes": arguments.max_nodes,
        "temperature": 0,
    }
    record.write(
        "Tokens per step on texts said again with edits",
        {"settings": settings, "workloads": results},
        arguments.output,
    )


if __name__ == "__main__":
    main()
