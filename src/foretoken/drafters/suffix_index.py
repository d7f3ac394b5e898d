"""Where the last tokens of a context occurred before: an index over texts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit
from foretoken.drafters.copying import SEPARATOR, Occurrences

# Runs of so many tokens are chained, longest first. A match of any length is found by the longest
# run that fits into it. Each costs 8 to 12 bytes per token (docs/decisions/0011).
ORDERS = (8, 3, 1)
MAX_CAPACITY = 2**31 - 1  # places are int32
_MULTIPLIER = 0x9E3779B97F4A7C15
_NONE = -1


class _Arrays(NamedTuple):
    """A ring of tokens and, per order, chains of the places with one hash, newest first.

    Args:
        tokens: [C]
        heads: Newest place of each bucket, [orders, buckets].
        previous: The place before each in its chain, [orders, C].
    """

    tokens: NDArray[np.int32]
    heads: NDArray[np.int32]
    previous: NDArray[np.int32]


class Ring(NamedTuple):
    """What an index holds, as compiled code takes it.

    Args:
        arrays: Its own, not copies.
        newest: Place of the newest token.
        run: Tokens since the last separator.
        num_tokens: As many are held.
    """

    arrays: _Arrays
    newest: int
    run: int
    num_tokens: int


class SuffixIndex:
    """Texts, whole ones, with their runs of tokens indexed; beyond a bound the oldest go.

    Adding a token takes a constant number of operations; memory doubles as texts are added, up
    to `max_tokens`. A text longer than that keeps its end.

    Args:
        max_tokens: Most tokens held, one separator per text included.
        num_expected: Tokens to make room for at once.
    """

    def __init__(self, max_tokens: int, num_expected: int = 0) -> None:
        self._max_tokens = max_tokens
        self._arrays = _allocate(min(max_tokens, max(64, num_expected)))
        self._next = 0  # place of the next token
        self._run = 0  # tokens since the last separator
        self.num_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Memory that is allocated."""
        return sum(array.nbytes for array in self._arrays)

    def add_text(self, token_ids: NDArray[np.int32]) -> None:
        """Add a text of its own, evicting the oldest ones to make room."""
        text = np.append(token_ids[-(self._max_tokens - 1) :], np.int32(SEPARATOR))
        self._make_room(len(text))
        self._append(text)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Go on with the newest text; nothing is evicted.

        Raises:
            ValueError: It is longer than `max_tokens` then.
        """
        if self.num_tokens + len(token_ids) > self._max_tokens:
            raise ValueError(f"a text of more than {self._max_tokens} tokens was to be indexed")
        self._make_room(len(token_ids))
        self._append(np.array(token_ids, np.int32))

    @contextmanager
    def extended(self, token_ids: Sequence[int]) -> Iterator[None]:
        """Let the newest text go on with some tokens, and take them back at the end.

        For an index that never evicts: what was evicted could not come back.

        Raises:
            ValueError: It is longer than `max_tokens` then.
        """
        if not token_ids:
            yield
            return
        self.extend(token_ids)
        try:
            yield
        finally:
            self._next = (self._next - len(token_ids)) % len(self._arrays.tokens)
            self._run -= len(token_ids)
            self.num_tokens -= len(token_ids)
            _retract(self._arrays, self._next, len(token_ids), self._run)

    @property
    def ring(self) -> Ring:
        """Everything that is held, as long as nothing is added."""
        newest = (self._next - 1) % len(self._arrays.tokens)
        return Ring(self._arrays, newest, self._run, self.num_tokens)

    def texts(self) -> NDArray[np.int32]:
        """Return everything that is held, oldest first, in a new array."""
        first, tokens = self._next - self.num_tokens, self._arrays.tokens
        if first >= 0:
            return tokens[first : self._next].copy()
        return np.concatenate((tokens[first:], tokens[: self._next]))

    def tail(self, length: int) -> NDArray[np.int32]:
        """Return the last tokens, at most `length`; of an index that never evicted."""
        return self._arrays.tokens[max(0, self.num_tokens - length) : self.num_tokens]

    def find(self, query: NDArray[np.int32], max_places: int) -> Occurrences:
        """Return where the last tokens of a query occurred, those of the longest order first.

        Per order the newest `max_places` places with its hash are looked at.

        Args:
            query: The last tokens; as many of them as may count as one match.
            max_places: Bounds the work.
        """
        arrays, newest, _, num_tokens = self.ring
        starts, lengths = find_places(arrays, newest, num_tokens, query, max_places)
        return Occurrences(arrays.tokens, starts, lengths, -1)

    def _append(self, token_ids: NDArray[np.int32]) -> None:
        self._run = append_tokens(self._arrays, self._next, self._run, token_ids)
        self._next = (self._next + len(token_ids)) % len(self._arrays.tokens)
        self.num_tokens += len(token_ids)

    def _make_room(self, num_new: int) -> None:
        """Grow up to the bound, then evict whole texts."""
        wanted, capacity = self.num_tokens + num_new, len(self._arrays.tokens)
        if wanted > capacity and capacity < self._max_tokens:
            self._grow(min(self._max_tokens, max(2 * capacity, wanted)))
        while self.num_tokens + num_new > self._max_tokens:
            oldest = (self._next - self.num_tokens) % len(self._arrays.tokens)
            self.num_tokens -= _forget_text(self._arrays, oldest, self.num_tokens)

    def _grow(self, capacity: int) -> None:
        texts = self.texts()
        del self._arrays  # before the larger ones are allocated: memory never holds both
        self._arrays = _allocate(capacity)
        self._next = self.num_tokens = self._run = 0
        self._append(texts)


def _allocate(capacity: int) -> _Arrays:
    # At least one bucket per place, and their number a power of two.
    num_buckets = 1 << (capacity - 1).bit_length()
    return _Arrays(
        np.zeros(capacity, np.int32),
        np.full((len(ORDERS), num_buckets), _NONE, np.int32),
        np.empty((len(ORDERS), capacity), np.int32),
    )


# Nothing points at a text that is gone, except `previous`: a chain ends where a place is not
# older than the one before it, or older than the oldest text.


@jit
def _bucket(tokens: np.ndarray, last: int, order: int, num_buckets: int) -> int:
    """Return the bucket of the run of `order` tokens that ends at `last`."""
    value = np.uint64(order)
    for back in range(order):
        place = last - back if last >= back else last - back + len(tokens)
        value = (value ^ np.uint64(tokens[place])) * np.uint64(_MULTIPLIER)
        value ^= value >> np.uint64(29)
    return np.int64(value & np.uint64(num_buckets - 1))  # type: ignore[return-value]


@jit
def append_tokens(arrays: _Arrays, place: int, run: int, token_ids: np.ndarray) -> int:
    """Write tokens from a place on, chain the runs that end there; return the run's length."""
    tokens, heads, previous = arrays
    num_buckets = heads.shape[1]
    for token_id in token_ids:
        tokens[place] = token_id
        run = run + 1 if token_id >= 0 else 0
        for index, order in enumerate(ORDERS):
            if run >= order:
                bucket = _bucket(tokens, place, order, num_buckets)
                previous[index, place] = heads[index, bucket]
                heads[index, bucket] = place
            else:
                previous[index, place] = _NONE
        place = place + 1 if place + 1 < len(tokens) else 0
    return run


@jit
def _retract(arrays: _Arrays, first: int, num_tokens: int, run: int) -> None:
    """Undo `append_tokens` of the newest tokens, from a place on.

    Args:
        arrays: Of the index.
        first: The place.
        num_tokens: From there on.
        run: Its length before them.
    """
    _, heads, previous = arrays
    for back in range(1, num_tokens + 1):
        place = first + num_tokens - back
        for index, order in enumerate(ORDERS):
            if run + num_tokens - back + 1 >= order:
                bucket = _bucket(arrays.tokens, place, order, heads.shape[1])
                heads[index, bucket] = previous[index, place]


@jit
def _forget_text(arrays: _Arrays, place: int, num_tokens: int) -> int:
    """Remove the oldest text from the heads of chains; return its length with the separator."""
    tokens, heads, _ = arrays
    for run in range(1, num_tokens + 1):
        if tokens[place] < 0:
            return run
        for index, order in enumerate(ORDERS):
            if run >= order:
                bucket = _bucket(tokens, place, order, heads.shape[1])
                if heads[index, bucket] == place:
                    heads[index, bucket] = _NONE
        place = place + 1 if place + 1 < len(tokens) else 0
    return num_tokens


@jit
def find_places(
    arrays: _Arrays, newest: int, num_tokens: int, query: np.ndarray, max_places: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the place after each occurrence of the last tokens, and how many agree, [M] both."""
    tokens, heads, previous = arrays
    capacity = len(tokens)
    starts = np.empty(len(ORDERS) * max_places, np.int64)
    lengths = np.empty(len(ORDERS) * max_places, np.int64)
    count = 0
    found_above = len(query) + 1  # matches of this length were found by a longer order
    for index, order in enumerate(ORDERS):
        if order > len(query):
            continue
        place = heads[index, _bucket(query, len(query) - 1, order, heads.shape[1])]
        last_age, num_seen = -1, 0
        while place != _NONE and num_seen < max_places:
            age = newest - place if newest >= place else newest - place + capacity
            if age <= last_age or age >= num_tokens:
                break
            # The newest token has nothing after it: it is the context's own end or a separator.
            if age > 0:
                length = _match_length(tokens, place, num_tokens - age, query)
                follower = place + 1 if place + 1 < capacity else 0
                if order <= length < found_above and tokens[follower] >= 0:
                    starts[count], lengths[count] = follower, length
                    count += 1
                num_seen += 1
            last_age = age
            place = previous[index, place]
        found_above = order
    return starts[:count], lengths[:count]


@jit
def _match_length(tokens: np.ndarray, place: int, num_before: int, query: np.ndarray) -> int:
    """Return how many last tokens of the query stand before and at a place."""
    length = 0
    while length < min(len(query), num_before) and tokens[place] == query[len(query) - 1 - length]:
        length += 1
        place = place - 1 if place > 0 else len(tokens) - 1
    return length
