"""Forecast against served: tokens per step and tokens per second of drafters of one target.

    python benchmarks/forecast.py [--model DIR] [--drafter SPEC ...] [--prompts N]
        [--max-new-tokens N] [--temperature T] [--max-nodes N] [--live N] [--rounds N]
        [--output FILE]

The openings of stories are continued by the target, once; drafters are forecast on these texts, and
then served on them. Serving and forecast come one after the other, so a machine that is busier in
one than in the other is an error of the forecast: run it on a quiet one. Speed-ups are compared as
well, in which most of that cancels. The forecast and its serving are repeated; every round is
written down. Drafters that learn from outputs (`suffix`) have seen all texts when they are served
again, so leave them out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import record

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.training.corpus import Example, seeded
from foretoken.training.forecast import PLAIN, Forecast, ForecastSettings, forecast
from foretoken.training.served import compare_served

DRAFT = EMBEDDED["stories"].draft
SPECS = (
    f"draft-model:path={DRAFT}",
    f"draft-model:path={DRAFT},expansion=1-1-1-1",
    "early-exit:layers=4",
    "prompt-lookup",
)


def main() -> None:
    """Forecast, serve, compare, and write a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="stories")
    parser.add_argument("--drafter", action="append")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-nodes", type=int, default=8)
    parser.add_argument("--live", type=int, default=ForecastSettings().num_live)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    specs = arguments.drafter or SPECS
    drafters = {spec.replace(str(DRAFT), "stories/draft"): spec for spec in specs}

    openings = record.OPENINGS.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    sampling = SamplingParams(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature
    )
    params = seeded(sampling, 0, len(openings))
    llm = LLM(arguments.model, drafters="none")
    outputs = llm.generate(openings, params)
    texts = [
        Example(tuple(llm.encode(opening)), tuple(output.token_ids))
        for opening, output in zip(openings, outputs, strict=True)
    ]
    llm.close()
    settings = ForecastSettings(max_nodes=arguments.max_nodes, num_live=arguments.live)
    rounds = []
    for _ in range(arguments.rounds):
        expected = forecast(arguments.model, drafters, texts, params, settings)
        served = compare_served(
            arguments.model,
            drafters,
            texts,
            params,
            machine={"max_nodes": arguments.max_nodes},
        )
        rounds.append({name: compare(expected, served, name) for name in expected})
    summary = {
        name: {
            key: record.spread([it[name][key] for it in rounds])
            for key in ("tokens_per_step_error", "tokens_per_s_error", "speed_up_error")
        }
        for name in rounds[0]
    }
    result = {
        "model": Path(arguments.model).name,
        "num_texts": len(texts),
        "errors": summary,
        "rounds": rounds,
    }
    record.write("forecast against served", result, arguments.output)


def compare(
    expected: dict[str, Forecast], served: dict[str, dict[str, Any]], name: str
) -> dict[str, Any]:
    """Return a drafter's forecast, what was served, and by which share the forecast is off."""
    steps, rate = expected[name].tokens_per_step, expected[name].tokens_per_s
    gain = rate.value / expected[PLAIN].tokens_per_s.value
    served_gain = served[name]["tokens_per_s"] / served[PLAIN]["tokens_per_s"]
    return {
        "forecast": expected[name].as_dict(),
        "served": served[name],
        "tokens_per_step_error": steps.value / served[name]["tokens_per_step"] - 1,
        "tokens_per_s_error": rate.value / served[name]["tokens_per_s"] - 1,
        "speed_up_error": gain / served_gain - 1,
    }


if __name__ == "__main__":
    main()
