"""Reference: copy from texts that the output is expected to repeat with changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.core.jit import jit
from foretoken.core.params import SamplingParams
from foretoken.core.tree import TokenTree
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Follower,
    RequestView,
    Taxonomy,
)
from foretoken.drafters.suffix_array import MAX_MATCH, build_suffix_array, find_suffix
from foretoken.drafters.token_files import check_token_ids
from foretoken.errors import ConfigError

_NOWHERE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOptions:
    """Options of `reference`.

    Args:
        path: A UTF-8 text file for all requests; None if requests bring their own texts.
        max_ngram: Longest run of last tokens to look for; longer matches are tried first.
        min_ngram: Shortest run.
        max_depth: Most tokens to copy in one step.
    """

    path: str | None = None
    max_ngram: int = 8
    min_ngram: int = 1
    max_depth: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram <= MAX_MATCH:
            raise ConfigError(
                f"reference needs 1 <= min_ngram <= max_ngram <= {MAX_MATCH}; "
                f"got {self.min_ngram} and {self.max_ngram}",
                hint="change min_ngram or max_ngram",
            )
        if self.max_depth < 1:
            raise ConfigError(
                f"reference:max_depth is at least 1; got {self.max_depth}",
                hint="change max_depth, or leave the drafter out",
            )


class _Text(NamedTuple):
    """A reference: its tokens and their suffix array, [T] int32 each."""

    tokens: NDArray[np.int32]
    array: NDArray[np.int32]

    @classmethod
    def of(cls, token_ids: Sequence[int]) -> _Text:
        tokens = np.array(token_ids, np.int32)
        return cls(tokens, build_suffix_array(tokens))


class _Place(NamedTuple):
    """Where a request's output stands in a reference.

    Args:
        num_seen: Tokens of the request that it accounts for.
        next: Place of the token that the copy goes on with; `_NOWHERE` if it was lost.
        last: Where the copy was lost, or stands.
        num_agreed: Last tokens that agree with those before `next`.
    """

    num_seen: int = 0
    next: int = _NOWHERE
    last: int = 0
    num_agreed: int = 0


_BEGINNING = _Place()


@dataclass(slots=True)
class _Reader:
    """A request in one of its references."""

    text: _Text
    place: _Place = _BEGINNING

    def follow(self, token_ids: Sequence[int], max_ngram: int, min_ngram: int) -> None:
        """Move on with the tokens that are new."""
        num_seen = self.place.num_seen
        if len(token_ids) > num_seen:
            recent = np.array(token_ids[max(0, num_seen - max_ngram) :], np.int32)
            moved = _follow(self.text, self.place, recent, max_ngram, min_ngram)
            self.place = _Place(len(token_ids), *[int(value) for value in moved])

    def copy(self, length: int) -> list[int]:
        """Return the tokens that stand next, none if the place was lost."""
        if self.place.next == _NOWHERE:
            return []
        copied: list[int] = self.text.tokens[self.place.next : self.place.next + length].tolist()
        return copied


class ReferenceDrafter(Drafter, Follower):
    """Keeps its place in given texts and copies on from there.

    The place moves on with every token that agrees. At one that does not, the longest run of last
    tokens that occurs in the text says where to go on, of several places the nearest ahead. So
    the place is a function of the tokens, however they were divided into steps.

    A request may bring a text of its own, and there may be a file for all requests. Of the two
    the one is copied from with which more last tokens agree; the request's own if equally many.

    Args:
        options: How to look.
        token_ids: The text for all requests; empty if there is none.

    Source: LLMA, arXiv:2304.04487; CopySpec, arXiv:2502.08923.
    """

    Options: ClassVar[type[Any]] = ReferenceOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="retrieval (given texts)",
        is_trained=False,
        termination="static",
        structure="chain",
        reference="LLMA, arXiv:2304.04487; CopySpec, arXiv:2502.08923",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, options: ReferenceOptions, token_ids: Sequence[int] = ()) -> None:
        self.needs = DrafterNeeds()
        self._options = options
        self._shared = _Text.of(token_ids)
        self._readers: dict[str, list[_Reader]] = {}

    @classmethod
    def create(cls, options: ReferenceOptions, host: DrafterHost) -> ReferenceDrafter:
        """Read the file, if there is one, and index its tokens.

        Raises:
            ConfigError: The file cannot be read, or the target has no tokenizer for it.
        """
        if options.path is None:
            return cls(options)
        if host.tokenizer is None:
            raise ConfigError(
                "reference:path needs the target's tokenizer, and the model has none",
                hint="add the tokenizer's files to the model directory",
            )
        try:
            text = Path(options.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(
                f"reference:path {options.path!r} cannot be read: {reason}",
                hint="name a UTF-8 text file",
            ) from error
        token_ids = host.tokenizer.encode(text)
        check_token_ids(np.array(token_ids), host.target.info.vocab_size, "reference:path")
        return cls(options, token_ids)

    def serves(self, params: SamplingParams, *, has_reference: bool) -> bool:
        """Return whether there is a text, the request's own or the file."""
        return has_reference or len(self._shared.tokens) > 0

    def start(self, request: RequestView) -> None:
        """Begin nowhere in the texts; the prompt is followed with the first draft."""
        texts = [_Text.of(request.reference_ids), self._shared]
        self._readers[request.request_id] = [_Reader(it) for it in texts if len(it.tokens)]

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context one chain copied from one of its references."""
        return [
            self._draft(self._readers[it.request_id], it.token_ids, it.budget) for it in contexts
        ]

    def follow(self, context: DraftContext, path: Sequence[int]) -> Draft:
        """Return what would be drafted after a path; the request keeps its places."""
        readers = [replace(reader) for reader in self._readers[context.request_id]]
        return self._draft(readers, [*context.token_ids, *path], context.budget)

    def stop(self, request_id: str) -> None:
        """Forget the request's places and its own text."""
        self._readers.pop(request_id, None)

    def _draft(
        self, readers: Sequence[_Reader], token_ids: Sequence[int], budget: DraftBudget
    ) -> Draft:
        options = self._options
        length = min(options.max_depth, budget.max_depth, budget.max_nodes)
        copied: list[int] = []
        num_agreed = -1
        for reader in readers:
            reader.follow(token_ids, options.max_ngram, options.min_ngram)
            found = reader.copy(length)
            if found and reader.place.num_agreed > num_agreed:
                copied, num_agreed = found, reader.place.num_agreed
        # Laplace's rule: each agreeing token makes the next one more likely.
        agreed = range(num_agreed, num_agreed + len(copied))
        return Draft.from_drafter(
            "reference",
            TokenTree.chain((token_ids[-1], *copied)),
            draft_logprobs=(0.0, *[math.log((count + 1) / (count + 2)) for count in agreed]),
        )


@jit
def _follow(
    text: _Text, place: _Place, recent: np.ndarray, max_ngram: int, min_ngram: int
) -> tuple[int, int, int]:
    """Move a place along new tokens; return `next`, `last` and `num_agreed`.

    Args:
        text: The reference.
        place: Before the new tokens.
        recent: The new tokens, and up to `max_ngram` before them.
        max_ngram: Longest run to look for.
        min_ngram: Shortest run.
    """
    tokens = text.tokens
    place_next, last, num_agreed = place.next, place.last, place.num_agreed
    for index in range(min(place.num_seen, max_ngram), len(recent)):
        if 0 <= place_next < len(tokens) and tokens[place_next] == recent[index]:
            place_next += 1
            num_agreed += 1
            last = place_next
            continue
        query = recent[max(0, index + 1 - max_ngram) : index + 1]
        length, low, high = find_suffix(tokens, text.array, query)
        if length < min_ngram:
            place_next, num_agreed = _NOWHERE, 0
            continue
        place_next = _nearest_ahead(text.array[low:high], last - length) + length
        last, num_agreed = place_next, length
    return place_next, last, num_agreed


@jit
def _nearest_ahead(places: np.ndarray, start: int) -> int:
    """Return the first place at or after a start, or the first of all if there is none."""
    ahead, first = np.int64(-1), np.int64(places[0])
    for place in places:
        first = min(first, np.int64(place))
        if place >= start and (ahead < 0 or place < ahead):
            ahead = np.int64(place)
    return int(ahead) if ahead >= 0 else int(first)
