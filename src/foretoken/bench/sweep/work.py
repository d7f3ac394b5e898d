"""The texts of a sweep: new ones for every round, so that nothing is gained by having seen them.

A drafter may remember what it has served. If a round repeated the last one's prompts it would
know the answers, which says nothing of a drafter; what it learns of other texts of the kind is
its merit. The texts are stories by the embedded target, made while the sweep goes on: any number
of them, the same ones for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from foretoken.bench.sweep.settings import CellKey, Kind, SweepSettings
from foretoken.bench.systems import HostInfo, Task
from foretoken.bench.workloads import STORIES, load_workload
from foretoken.core.params import SamplingParams
from foretoken.engine.llm import LLM
from foretoken.errors import ConfigError
from foretoken.models.tokenizer import Tokenizer

PROMPT_TOKENS = 32  # of stories and random tokens
TEXT_PER_OUTPUT = 1.5  # tokens written per token wanted: those of another tokenizer may be longer
MAX_TEXT_TOKENS = 448  # what an opening leaves of the embedded target's context
WORDS_PER_EDIT = 12
WRITER_BATCH = 16
SEEDS_PER_ROUND = 16_777_199  # far more than a round has prompts; prime, so openings differ

_Pair: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # prompt, script


class SweepWork:
    """Makes the tasks of every round.

    Args:
        settings: Of the sweep.
        tokenizer: Of the target.
        info: What the target says of itself.

    Raises:
        ConfigError: The target cannot be given such texts.
    """

    def __init__(
        self, settings: SweepSettings, tokenizer: Tokenizer | None, info: HostInfo
    ) -> None:
        self._settings = settings
        limit, num_wanted = info.context_limit, settings.max_new_tokens
        if limit is not None and limit < 2 * num_wanted:  # an edit is as long as its text
            raise ConfigError(
                f"prompts and {num_wanted} new tokens each need a context of {2 * num_wanted} "
                f"tokens; the model's holds {limit}",
                hint="lower --max-new-tokens",
            )
        prompt_tokens = min(PROMPT_TOKENS, PROMPT_TOKENS if limit is None else limit - num_wanted)
        self._makers: dict[Kind, Callable[[Sequence[int]], list[_Pair]]] = {
            Kind.RANDOM: _Noise(info.vocab_size or 1, prompt_tokens, num_wanted).make
        }
        if tokenizer is not None:
            stories = Stories(tokenizer, prompt_tokens, num_wanted, settings.threads)
            self._makers |= {Kind.STORY: stories.begin, Kind.EDIT: stories.edit}
        elif set(settings.workloads) != {Kind.RANDOM}:
            raise ConfigError(
                "stories and edits are texts, but the model has no tokenizer",
                hint=f"use --workload {Kind.RANDOM}",
            )

    def tasks(self, key: CellKey, round_number: int, num_prompts: int) -> list[Task]:
        """Return one round's tasks; every cell and round has others.

        Args:
            key: One of the settings' cells.
            round_number: From 0 to one above the most rounds of a cell: the last two warm up.
            num_prompts: Fewer than `SEEDS_PER_ROUND`; fewer ones are the first of more.
        """
        settings = self._settings
        place = settings.cells.index(key) * (settings.max_rounds + 2) + round_number
        first = settings.seed + place * SEEDS_PER_ROUND
        seeds = range(first, first + num_prompts)
        pairs = self._makers[key.workload](seeds)
        return [
            Task(
                prompt_ids=prompt_ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=key.temperature,
                seed=seed,
                script=script,
            )
            for (prompt_ids, script), seed in zip(pairs, seeds, strict=True)
        ]


class _Noise:
    """Prompts and outputs in which every token is as likely as every other."""

    def __init__(self, vocab_size: int, prompt_tokens: int, num_wanted: int) -> None:
        self._vocab_size = vocab_size
        self._prompt_tokens = prompt_tokens
        self._num_tokens = prompt_tokens + num_wanted

    def make(self, seeds: Sequence[int]) -> list[_Pair]:
        """Return a prompt and a script per seed."""
        pairs = []
        for seed in seeds:
            generator = np.random.default_rng(seed)
            token_ids = generator.integers(self._vocab_size, size=self._num_tokens).tolist()
            pairs.append(_split(token_ids, self._prompt_tokens))
        return pairs


class Stories:
    """Prompts from stories that the embedded target writes, in the target's own tokens.

    Args:
        tokenizer: Of the target.
        prompt_tokens: Of each beginning, at most.
        num_wanted: New tokens per prompt; an edited text has as many.
        threads: CPU threads of the writer.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_tokens: int, num_wanted: int, threads: int
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._num_wanted = num_wanted
        self._openings = [item.prompt for item in load_workload(STORIES).prompts]
        self._writer = LLM(
            STORIES,
            drafters="none",
            threads=threads,
            max_requests=WRITER_BATCH,
            kv_cache_tokens=WRITER_BATCH * 512,
        )

    def begin(self, seeds: Sequence[int]) -> list[_Pair]:
        """Return the beginning of a story per seed, for the target to continue."""
        texts = self._write(seeds, self._prompt_tokens)
        return [(tuple(self._tokenizer.encode(text)[: self._prompt_tokens]), ()) for text in texts]

    def edit(self, seeds: Sequence[int]) -> list[_Pair]:
        """Return a story per seed, and as script the same one with some words exchanged."""
        texts = self._write(seeds, round(self._num_wanted * TEXT_PER_OUTPUT))
        return [self._edit(text, seed) for text, seed in zip(texts, seeds, strict=True)]

    def _edit(self, text: str, seed: int) -> _Pair:
        encode = self._tokenizer.encode
        text = self._tokenizer.decode(encode(text)[: self._num_wanted])
        num_prompt_ids = min(len(encode(text)), self._num_wanted)
        # Edits change the length; where the output would be too short it says the text again.
        token_ids = encode(f"{text} {edited(text, seed)} {text}")
        return _split(token_ids[: num_prompt_ids + self._num_wanted], num_prompt_ids)

    def _write(self, seeds: Sequence[int], num_tokens: int) -> list[str]:
        prompts = [self._openings[seed % len(self._openings)] for seed in seeds]
        params = [
            SamplingParams(
                temperature=1.0,
                seed=seed,
                max_new_tokens=min(num_tokens, MAX_TEXT_TOKENS),
                ignore_eos=True,
            )
            for seed in seeds
        ]
        return [output.prompt + output.text for output in self._writer.generate(prompts, params)]


def edited(text: str, seed: int) -> str:
    """Return a text with about one word in twelve replaced by another one of its words.

    Args:
        text: At least one word.
        seed: Decides which ones; at least one place is edited.
    """
    words = text.split(" ")
    generator = np.random.default_rng(seed)
    num_edits = max(1, len(words) // WORDS_PER_EDIT)
    for place in generator.choice(len(words), size=num_edits, replace=False).tolist():
        others = [word for word in words if word != words[place]] or words
        words[place] = others[generator.integers(len(others))]
    return " ".join(words)


def _split(token_ids: Sequence[int], num_prompt_ids: int) -> _Pair:
    return tuple(token_ids[:num_prompt_ids]), tuple(token_ids[num_prompt_ids:])


__all__ = ["Stories", "SweepWork", "edited"]
