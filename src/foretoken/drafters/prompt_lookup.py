"""Prompt lookup: copy what followed the last tokens when they occurred before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.jit import jit
from foretoken.core.tree import TokenTree
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    RequestView,
    Retracer,
    Taxonomy,
)
from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLookupOptions:
    """Options of `prompt-lookup`.

    Args:
        max_ngram: Longest run of last tokens to look for; longer matches are tried first.
        min_ngram: Shortest run.
        max_depth: Most tokens to copy.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    max_depth: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(
                f"prompt-lookup needs 1 <= min_ngram <= max_ngram; "
                f"got {self.min_ngram} and {self.max_ngram}",
                hint="change min_ngram or max_ngram",
            )
        if self.max_depth < 1:
            raise ConfigError(
                f"prompt-lookup:max_depth is at least 1; got {self.max_depth}",
                hint="change max_depth, or use the drafter none",
            )


@dataclass(slots=True)
class _NgramIndex:
    """Where each run of tokens was last followed by another token."""

    num_indexed: int = 0
    next_position: dict[tuple[int, ...], int] = field(default_factory=dict)


class PromptLookupDrafter(Drafter, Retracer):
    """Finds the latest earlier occurrence of the last tokens and copies what came after it.

    A copy that reaches the end of the text goes on with the copied tokens themselves, so that a
    repeating pattern is drafted to full depth. Each new token is indexed once.

    Source: Saxena 2023, prompt lookup decoding; also LLMA, arXiv:2304.04487.
    """

    Options: ClassVar[type[Any]] = PromptLookupOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="retrieval (prompt and output)",
        is_trained=False,
        termination="static",
        structure="chain",
        reference="Saxena 2023; LLMA, arXiv:2304.04487",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, options: PromptLookupOptions) -> None:
        self.needs = DrafterNeeds()
        self._options = options
        self._indices: dict[str, _NgramIndex] = {}

    @classmethod
    def create(cls, options: PromptLookupOptions, host: DrafterHost) -> PromptLookupDrafter:
        """Build it; the target is not needed."""
        return cls(options)

    def start(self, request: RequestView) -> None:
        """Begin an empty index; the prompt is indexed with the first draft."""
        self._indices[request.request_id] = _NgramIndex()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context one chain copied from its own text."""
        return [self.follow(context, ()) for context in contexts]

    def follow(self, context: DraftContext, path: Sequence[int]) -> Draft:
        """Return the chain that is copied if the tokens of a path come next."""
        index = self._indices[context.request_id]
        self._extend(index, context.token_ids)
        token_ids = [*context.token_ids, *path] if path else context.token_ids
        length = min(self._options.max_depth, context.budget.max_depth, context.budget.max_nodes)
        for size in range(self._options.max_ngram, self._options.min_ngram - 1, -1):
            run = token_ids[-size:]
            start = _latest_start(token_ids, run, len(path))
            start = index.next_position.get(tuple(run)) if start is None else start
            if start is not None and length > 0:
                return self._copy(token_ids, start, length, size)
        return Draft.empty(token_ids[-1])

    def retrace(self, token_ids: Sequence[int], start: int, max_nodes: int) -> NDArray[np.int64]:
        """Return what came of the chains that would have been copied along a text, [1 + N]."""
        options = self._options
        lengths = options.min_ngram, options.max_ngram, min(options.max_depth, max_nodes)
        return _retrace(np.array(token_ids, np.int32), start, max_nodes, lengths)

    def stop(self, request_id: str) -> None:
        """Drop the request's index."""
        self._indices.pop(request_id, None)

    def _extend(self, index: _NgramIndex, token_ids: Sequence[int]) -> None:
        """Index every run that has a token after it, up to the current end."""
        for position in range(max(index.num_indexed, 1), len(token_ids)):
            for size in range(self._options.min_ngram, self._options.max_ngram + 1):
                if size <= position:
                    index.next_position[tuple(token_ids[position - size : position])] = position
        index.num_indexed = len(token_ids)

    @staticmethod
    def _copy(token_ids: Sequence[int], start: int, length: int, size: int) -> Draft:
        copied = list(token_ids[start : start + length])
        while len(copied) < length:
            copied.append(copied[len(copied) - (len(token_ids) - start)])
        # Laplace's rule for a continuation seen once after `size` agreeing tokens.
        logprob = math.log((size + 1) / (size + 2))
        return Draft.from_drafter(
            "prompt-lookup",
            TokenTree.chain((token_ids[-1], *copied)),
            draft_logprobs=(0.0, *(logprob for _ in copied)),
        )


def _latest_start(token_ids: Sequence[int], run: Sequence[int], num_last: int) -> int | None:
    """Return the last of so many last positions before which a run of tokens stands, if any."""
    for position in range(len(token_ids) - 1, len(token_ids) - 1 - num_last, -1):
        if token_ids[max(0, position - len(run)) : position] == run:
            return position
    return None


@jit
def _retrace(
    token_ids: NDArray[np.int32], start: int, max_nodes: int, lengths: tuple[int, int, int]
) -> NDArray[np.int64]:
    """Count drafts along a text, and those of which each node was taken.

    Args:
        token_ids: The text.
        start: Tokens known before the first draft.
        max_nodes: N; as many places there are in the result, and one more.
        lengths: Shortest and longest run to look for, most tokens to copy.
    """
    min_ngram, max_ngram, most = lengths
    counts = np.zeros(1 + max_nodes, np.int64)
    end = start  # of what is known
    while end < len(token_ids):
        best, place = min_ngram - 1, -1
        for position in range(end - 1, 0, -1):
            length = 0
            limit = min(max_ngram, position)
            while (
                length < limit and token_ids[position - 1 - length] == token_ids[end - 1 - length]
            ):
                length += 1
            if length > best:
                best, place = length, position
                if best == max_ngram:
                    break
        counts[0] += 1
        taken = 0
        if place >= 0:
            most_taken = min(most, len(token_ids) - end)
            # Beyond what is known the copy goes on with itself, which is what is known by then.
            while taken < most_taken and token_ids[place + taken] == token_ids[end + taken]:
                taken += 1
                counts[taken] += 1
        end += taken + 1
    return counts
