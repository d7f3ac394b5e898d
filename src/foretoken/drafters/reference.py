"""Reference: copy from a text that the output is expected to repeat with changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
        path: A UTF-8 text file.
        max_ngram: Longest run of last tokens to look for; longer matches are tried first.
        min_ngram: Shortest run.
        max_depth: Most tokens to copy in one step.
    """

    path: str
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
    """The reference: its tokens and their suffix array, [T] int32 each."""

    tokens: NDArray[np.int32]
    array: NDArray[np.int32]


class _Place(NamedTuple):
    """Where a request's output stands in the reference.

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


class ReferenceDrafter(Drafter):
    """Keeps its place in a given text and copies on from there.

    The place moves on with every token that agrees. At one that does not, the longest run of last
    tokens that occurs in the text says where to go on, of several places the nearest ahead. So
    the place is a function of the tokens, however they were divided into steps.

    Args:
        options: How to look.
        token_ids: The reference.

    Source: LLMA, arXiv:2304.04487; CopySpec, arXiv:2502.08923.
    """

    Options: ClassVar[type[Any]] = ReferenceOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="retrieval (a given text)",
        is_trained=False,
        termination="static",
        structure="chain",
        reference="LLMA, arXiv:2304.04487; CopySpec, arXiv:2502.08923",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, options: ReferenceOptions, token_ids: Sequence[int]) -> None:
        self.needs = DrafterNeeds()
        self._options = options
        tokens = np.array(token_ids, np.int32)
        self._text = _Text(tokens, build_suffix_array(tokens))
        self._places: dict[str, _Place] = {}

    @classmethod
    def create(cls, options: ReferenceOptions, host: DrafterHost) -> ReferenceDrafter:
        """Read the file and index its tokens.

        Raises:
            ConfigError: The file cannot be read, or the target has no tokenizer.
        """
        if host.tokenizer is None:
            raise ConfigError(
                "reference needs the target's tokenizer, and the model has none",
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

    def start(self, request: RequestView) -> None:
        """Begin nowhere; the prompt is followed with the first draft."""
        self._places[request.request_id] = _Place()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context one chain copied from the reference."""
        return [self._propose_one(context) for context in contexts]

    def stop(self, request_id: str) -> None:
        """Forget the request's place."""
        self._places.pop(request_id, None)

    def _propose_one(self, context: DraftContext) -> Draft:
        token_ids = context.token_ids
        place = self._places[context.request_id]
        if len(token_ids) > place.num_seen:
            place = self._places[context.request_id] = self._moved(place, token_ids)
        length = min(self._options.max_depth, context.budget.max_depth, context.budget.max_nodes)
        if place.next == _NOWHERE or length == 0:
            return Draft.empty(token_ids[-1])
        copied = self._text.tokens[place.next : place.next + length].tolist()
        # Laplace's rule: each agreeing token makes the next one more likely.
        agreed = range(place.num_agreed, place.num_agreed + len(copied))
        return Draft.from_drafter(
            "reference",
            TokenTree.chain((token_ids[-1], *copied)),
            draft_logprobs=(0.0, *[math.log((count + 1) / (count + 2)) for count in agreed]),
        )

    def _moved(self, place: _Place, token_ids: Sequence[int]) -> _Place:
        """Return the place after the tokens that are new."""
        options = self._options
        recent = np.array(token_ids[max(0, place.num_seen - options.max_ngram) :], np.int32)
        moved = _follow(self._text, place, recent, options.max_ngram, options.min_ngram)
        return _Place(len(token_ids), *[int(value) for value in moved])


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
