"""The target's own outputs, collected once and kept as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.engine.llm import LLM
from foretoken.errors import ConfigError
from foretoken.training.storage import writing

_SEED_STRIDE = 1_000_003
# How far, and how freely, the target goes on with a prompt that becomes a new one. The further and
# the freer, the less such texts are like those that it writes behind the prompts it was given.
MIN_OPENING_TOKENS = 4
MAX_OPENING_TOKENS = 16
OPENING_TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what the target said.

    Args:
        prompt_ids: At least one token id.
        output_ids: At least one token id, the end of the sequence included.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.prompt_ids + self.output_ids


def collect(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    path: Path,
    *,
    stage: str,
    on_progress: OnProgress = silent,
) -> list[Example]:
    """Return the target's output for every prompt; what the file holds already is not redone.

    Each output is appended to the file when it is finished, so that an interrupted collection
    goes on where it stopped. Which drafter helps changes the time, not the outputs.

    Args:
        llm: The target.
        prompts: Token ids.
        params: One per prompt, with seeds where they sample.
        path: A .jsonl file.
        stage: What to call this in progress reports.
        on_progress: Told about every finished prompt.

    Raises:
        ConfigError: A line of the file is broken or is not of these prompts, or the file cannot
            be written; finished lines stay.
        RequestError: A prompt does not fit the model.
    """
    found = read_corpus(path, prompts, llm.info.vocab_size)
    missing = [index for index in range(len(prompts)) if index not in found]
    num_found = len(found)
    on_progress(Progress(stage=stage, done=num_found, total=len(prompts), is_resumed=num_found > 0))
    if missing:
        with writing(path.name), path.open("a", encoding="utf-8") as file:
            outputs = llm.generate_iter(
                [list(prompts[index]) for index in missing], [params[index] for index in missing]
            )
            for output in outputs:
                index = missing[output.index]
                found[index] = Example(tuple(prompts[index]), tuple(output.token_ids))
                file.write(json.dumps(_line(index, found[index]), separators=(",", ":")) + "\n")
                file.flush()
                on_progress(Progress(stage=stage, done=len(found), total=len(prompts)))
    return [found[index] for index in range(len(prompts))]


def read_corpus(
    path: Path, prompts: Sequence[Sequence[int]], vocab_size: int
) -> dict[int, Example]:
    """Return what a file holds by the prompt's place; a last line cut short is removed from it.

    Args:
        path: A .jsonl file; none is an empty one.
        prompts: What the places mean.
        vocab_size: Token ids are below it.

    Raises:
        ConfigError: A line is broken, or is not of these prompts.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # a crash ended the last line
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found = {}
    for number, line in enumerate(whole.decode(errors="replace").splitlines(), start=1):
        place = f"{path.name}, line {number}"
        index, example = _read_line(line, place, vocab_size)
        if index >= len(prompts) or example.prompt_ids != tuple(prompts[index]):
            raise _broken(place, f"is not of prompt {index} of this run")
        found[index] = example
    return found


def seeded(params: SamplingParams, seed: int, count: int) -> list[SamplingParams]:
    """Return the parameters `count` times, each with a seed of its own that `seed` fixes."""
    return [replace(params, seed=seed * _SEED_STRIDE + index) for index in range(count)]


def more_prompts(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    num_prompts: int,
    seed: int,
    path: Path,
    on_progress: OnProgress = silent,
) -> list[tuple[int, ...]]:
    """Return `num_prompts` prompts: those given, then new ones that the target wrote from them.

    A new prompt is a given one, in turn, and a few tokens that the target samples behind it: a
    handful of prompts is enough for a corpus of any size, of texts like those that the target is
    asked to continue.

    Args:
        llm: The target.
        prompts: Token ids, at least one prompt.
        num_prompts: How many to return; fewer than given takes the first ones.
        seed: Of lengths and tokens.
        path: A .jsonl file that keeps the new ones.
        on_progress: Told about every new prompt.
    """
    given = [tuple(prompt) for prompt in prompts[:num_prompts]]
    num_new = num_prompts - len(given)
    bases = [given[index % len(given)] for index in range(num_new)]
    lengths = random.Random(seed)
    params = [
        SamplingParams(
            max_new_tokens=lengths.randint(MIN_OPENING_TOKENS, MAX_OPENING_TOKENS),
            temperature=OPENING_TEMPERATURE,
            seed=seed * _SEED_STRIDE + index,
        )
        for index in range(num_new)
    ]
    written = collect(llm, bases, params, path, stage="writing prompts", on_progress=on_progress)
    return given + [_without_end(example, llm.info.eos_ids) for example in written]


def without_overlap(
    examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[list[Example], int]:
    """Return the examples that share no predicted token with held-out ones, each once.

    Two texts share one if they are equal up to an output token of both: its whole context was
    then seen in training.

    Args:
        examples: For training.
        held_out: For measuring.

    Returns:
        The examples that stay, and how many were left out.
    """
    kept = [
        example
        for example in dict.fromkeys(examples)
        if not any(_is_shared(example, other) for other in held_out)
    ]
    return kept, len(examples) - len(kept)


def held_out_places(num_prompts: int, num_held_out: int) -> list[int]:
    """Return which prompts are held out: evenly spread, so that sorted files are no matter."""
    bounds = [place * num_prompts // num_held_out for place in range(num_held_out + 1)]
    return [(start + stop - 1) // 2 for start, stop in pairwise(bounds)]


def _is_shared(one: Example, other: Example) -> bool:
    num_tokens = max(len(one.prompt_ids), len(other.prompt_ids)) + 1
    first, second = one.token_ids, other.token_ids
    return min(len(first), len(second)) >= num_tokens and first[:num_tokens] == second[:num_tokens]


def _without_end(example: Example, eos_ids: frozenset[int]) -> tuple[int, ...]:
    is_ended = example.output_ids[-1] in eos_ids
    return example.token_ids[:-1] if is_ended else example.token_ids


def _line(index: int, example: Example) -> dict[str, Any]:
    return {
        "index": index,
        "prompt_ids": list(example.prompt_ids),
        "output_ids": list(example.output_ids),
    }


def _read_line(line: str, place: str, vocab_size: int) -> tuple[int, Example]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _broken(place, f"not JSON: {error}") from error
    if not isinstance(values, dict) or set(values) != {"index", "prompt_ids", "output_ids"}:
        raise _broken(place, "not an object with index, prompt_ids and output_ids")
    index = values["index"]
    if type(index) is not int or index < 0:
        raise _broken(place, f"index is an integer >= 0; got {index!r}")
    for name in ("prompt_ids", "output_ids"):
        ids = values[name]
        is_list = isinstance(ids, list) and len(ids) > 0
        if not is_list or not all(type(it) is int and 0 <= it < vocab_size for it in ids):
            raise _broken(place, f"{name} is a list of token ids from 0 to {vocab_size - 1}")
    return index, Example(tuple(values["prompt_ids"]), tuple(values["output_ids"]))


def _broken(place: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{place}: {reason}", hint="delete the line, or the file, and run the command again"
    )


__all__ = [
    "Example",
    "collect",
    "held_out_places",
    "more_prompts",
    "read_corpus",
    "seeded",
    "without_overlap",
]
