"""What a request's controls know of its tokens, kept up to date by what is new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_FIRST_ROOM = 64


class TokenCounts:
    """Which tokens occur, and how often; the last token taken in can be taken back."""

    def __init__(self) -> None:
        self._place_of: dict[int, int] = {}
        self._ids = np.empty(_FIRST_ROOM, dtype=np.int64)
        self._numbers = np.empty(_FIRST_ROOM, dtype=np.float64)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens, each once, in the order of their first occurrence; a view."""
        return self._ids[: len(self._place_of)]

    @property
    def numbers(self) -> NDArray[np.float64]:
        """How often each of `ids` occurs; a view."""
        return self._numbers[: len(self._place_of)]

    def push(self, token_id: int) -> None:
        """Take in one occurrence."""
        place = self._place_of.get(token_id)
        if place is not None:
            self._numbers[place] += 1
            return
        place = self._place_of[token_id] = len(self._place_of)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._numbers = np.concatenate([self._numbers, np.empty_like(self._numbers)])
        self._ids[place], self._numbers[place] = token_id, 1

    def pop(self, token_id: int) -> None:
        """Take back one occurrence, the last one that was taken in."""
        place = self._place_of[token_id]
        self._numbers[place] -= 1
        if self._numbers[place] == 0:  # then it was the newest of all tokens
            del self._place_of[token_id]


class NgramTable:
    """Which tokens followed each run of `size - 1` tokens.

    Args:
        size: Tokens of an n-gram, at least 2.
    """

    def __init__(self, size: int) -> None:
        self._num_before = size - 1
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}

    def push(self, token_ids: Sequence[int]) -> None:
        """Take in the n-gram that the last token completes, if there are enough."""
        if len(token_ids) > self._num_before:
            before = tuple(token_ids[-1 - self._num_before : -1])
            numbers = self._followers.setdefault(before, {})
            numbers[token_ids[-1]] = numbers.get(token_ids[-1], 0) + 1

    def pop(self, token_ids: Sequence[int]) -> None:
        """Take back what `push` of the same tokens took in."""
        if len(token_ids) > self._num_before:
            before = tuple(token_ids[-1 - self._num_before : -1])
            numbers = self._followers[before]
            numbers[token_ids[-1]] -= 1
            if not numbers[token_ids[-1]]:
                del numbers[token_ids[-1]]
            if not numbers:
                del self._followers[before]

    def followers(self, token_ids: Sequence[int]) -> Iterable[int]:
        """Return the tokens that would complete an n-gram once more, each once."""
        return self._followers.get(tuple(token_ids[-self._num_before :]), ())


class History:
    """The tokens before one choice: those that stand, and a path of draft tokens after them.

    `move_to` brings it to the history of a choice. What it then shows is a function of that
    history alone; what it costs depends on the difference to the last one, as long as the
    standing tokens are one list that only grows.

    Args:
        num_prompt_ids: Length of the prompt.
        has_counts: Keep `seen`, the counts of prompt and output.
        has_output_counts: Keep `output`, those of the output alone.
        ngram_size: Keep `ngrams`, of this size; 0 for none.
    """

    def __init__(
        self,
        num_prompt_ids: int,
        *,
        has_counts: bool = False,
        has_output_counts: bool = False,
        ngram_size: int = 0,
    ) -> None:
        self.num_prompt_ids = num_prompt_ids
        self._wanted = has_counts, has_output_counts, ngram_size
        self._source: Sequence[int] = ()
        self._path: Sequence[int] = ()
        self._num_standing = 0
        self._clear()

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt, output and path; not to be changed."""
        return self._token_ids

    @property
    def source(self) -> tuple[Sequence[int], Sequence[int]]:
        """What `move_to` was given: the standing tokens and the path."""
        return self._source, self._path

    @property
    def num_output_ids(self) -> int:
        """Tokens after the prompt, those of the path included."""
        return len(self._token_ids) - self.num_prompt_ids

    @property
    def array(self) -> NDArray[np.int64]:
        """A copy of all tokens, [T]."""
        return self._array[: len(self._token_ids)].copy()

    def move_to(self, token_ids: Sequence[int], path: Sequence[int] = ()) -> None:
        """Make these the tokens before the choice.

        Args:
            token_ids: Prompt and output so far. A list that was seen before may have grown since,
                and is otherwise the same; any other list is compared token by token.
            path: Draft tokens after them.
        """
        if not self._is_known(token_ids):
            self._clear()
        if self._num_standing < len(token_ids):
            self._shrink_to(self._num_standing)
            for position in range(self._num_standing, len(token_ids)):
                self._push(token_ids[position])
        self._source, self._path = token_ids, path
        self._num_standing = len(token_ids)
        num_shared = 0
        for ours, wanted in zip(self._token_ids[self._num_standing :], path, strict=False):
            if ours != wanted:
                break
            num_shared += 1
        self._shrink_to(self._num_standing + num_shared)
        for token_id in path[num_shared:]:
            self._push(token_id)

    def _is_known(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens go on where the standing ones end."""
        count = self._num_standing
        if len(token_ids) < count:
            return False
        if token_ids is self._source:  # it only grows, so its end tells of all of it
            return count == 0 or token_ids[count - 1] == self._token_ids[count - 1]
        return list(token_ids[:count]) == self._token_ids[:count]

    def _clear(self) -> None:
        has_counts, has_output_counts, ngram_size = self._wanted
        self.seen = TokenCounts() if has_counts else None
        self.output = TokenCounts() if has_output_counts else None
        self.ngrams = NgramTable(ngram_size) if ngram_size else None
        self._num_standing = 0
        self._token_ids: list[int] = []
        self._array = np.empty(_FIRST_ROOM, dtype=np.int64)

    def _push(self, token_id: int) -> None:
        place = len(self._token_ids)
        if place == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[place] = token_id
        self._token_ids.append(token_id)
        if self.seen is not None:
            self.seen.push(token_id)
        if self.output is not None and place >= self.num_prompt_ids:
            self.output.push(token_id)
        if self.ngrams is not None:
            self.ngrams.push(self._token_ids)

    def _shrink_to(self, length: int) -> None:
        while len(self._token_ids) > length:
            if self.ngrams is not None:
                self.ngrams.pop(self._token_ids)
            token_id = self._token_ids.pop()
            if self.seen is not None:
                self.seen.pop(token_id)
            if self.output is not None and len(self._token_ids) >= self.num_prompt_ids:
                self.output.pop(token_id)
