"""How often a drafter's guesses are taken: its own estimates, corrected by what came of them."""

from __future__ import annotations

import math
from bisect import bisect

from foretoken.core.draft import Draft
from foretoken.core.tree import ROOT

# Bounds of the classes in which guesses are counted: a drafter's own estimate of a guess, how deep
# the guess stands and which of its siblings it is.
_CONFIDENCES = tuple(math.log(p) for p in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97))
_NUM_CONFIDENCES = len(_CONFIDENCES) + 1
_DEPTH_CLASS = (0, 0, 1, 2, 2, 3, 3, 3, 3, 4)  # by depth; deeper ones are of the last class
_NUM_DEPTHS = 5
_NUM_RANKS = 3

_HALF_LIFE = 100.0  # drafts after which what was learned counts half
_GROWTH = 2.0 ** (1.0 / _HALF_LIFE)
_LARGEST_WEIGHT = 1e9  # weights grow instead of old counts shrinking; then all are scaled down
_STRENGTH_OF_ALL = 6.0  # guesses that the drafter's own estimate is worth ...
_STRENGTH_OF_CLASS = 12.0  # ... and what was learned of all guesses of that confidence
_MOST_CERTAIN = 0.9  # nobody is taken at their word beyond this


class Acceptance:
    """Estimates the probability that a guess is taken once the node above it is.

    Guesses are counted by the drafter's own confidence, by depth and by rank among siblings. A
    class with few counts leans on all guesses of its confidence, and these on the drafter's own
    estimate, so that the first steps are sane. Old counts fade.

    A guess counts only if the node above it was taken, and whether it was scored or cut away does
    not matter: the target's token is known there. So the estimates do not depend on budgets.
    """

    def __init__(self) -> None:
        num_cells = _NUM_CONFIDENCES * _NUM_DEPTHS * _NUM_RANKS
        self._taken = [0.0] * num_cells
        self._seen = [0.0] * num_cells
        self._all_taken = [0.0] * _NUM_CONFIDENCES
        self._all_seen = [0.0] * _NUM_CONFIDENCES
        self._weight = 1.0

    def estimate(self, depth: int, rank: int, logprob: float) -> float:
        """Return the probability that a guess is taken, given that the node above it is.

        Args:
            depth: Of the guess; 1 below the root.
            rank: Siblings before it.
            logprob: The drafter's own estimate, as of `Draft.draft_logprobs`.
        """
        confidence = bisect(_CONFIDENCES, logprob)
        cell = _cell(confidence, depth, rank)
        weight = self._weight
        own = min(math.exp(logprob), _MOST_CERTAIN)
        strength = _STRENGTH_OF_ALL * weight
        of_all = (self._all_taken[confidence] + strength * own) / (
            self._all_seen[confidence] + strength
        )
        strength = _STRENGTH_OF_CLASS * weight
        return (self._taken[cell] + strength * of_all) / (self._seen[cell] + strength)

    def learn(self, depth: int, rank: int, logprob: float, is_taken: bool) -> None:
        """Count a guess whose parent was taken; other arguments as for `estimate`."""
        confidence = bisect(_CONFIDENCES, logprob)
        cell = _cell(confidence, depth, rank)
        self._seen[cell] += self._weight
        self._all_seen[confidence] += self._weight
        if is_taken:
            self._taken[cell] += self._weight
            self._all_taken[confidence] += self._weight

    def fade(self) -> None:
        """Let what was learned count a little less; to be called once per draft."""
        self._weight *= _GROWTH
        if self._weight > _LARGEST_WEIGHT:
            self._scale_down()

    def _scale_down(self) -> None:
        for counts in (self._taken, self._seen, self._all_taken, self._all_seen):
            counts[:] = [count / self._weight for count in counts]
        self._weight = 1.0


def _cell(confidence: int, depth: int, rank: int) -> int:
    depth_class = _DEPTH_CLASS[depth] if depth < len(_DEPTH_CLASS) else _NUM_DEPTHS - 1
    return (confidence * _NUM_DEPTHS + depth_class) * _NUM_RANKS + min(rank, _NUM_RANKS - 1)


def judged_nodes(draft: Draft, token_ids: tuple[int, ...]) -> list[tuple[int, int, int, bool]]:
    """Return the nodes of a draft of which it is known whether the target would take them.

    Args:
        draft: As proposed, nothing cut away.
        token_ids: What the target said from the root on, one token at least.

    Returns:
        Node, its depth, siblings before it, and whether it was taken; from the top down.
    """
    judged = []
    parent, children, ids = ROOT, draft.tree.children, draft.tree.token_ids
    for depth, token_id in enumerate(token_ids, start=1):
        taken = None
        for rank, node in enumerate(children[parent]):
            is_taken = ids[node] == token_id
            judged.append((node, depth, rank, is_taken))
            if is_taken:
                taken = node
        if taken is None:
            break
        parent = taken
    return judged


__all__ = ["Acceptance", "judged_nodes"]
