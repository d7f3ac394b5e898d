"""Drafters made of drafters: steps, draft passes and time, on the included pair or another.

    python benchmarks/combined.py [--model DIR --draft DIR] [--prompts N] [--max-new-tokens N]
        [--repeats N] [--output FILE]

Three workloads: openings of stories, continued ("new"); the same openings with names and words
exchanged, after the unedited ones were served ("edited"); the very same openings a second time
("again"). Drafters that remember outputs know only the outputs before in the first. Every output is
compared with plain decoding's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import record
from drafters import edited

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.drafters.base import Drafter
from foretoken.drafters.composite import CompositeDrafter
from foretoken.drafters.model_drafter import ModelDrafter

SMALL_TREE = "max_depth=4,min_gain=0.3,width=2,max_nodes=5,dtype=bfloat16"  # as `auto` has
CHAIN = "expansion=1-1-1-1-1-1"
SPECS = {
    "draft-model": ["draft-model:path={draft},{tree}"],
    "the same, guessed": ["cascade:of=draft-model(path={draft},{tree}),guess=suffix"],
    "draft-model, chain of 6": ["draft-model:path={draft},{chain}"],
    "chain of 6, guessed": [
        "cascade:of=draft-model(path={draft},{chain}),guess=suffix,max_guess=6"
    ],
    "draft-model, 2 levels": ["draft-model:path={draft},max_depth=2,width=2"],
    "2 levels, tail": ["tail:of=draft-model(path={draft},max_depth=2,width=2),then=suffix"],
    "suffix": ["suffix"],
    "suffix + draft-model": ["suffix", "draft-model:path={draft},{tree}"],
    "chain of 6, guessed + suffix": [
        "suffix",
        "cascade:of=draft-model(path={draft},{chain}),guess=suffix,max_guess=6",
    ],
}


class PassCounter:
    """Counts the passes of all draft models of an `LLM`, and their rows."""

    def __init__(self, llm: LLM) -> None:
        self.num_passes = self.num_rows = 0
        for drafter in llm.engine.drafters.values():
            for model_drafter in model_drafters(drafter):
                self._watch(model_drafter)

    def _watch(self, drafter: ModelDrafter) -> None:
        forward = drafter._model.forward

        def counted(batch: Any, *args: Any, **options: Any) -> Any:
            self.num_passes += 1
            self.num_rows += batch.num_rows
            return forward(batch, *args, **options)

        drafter._model.forward = counted  # type: ignore[method-assign]


def model_drafters(drafter: Drafter) -> Iterator[ModelDrafter]:
    """Yield the drafters with a model among those that a drafter is made of."""
    if isinstance(drafter, CompositeDrafter):
        for _, member in drafter.members:
            yield from model_drafters(member)
    elif isinstance(drafter, ModelDrafter):
        yield drafter


def run(llm: LLM, prompts: list[str], params: SamplingParams) -> tuple[list[Any], float]:
    """Generate one prompt after the other; return the outputs and the seconds they took."""
    started_s = perf_counter()
    outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
    return outputs, perf_counter() - started_s


def measure(
    model: str,
    specs: list[str],
    workload: str,
    texts: dict[str, list[str]],
    params: SamplingParams,
    repeats: int,
) -> dict[str, Any]:
    """Return counts of a workload and its best time, over drafters that are built anew."""
    seconds = []
    for _ in range(repeats):
        llm = LLM(model, drafters=specs)
        if workload == "new":
            run(LLM(model, drafters=specs), texts["given"][:2], params)  # compiles
        else:
            run(llm, texts["given"], params)
        counter = PassCounter(llm)
        outputs, taken_s = run(llm, texts["edited" if workload == "edited" else "given"], params)
        seconds.append(taken_s)
        llm.close()
    num_tokens = sum(output.stats.num_tokens for output in outputs)
    num_steps = sum(output.stats.num_steps for output in outputs)
    return {
        "token_ids": [output.token_ids for output in outputs],
        "tokens_per_step": round(num_tokens / num_steps, 3),
        "draft_passes_per_step": round(counter.num_passes / num_steps, 3),
        "draft_passes_per_token": round(counter.num_passes / num_tokens, 3),
        "rows_per_draft_pass": round(counter.num_rows / max(1, counter.num_passes), 2),
        "tokens_per_s": round(num_tokens / min(seconds), 1),
    }


def main() -> None:
    """Measure all and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories")
    parser.add_argument("--draft", default=str(EMBEDDED["stories"].draft))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    openings = record.OPENINGS.read_text(encoding="utf-8").splitlines()
    given = [text for text in openings if edited(text) != text][: options.prompts]
    texts = {"given": given, "edited": [edited(text) for text in given]}
    results = []
    for temperature in (0.0, 0.8):
        params = SamplingParams(
            max_new_tokens=options.max_new_tokens, temperature=temperature, seed=1
        )
        for workload in ("new", "edited", "again"):
            plain = measure(options.model, ["none"], workload, texts, params, options.repeats)
            expected = plain.pop("token_ids")
            row = {"temperature": temperature, "workload": workload, "drafters": "none"} | plain
            print(*row.values(), sep="\t")
            results.append(row)
            for name, templates in SPECS.items():
                specs = [
                    it.format(draft=options.draft, tree=SMALL_TREE, chain=CHAIN) for it in templates
                ]
                result = measure(options.model, specs, workload, texts, params, options.repeats)
                if result.pop("token_ids") != expected:
                    raise SystemExit(f"{name}: other tokens than plain decoding")
                row = {"temperature": temperature, "workload": workload, "drafters": name} | result
                print(*row.values(), sep="\t")
                results.append(row)
    result = {"environment": record.environment(), "results": results}
    record.write("drafters made of drafters", result, options.output)


if __name__ == "__main__":
    main()
