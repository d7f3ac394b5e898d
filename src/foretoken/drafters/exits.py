"""After which loops to guess: the exits of a drafter that guesses twice, by what was observed.

A row's guess of the next token is issued after d1 loops, and a second one, where it differs,
after d2. With t(d) the probability that the guess after d loops is not the final one of G loops,
the next token's row starts after d1 ticks if the first guess is right, after d2 if only the
second is, and after G otherwise:

    E[ticks per token] = d1 (1 - t(d1)) + d2 (t(d1) - t(d2)) + G t(d2)

taking a first guess that was right as still right after d2 loops. As distance from the final
distribution t is also the probability that a sample is rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NO_EXIT = 0


@dataclass(frozen=True, slots=True)
class Exits:
    """Loops after which a row's guesses are issued.

    Args:
        first: d1, from 1.
        second: d2 > d1; 0 for none.
    """

    first: int
    second: int = NO_EXIT

    @property
    def width(self) -> int:
        """Most guesses per row."""
        return 2 if self.second else 1

    def ticks(self, disagreement: Callable[[int], float], loops: int) -> float:
        """Return the expected ticks per token.

        Args:
            disagreement: t by depth, from 1.
            loops: G.
        """
        wrong_first = disagreement(self.first)
        if not self.second:
            return self.first * (1 - wrong_first) + loops * wrong_first
        wrong = min(wrong_first, disagreement(self.second))
        return self.first * (1 - wrong_first) + self.second * (wrong_first - wrong) + loops * wrong


def typical_disagreement(depth: int) -> float:
    """Return t before anything was observed: a power law.

    With it the best exits of 32 loops are (2, 8) and those of four (1, 2), which is what served
    best in LoopSpec, arXiv:2609.17184.
    """
    return 0.35 / depth


def best_exits(
    disagreement: Callable[[int], float],
    loops: int,
    first: int | None = None,
    second: int | None = None,
) -> Exits:
    """Return the exits with the fewest expected ticks per token; of equals the earliest.

    Args:
        disagreement: t by depth, from 1 to G - 1.
        loops: G >= 2.
        first: d1 if it is settled.
        second: d2, or 0 for none, if it is settled.
    """
    firsts = range(1, loops) if first is None else [first]
    pairs = [
        Exits(one, two)
        for one in firsts
        for two in ([NO_EXIT, *range(one + 1, loops)] if second is None else [second])
        if two == NO_EXIT or two > one
    ]
    return min(pairs, key=lambda exits: exits.ticks(disagreement, loops))


class GuessRecord:
    """Holds guesses after each number of loops against what was said in the end.

    Args:
        loops: G.
    """

    PRIOR_WEIGHT = 8  # observations that the typical value counts for

    def __init__(self, loops: int) -> None:
        self._num_seen = [0] * loops
        self._num_wrong = [0] * loops
        self._open: dict[str, list[_Guess]] = {}

    @property
    def num_seen(self) -> int:
        """Observations at the depth with the fewest."""
        return min(self._num_seen[1:])

    def disagreement(self, depth: int) -> float:
        """Return the estimated share of wrong guesses at a depth, from 1 to G - 1."""
        expected = self.PRIOR_WEIGHT * typical_disagreement(depth)
        return (expected + self._num_wrong[depth]) / (self.PRIOR_WEIGHT + self._num_seen[depth])

    def note(
        self, request_id: str, num_tokens: int, path: Sequence[int], depth: int, token_id: int
    ) -> None:
        """Remember a guess until the request has come as far.

        Args:
            request_id: Whose.
            num_tokens: Tokens of the request so far.
            path: Tokens in flight before the guess.
            depth: Loops after which it was made.
            token_id: The guess.
        """
        guess = _Guess(num_tokens, tuple(path), depth, token_id)
        self._open.setdefault(request_id, []).append(guess)

    def settle(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Count the guesses that a request has come to; those on other paths do not count."""
        still_open = []
        for guess in self._open.get(request_id, ()):
            place = guess.num_tokens + len(guess.path)
            if place >= len(token_ids):
                still_open.append(guess)
            elif tuple(token_ids[guess.num_tokens : place]) == guess.path:
                self._num_seen[guess.depth] += 1
                self._num_wrong[guess.depth] += token_ids[place] != guess.token_id
        self._open[request_id] = still_open

    def forget(self, request_id: str) -> None:
        """Drop what is open of a request; unknown ones are ignored."""
        self._open.pop(request_id, None)


class _Guess(NamedTuple):
    num_tokens: int
    path: tuple[int, ...]
    depth: int
    token_id: int
