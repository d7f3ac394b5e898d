"""Tokens per step and speed of a target that drafts for itself with some of its layers.

    python benchmarks/self_speculation.py [--model DIR] [--inflate SHAPE] [--drafter SPEC ...]
        [--prompts N] [--max-new-tokens N] [--temperature T] [--rounds N] [--output FILE]

The openings of stories are continued one after the other, with each drafter in turn and again in
each round. Times are processor time, everything runs in one thread; each ratio is that of the
fastest rounds. Outputs are compared with plain decoding's. `early-exit` is also run without handing
over what it has computed, so that the target runs every row through all layers. `--inflate
hidden=768,layers=24` widens the model to another's cost; added layers compute and change nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import record

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.bench.inflate import Shape, cache_folder, inflate

SPECS = (
    "early-exit:layers=2",
    "early-exit:layers=4",
    "early-exit:layers=6",
    "early-exit:layers=8",
    "early-exit:layers=10",
    "layer-skip:skip=3-5-7-9",
    "layer-skip",
)
RECOMPUTED = " (recomputed)"


def load(model: str, spec: str, arguments: argparse.Namespace) -> LLM:
    """Return the model with one drafter."""
    recomputes = spec.endswith(RECOMPUTED)
    llm = LLM(
        model,
        drafters=spec.removesuffix(RECOMPUTED),
        max_nodes=arguments.max_nodes,
        threads=1,
        dtype=arguments.dtype,
    )
    if recomputes:
        for drafter in llm.engine.drafters.values():
            drafter.needs = replace(drafter.needs, shared_layers=0)
    return llm


def run(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> dict[str, Any]:
    """Continue all prompts, one after the other."""
    start_s = time.process_time()
    outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
    total_s = time.process_time() - start_s
    stats = [output.stats for output in outputs]
    num_drafted = sum(stat.num_draft_tokens for stat in stats)
    num_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "token_ids": [output.token_ids for output in outputs],
        "total_s": total_s,
        "tokens_per_step": round(num_tokens / sum(stat.num_steps for stat in stats), 3),
        "acceptance_rate": round(sum(stat.num_accepted for stat in stats) / max(1, num_drafted), 3),
    }


def main() -> None:
    """Measure all drafters in turn and write a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="stories")
    parser.add_argument("--inflate")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--drafter", action="append")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-nodes", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = arguments.model
    if arguments.inflate:
        source = EMBEDDED[model].target if model in EMBEDDED else Path(model)
        shape = Shape.parse(arguments.inflate)
        dtype = "float32" if arguments.dtype == "auto" else arguments.dtype
        model = str(inflate(source, shape, dtype=dtype, folder=cache_folder()))
    specs = list(arguments.drafter or SPECS)
    specs += [spec + RECOMPUTED for spec in specs if spec.startswith("early-exit")]
    prompts = record.OPENINGS.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    params = SamplingParams(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=1
    )
    runs: dict[str, list[dict[str, Any]]] = {spec: [] for spec in ("none", *specs)}
    models = {spec: load(model, spec, arguments) for spec in runs}
    for _ in range(arguments.rounds):
        for spec, llm in models.items():
            runs[spec].append(run(llm, prompts, params))
    plain_s = min(found["total_s"] for found in runs["none"])
    wanted = runs["none"][0]["token_ids"]
    rows = {
        spec: {
            "tokens_per_step": found[-1]["tokens_per_step"],
            "acceptance_rate": found[-1]["acceptance_rate"],
            "speed_to_plain": round(plain_s / min(it["total_s"] for it in found), 3),
            "equal_to_plain": all(it["token_ids"] == wanted for it in found),
        }
        for spec, found in runs.items()
    }
    for spec, llm in models.items():
        for drafter in llm.engine.drafters.values():
            if hasattr(drafter, "skipped"):
                rows[spec]["skipped"] = str(drafter.skipped)
    settings = {
        "model": arguments.model,
        "inflate": arguments.inflate,
        "dtype": str(models["none"].info.dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "max_new_tokens": arguments.max_new_tokens,
        "max_nodes": arguments.max_nodes,
        "temperature": arguments.temperature,
        "rounds": arguments.rounds,
    }
    record.write("self-speculation", {"settings": settings, "drafters": rows}, arguments.output)


if __name__ == "__main__":
    main()
