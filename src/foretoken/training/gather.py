"""From prompts to what a run trains and measures on: the target's outputs, some held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, silent
from foretoken.engine.llm import LLM
from foretoken.errors import ConfigError
from foretoken.training.corpus import (
    Example,
    collect,
    held_out_places,
    more_prompts,
    seeded,
    without_overlap,
)

MAX_HELD_OUT = 32
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Texts of a target.

    Args:
        examples: For training, at least one; they share no predicted token with those held out.
        held_out: For measuring.
        held_out_params: With which each of these was sampled.
        num_left_out: Texts that are not trained on because they are held out or there twice.
    """

    examples: list[Example]
    held_out: list[Example]
    held_out_params: list[SamplingParams]
    num_left_out: int

    def described(self) -> dict[str, int]:
        """Return the counts that a report names."""
        return {
            "num_texts": len(self.examples),
            "num_tokens": sum(len(text.output_ids) for text in self.examples),
            "num_left_out": self.num_left_out,
            "num_held_out_texts": len(self.held_out),
            "num_held_out_tokens": sum(len(text.output_ids) for text in self.held_out),
        }


def gather(
    llm: LLM,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    folder: Path,
    *,
    num_prompts: int,
    seed: int,
    on_progress: OnProgress = silent,
) -> Gathered:
    """Let the target continue prompts, those that are held out first; resumed if interrupted.

    Args:
        llm: The target.
        prompts: Token ids; at least two prompts, some of which are held out.
        params: How it writes, but for the seed.
        folder: Keeps prompts and outputs as JSON lines.
        num_prompts: To train on; the target writes those that are not given.
        seed: Of everything random.
        on_progress: Told about every prompt.

    Raises:
        ConfigError: There are too few prompts, no text is left to train on, or the folder holds
            lines that are not of this run, or cannot be written.
        RequestError: A prompt does not fit the model.
    """
    places = held_out_places(len(prompts), num_held_out(len(prompts)))
    given = [prompt for place, prompt in enumerate(prompts) if place not in places]
    written = more_prompts(llm, given, num_prompts, seed, folder / "prompts.jsonl", on_progress)
    every = [*(prompts[place] for place in places), *written]
    every_params = seeded(params, seed, len(every))
    texts = collect(
        llm,
        every,
        every_params,
        folder / "corpus.jsonl",
        stage="collecting outputs",
        on_progress=on_progress,
    )
    held_out = texts[: len(places)]
    examples, num_left_out = without_overlap(texts[len(places) :], held_out)
    if not examples:
        raise ConfigError(
            "no text is left to train on: all are the same as held-out ones",
            hint="give more prompts, or raise --num-prompts",
        )
    return Gathered(examples, held_out, every_params[: len(places)], num_left_out)


def num_held_out(num_prompts: int) -> int:
    """Return how many of so many prompts are held out.

    Raises:
        ConfigError: There are too few.
    """
    if num_prompts < 2:
        raise ConfigError(
            f"there are {num_prompts} prompts; training and measuring need one each",
            hint="give more prompts with --prompts FILE",
        )
    return min(MAX_HELD_OUT, num_prompts // 2)


def prompts_fingerprint(prompts: Sequence[TokenIds]) -> str:
    """Return a short text that changes when prompts do."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def shown_name(model: str) -> str:
    """Return a model's name without the folders of this machine."""
    return Path(model).name if Path(model).expanduser().is_dir() else model


__all__ = ["Gathered", "gather", "num_held_out", "prompts_fingerprint", "shown_name"]
