"""Tokens per step for several temperatures of the draft's estimate (decision 0004).

    python benchmarks/race_temperature.py --model DIR --draft DIR

Counts tokens and steps, not time, so it may run on a busy machine.
"""

from __future__ import annotations

import argparse

from foretoken import LLM, SamplingParams
from foretoken.drafters import draft_model

PROMPTS = [
    "Once upon a time",
    "Lily was",
    "The dog",
    "One day, a boy",
    "Tom and Sam",
    "Mom said",
    "In the park",
    "A big bear",
]


def main() -> None:
    """Print one line per sampling temperature and estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    llm = LLM(args.model, drafters=f"draft-model:path={args.draft}", max_nodes=8)
    for temperature in (0.0, 1.0, 0.7):
        for race_temperature in (0.15, 0.3, 0.5, 0.7, 1.0):
            draft_model.RACE_TEMPERATURE = race_temperature
            params = [
                SamplingParams(
                    temperature=temperature,
                    seed=seed,
                    max_new_tokens=args.tokens,
                    ignore_eos=True,
                )
                for seed in range(len(PROMPTS))
            ]
            stats = [output.stats for output in llm.generate(PROMPTS, params)]
            num_tokens = sum(item.num_tokens for item in stats)
            num_steps = sum(item.num_steps for item in stats)
            print(
                f"temperature {temperature}, estimate at {race_temperature}: "
                f"{num_tokens / num_steps:.3f} tokens per step",
                flush=True,
            )


if __name__ == "__main__":
    main()
