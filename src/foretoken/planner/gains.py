"""What drafts are worth: expected tokens of each of their nodes, for every way to draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.planner.gain_updates import (
    PRIOR_DRAFTS,
    RATE_OF_ALL,
    blend,
    bounded,
    learn_counts,
    learn_luck,
    learn_text,
)
from foretoken.planner.spread import STRENGTH, new_spread

MOST_PAIRED = 4  # drafters up to which every two of them are a way of their own

# Weight of the newest draft of a request, at most, and in parts of one over what all weigh.
_RATE_OF_REQUEST, _SHARE_OF_REQUEST = 0.15, 0.9
_NUM_CLASSES = 5  # of temperature: guesses come true less often where more is left to chance

Arm = tuple[str, ...]
"""A way to draft: labels of the drafters whose drafts are merged; none is plain decoding."""


def list_arms(labels: Sequence[str]) -> list[Arm]:
    """Return the ways to draft with some drafters: each alone, two of a few, and all together."""
    arms: list[Arm] = [(label,) for label in labels]
    if 2 < len(labels) <= MOST_PAIRED:
        arms += combinations(labels, 2)
    if len(labels) > 1:
        arms.append(tuple(labels))
    return arms


def temperature_class(temperature: float) -> int:
    """Return the class in which experience is shared; greedy requests have their own."""
    return 0 if temperature <= 0 else min(_NUM_CLASSES - 1, 1 + int(2 * temperature))


class Gains:
    """Expected tokens of the best node of a draft, of the second best and so on.

    For each request and way to draft, the mean over recent drafts; of nodes that were not asked
    for, over earlier ones. Until a request has drafts of its own in some way, they are worth what
    they are to all of its temperature, however that changes meanwhile. How much drafts are worth
    differs between temperatures; by how much that changes when texts change does not, so what is
    counted at one is learned at all.

    Args:
        arms: Ways to draft.
        max_nodes: N, most nodes of a draft.
        first_guess: For each drafter, the probability with which its first guess is taken, as
            long as nothing else is known.

    Attributes:
        arms: As given.
    """

    def __init__(
        self, arms: Sequence[Arm], max_nodes: int, first_guess: Mapping[str, float]
    ) -> None:
        self.arms = list(arms)
        # The ways of one drafter that each other one is a union of; -1 fills up.
        self._parts = np.full((len(self.arms), max(map(len, self.arms))), -1)
        for place, arm in enumerate(self.arms):
            self._parts[place, : len(arm)] = [self.arms.index((label,)) for label in arm]
        prior = np.array([_prior_gains(arm, max_nodes, first_guess) for arm in arms])
        self._of_all = np.repeat(prior[None], _NUM_CLASSES, axis=0)
        self._all_counts = np.zeros((_NUM_CLASSES, len(self.arms)))
        self._of_request = np.zeros((0, len(self.arms), max_nodes))
        self._counts = np.zeros((0, len(self.arms)))
        self._num_counted = np.zeros((0, len(self.arms)))  # steps of a request
        self._is_own = np.zeros((0, len(self.arms)), np.bool_)  # whether a request had such drafts
        self._spread = new_spread(len(self.arms))
        # Whether whole texts tell what a way is worth; what its drafts give is then their own luck.
        self._is_retraced = np.zeros(len(self.arms), np.bool_)
        self._retraced: list[int] = []
        self._rows: dict[str, tuple[int, int]] = {}
        self._free: list[int] = []
        # Compiled, or found in the cache, before a step waits for it.
        none, counts = np.zeros((1, *prior.shape)), np.zeros((1, len(prior)))
        known, nobody = (none, none, new_spread(len(prior))), (0, 0, 0)
        blend(none, counts, 0, 0, np.zeros(1), 1, RATE_OF_ALL)
        learn_counts(known, nobody, (1, 1, 0, 0), 1.0)
        learn_luck(known, nobody, np.ones(len(prior), np.bool_), (1, 1, 0, 0), 1.0)
        learn_text(known, nobody, np.ones(1 + max_nodes, np.int64), 1.0)
        places = np.zeros((1, 2), np.int64)
        bounded(none, none, np.zeros(counts.shape, np.bool_), places, self._parts)

    def of(self, requests: Sequence[tuple[str, int]]) -> NDArray[np.float64]:
        """Return the expected tokens of the nodes of some requests' drafts, [B, A, N].

        Args:
            requests: Ids and temperature classes.
        """
        places = np.array([self._row(request_id, kind) for request_id, kind in requests])
        return bounded(self._of_request, self._of_all, self._is_own, places, self._parts)

    def learn(
        self,
        request: tuple[str, int],
        arm: int,
        probs: NDArray[np.float64],
        num_asked: int,
    ) -> None:
        """Learn what one draft of a request was worth.

        Args:
            request: Its id and temperature class.
            arm: Index of the way it was drafted.
            probs: Probability that each of its nodes is reached, the largest first.
            num_asked: Nodes that it could have had; at most N.
        """
        row, kind = self._own_row(request, arm)
        asked = probs[:num_asked]
        rate = min(_RATE_OF_REQUEST, _SHARE_OF_REQUEST / float(self._spread[arm, STRENGTH]))
        blend(self._of_request, self._counts, row, arm, asked, num_asked, rate)
        if not self._is_retraced[arm]:
            blend(self._of_all, self._all_counts, kind, arm, asked, num_asked, RATE_OF_ALL)

    def learn_count(
        self,
        request: tuple[str, int],
        arm: int,
        num_asked: int,
        num_steps: int,
        num_taken: int,
        num_squares: int,
    ) -> float:
        """Learn how many tokens the drafts of some steps gave, of which nothing else is known.

        What such drafts are worth is scaled by what came over what was expected.

        Args:
            request: Whose they were: its id and temperature class.
            arm: Index of the way they were drafted.
            num_asked: Nodes that each could have had, 1 to N.
            num_steps: As many drafts, at least one.
            num_taken: Draft tokens that were taken.
            num_squares: Sum of the squares of those that were taken of each draft.

        Returns:
            The factor for the request.
        """
        row, kind = self._own_row(request, arm)
        self._num_counted[row, arm] += num_steps
        num_counted, known = float(self._num_counted[row, arm]), self._known
        counts, place = (num_asked, num_steps, num_taken, num_squares), (kind, row, arm)
        if not self._is_retraced[arm]:
            return learn_counts(known, place, counts, num_counted)
        # What is lucky for one that copies is lucky for the others.
        for other in self._retraced:
            self._own_row(request, other)
        return learn_luck(known, place, self._is_retraced, counts, num_counted)

    def learn_text(self, request: tuple[str, int], arm: int, counts: NDArray[np.int64]) -> float:
        """Learn what a way would have given along a text, whatever was used for it.

        From then on this alone says what the way is worth to requests without such drafts.

        Args:
            request: Whose text it is: its id and temperature class.
            arm: Index of the way.
            counts: Drafts, at least one, and those of which each node was taken, [1 + N].

        Returns:
            How many tokens more a draft is worth to others than before.
        """
        self._note_retraced(arm)
        row, kind = self._row(*request)
        place = kind, row if self._is_own[row, arm] else -1, arm
        self._all_counts[kind, arm] += counts[0]
        return learn_text(self._known, place, counts, float(self._all_counts[kind, arm]))

    def learn_difference(
        self, request: tuple[str, int], arm: int, other: int, parts: NDArray[np.float64]
    ) -> None:
        """Have a way be worth what another one is worth, but for a difference, to everybody.

        Args:
            request: Whose text has told so: its id and temperature class.
            arm: Index of the way.
            other: Of the one that it is compared with.
            parts: Of each node, the part of what the other one misses that it gives; if negative,
                the part of what that one gives that it misses, [N].
        """
        self._note_retraced(arm)
        self._of_all[:, arm] = _differing(self._of_all[:, other], parts)
        row, _ = self._row(*request)
        if self._is_own[row, arm] and self._is_own[row, other]:
            self._of_request[row, arm] = _differing(self._of_request[row, other], parts)

    @property
    def _known(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        return self._of_all, self._of_request, self._spread

    def _note_retraced(self, arm: int) -> None:
        if not self._is_retraced[arm]:
            self._is_retraced[arm] = True
            self._retraced.append(arm)

    def forget(self, request_id: str) -> None:
        """Forget a request; what was learned from it for others stays."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row[0])

    def _own_row(self, request: tuple[str, int], arm: int) -> tuple[int, int]:
        """Return the row of a request that now has drafts of its own, and its class."""
        row, kind = self._row(*request)
        if not self._is_own[row, arm]:
            self._is_own[row, arm] = True
            self._of_request[row, arm] = self._of_all[kind, arm]
            # What others have shown counts as much as so many drafts of its own.
            strength = float(self._spread[arm, STRENGTH])
            self._counts[row, arm] = min(self._all_counts[kind, arm], strength - PRIOR_DRAFTS)
        return row, kind

    def _row(self, request_id: str, kind: int) -> tuple[int, int]:
        found = self._rows.get(request_id)
        if found is None:
            if not self._free:
                num_rows = len(self._counts)
                more = max(4, num_rows)
                self._free = list(range(num_rows, num_rows + more))
                self._of_request = _longer(self._of_request, more)
                self._counts = _longer(self._counts, more)
                self._num_counted = _longer(self._num_counted, more)
                self._is_own = _longer(self._is_own, more)
            row = self._free.pop()
            if not self._all_counts[kind].any():
                self._adopt(kind)
            self._num_counted[row], self._is_own[row] = 0.0, False
            found = self._rows[request_id] = (row, kind)
        return found

    def _adopt(self, kind: int) -> None:
        """Begin a class of temperature with what the next one has shown, if any has."""
        known = [other for other in range(_NUM_CLASSES) if self._all_counts[other].any()]
        if known:
            nearest = min(known, key=lambda other: abs(other - kind))
            self._of_all[kind] = self._of_all[nearest]
            self._all_counts[kind] = np.minimum(self._all_counts[nearest], PRIOR_DRAFTS)


def _prior_gains(arm: Arm, max_nodes: int, first_guess: Mapping[str, float]) -> NDArray[np.float64]:
    """Return what a chain is worth each of whose tokens is taken with the same probability."""
    missed = np.prod([1.0 - first_guess[label] for label in arm])
    gains: NDArray[np.float64] = (1.0 - missed) ** np.arange(1, max_nodes + 1)
    return gains


def _longer(array: NDArray[Any], num_more: int) -> NDArray[Any]:
    return np.concatenate((array, np.zeros((num_more, *array.shape[1:]), array.dtype)))


def _differing(worth: NDArray[np.float64], parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what nodes are worth that differ by some parts from others, see `learn_difference`."""
    return worth + parts * np.where(parts > 0.0, 1.0 - worth, worth)


__all__ = ["Arm", "Gains", "list_arms", "temperature_class"]
