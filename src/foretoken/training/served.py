"""Drafters of one target, served in turn on recorded prompts: the same tokens, and how fast."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.core.verdict import Exactness
from foretoken.engine.llm import LLM
from foretoken.errors import ForetokenError
from foretoken.training.corpus import Example
from foretoken.training.forecast import PLAIN

NONE = "none"  # as users ask for plain decoding
NUM_WARM_TOKENS = 4
NUM_RESAMPLES = 2000
STAGE = "serving"


def compare_served(
    model: str,
    drafters: Mapping[str, str],
    texts: Sequence[Example],
    params: Sequence[SamplingParams],
    *,
    machine: Mapping[str, Any],
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> dict[str, dict[str, Any]]:
    """Serve recorded prompts with each drafter and without, in turn, and compare.

    All share one engine and one loaded target. Requests run one at a time, every prompt by every
    drafter before the next one, in an order that rotates; seconds include the prompt's own pass,
    which nobody is spared by the prefix cache.

    Args:
        model: The target.
        drafters: Specs by the names that they are to have here; "plain" is decoding without.
        texts: Prompts with the target's outputs, which must come out again.
        params: With which each was sampled, seeds included.
        machine: More arguments of `LLM`, such as `device` and `max_nodes`.
        seed: Of the intervals' resamples.
        on_progress: Told about every prompt.

    Returns:
        For each drafter: `tokens_per_step` and `tokens_per_s` over all prompts, `num_different`
        outputs other than those recorded (0, unless the target's arithmetic is not bitwise), and
        but for plain decoding the `speedup` over it with an interval, a bootstrap over prompts.

    Raises:
        ForetokenError: Serving gave other tokens, though the target's arithmetic is bitwise.
    """
    llm = LLM(model, drafters=list(drafters.values()) or NONE, prefix_caching=False, **machine)
    labels = dict(zip(drafters, llm.engine.drafters, strict=False))
    systems = {PLAIN: NONE, **labels}
    num_texts = len(texts)
    seconds = {name: np.zeros(num_texts) for name in systems}
    steps = {name: np.zeros(num_texts, np.int64) for name in systems}
    num_different = dict.fromkeys(systems, 0)
    for label in systems.values():  # what is compiled and allocated at first use
        warm = replace(params[0], max_new_tokens=NUM_WARM_TOKENS)
        llm.generate([list(texts[0].prompt_ids)], warm, drafters=label)
    for place in range(num_texts):  # once only: some drafters learn from outputs
        for name in _rotated(list(systems), place):
            start_s = time.perf_counter()
            [output] = llm.generate(
                [list(texts[place].prompt_ids)], params[place], drafters=systems[name]
            )
            seconds[name][place] = time.perf_counter() - start_s
            steps[name][place] = output.stats.num_steps
            if tuple(output.token_ids) != texts[place].output_ids:
                _check_exactness(llm, name)
                num_different[name] += 1
        on_progress(Progress(stage=STAGE, done=place + 1, total=num_texts))
    llm.close()
    num_tokens = np.array([len(text.output_ids) for text in texts])
    return {
        name: {
            "tokens_per_step": round(float(num_tokens.sum() / steps[name].sum()), 4),
            "tokens_per_s": round(float(num_tokens.sum() / seconds[name].sum()), 2),
            "num_different": num_different[name],
            **({} if name == PLAIN else {"speedup": speedup(seconds[PLAIN], seconds[name], seed)}),
        }
        for name in systems
    }


def speedup(
    plain_s: NDArray[np.float64], seconds: NDArray[np.float64], seed: int = 0
) -> dict[str, Any]:
    """Return how many times faster, with a 95 % interval over the prompts.

    Args:
        plain_s: Seconds of each prompt without a drafter.
        seconds: The same with one.
        seed: Of the resamples.
    """
    generator = np.random.default_rng(seed)
    places = generator.integers(0, len(seconds), size=(NUM_RESAMPLES, len(seconds)))
    ratios = plain_s[places].sum(axis=1) / seconds[places].sum(axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return {
        "value": round(float(plain_s.sum() / seconds.sum()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
    }


def _rotated(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


def _check_exactness(llm: LLM, name: str) -> None:
    if llm.engine.exactness is Exactness.BITWISE:
        raise ForetokenError(
            f"serving with {name} gave other tokens than were recorded",
            hint="report this; if the target has changed, collect into a new folder",
        )


__all__ = ["PLAIN", "compare_served", "speedup"]
