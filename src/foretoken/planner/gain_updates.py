"""Compiled code that moves what drafts are known to be worth, in arrays of classes or requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit, jit_borrowing
from foretoken.planner.spread import STRENGTH, learn_spread

PRIOR_DRAFTS = 2.0  # drafts that what was known before is worth, when there are none yet
RATE_OF_ALL = 0.03  # weight of the newest draft for anybody
# Of steps whose tokens were only counted: the weight of each for anybody, and the most that those
# of one plan or one text count, unless they surprise. Plans of unlucky steps are soon replaced;
# where as much was learned from those as from ten times as many good ones, drafts were underrated.
# With twice the weight luck moved plans; with half, a dear drafter stayed that a cheap one beats.
_RATE_OF_COUNT, _MOST_OF_COUNTS = 0.005, 0.4
_MOST_OF_TEXT = 0.25
# The weight of each for the request, at most, and in parts of one over what all weigh.
_RATE_FOR_REQUEST, _SHARE_FOR_REQUEST = 0.06, 0.36
_PRIOR_TOKENS = 0.5  # tokens that were taken as expected, beside those that were counted
_LEAST_TOKENS = 0.05  # a draft, so that nothing is a multiple of nothing
_LARGEST_CHANGE = 4.0  # of what drafts are worth, by what one plan or one text has shown


@jit_borrowing
def blend(
    gains: NDArray[np.float64],
    counts: NDArray[np.float64],
    at: int,
    arm: int,
    probs: NDArray[np.float64],
    num_asked: int,
    least_rate: float,
) -> None:
    """Count one draft, and move the means of the nodes that were asked for towards its own.

    A draft that was as large as it could be tells of the nodes after them, too: what they are
    worth if it had gone on as its second half did. What was known of them from other texts would
    keep drafts small, and nobody would ever ask for them.
    """
    counts[at, arm] += 1
    rate = max(least_rate, 1.0 / (counts[at, arm] + PRIOR_DRAFTS))
    worth = 0.0
    for node in range(num_asked):
        worth = probs[node] if node < len(probs) else 0.0
        gains[at, arm, node] += rate * (worth - gains[at, arm, node])
    last, middle = num_asked - 1, (num_asked - 1) // 2
    if middle < last < len(probs) and probs[middle] > 0.0:
        ratio = (probs[last] / probs[middle]) ** (1.0 / (last - middle))
        for node in range(num_asked, gains.shape[2]):
            worth *= ratio
            gains[at, arm, node] += rate * (worth - gains[at, arm, node])


@jit
def _scale(
    gains: NDArray[np.float64],
    at: int,
    arm: int,
    rate: float,
    num_asked: int,
    num_steps: int,
    num_taken: int,
) -> float:
    """Scale gains in place by counted tokens, with a weight; return by how much."""
    expected = 0.0
    for node in range(num_asked):
        expected += num_steps * gains[at, arm, node]
    ratio = (num_taken + _PRIOR_TOKENS) / (expected + _PRIOR_TOKENS)
    factor = min(_LARGEST_CHANGE, 1.0 + rate * (ratio - 1.0))
    for node in range(gains.shape[2]):
        gains[at, arm, node] = min(gains[at, arm, node] * factor, 1.0)
    return factor


@jit
def _surprised(rate: float, surprise: float) -> float:
    """Return a rate that what surprises raises: to 1, if chance cannot have been."""
    return rate + (1.0 - rate) * surprise


@jit
def _own_rate(strength: float, num_steps: int, num_counted: float) -> float:
    """Return the weight of counted steps for their request.

    Args:
        strength: Steps that what is known of all counts as much as.
        num_steps: How many.
        num_counted: Of this request so far, these included.
    """
    usual = min(_RATE_FOR_REQUEST, _SHARE_FOR_REQUEST / strength)
    return max(num_steps / (num_counted + strength), 1.0 - (1.0 - usual) ** num_steps)


@jit
def _spread_of_counts(
    of_all: NDArray[np.float64],
    spread: NDArray[np.float64],
    place: tuple[int, int, int],
    counts: tuple[int, int, int, int],
) -> float:
    """Learn how much drafts differ; return how surprising a count is. As for `learn_counts`."""
    (kind, _, arm), (num_asked, num_steps, num_taken, num_squares) = place, counts
    expected = 0.0
    for node in range(num_asked):
        expected += of_all[kind, arm, node]
    return learn_spread(spread, arm, expected, (num_steps, num_taken, num_squares))


@jit_borrowing
def learn_counts(
    known: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    place: tuple[int, int, int],
    counts: tuple[int, int, int, int],
    num_counted: float,
) -> float:
    """Scale what a way is worth by counted tokens, for anybody and for a request.

    One call: each finds nothing of its own in the processor's caches.

    Args:
        known: Of all by class of temperature, of which others than the request's are scaled
            alike; of requests by row; how much drafts differ, by way.
        place: The request's class and row, and the way.
        counts: Nodes that each draft could have had; as many drafts; tokens of them that were
            taken, and the sum of these tokens' squares by draft.
        num_counted: Drafts of this request so far, these included.

    Returns:
        The factor for the request.
    """
    (of_all, of_request, spread), (kind, row, arm) = known, place
    num_asked, num_steps, num_taken, _ = counts
    surprise = _spread_of_counts(of_all, spread, place, counts)
    usual = min(_MOST_OF_COUNTS, 1.0 - (1.0 - _RATE_OF_COUNT) ** num_steps)
    rate = _surprised(usual, surprise)
    factor = _scale(of_all, kind, arm, rate, num_asked, num_steps, num_taken)
    for other in range(len(of_all)):
        if other != kind:
            for node in range(of_all.shape[2]):
                of_all[other, arm, node] = min(of_all[other, arm, node] * factor, 1.0)
    rate = _own_rate(spread[arm, STRENGTH], num_steps, num_counted)
    return _scale(of_request, row, arm, rate, num_asked, num_steps, num_taken)


@jit_borrowing
def learn_luck(
    known: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    place: tuple[int, int, int],
    are_alike: NDArray[np.bool_],
    counts: tuple[int, int, int, int],
    num_counted: float,
) -> float:
    """Scale what some ways are worth to a request by what came of one of them.

    Args:
        known: As for `learn_counts`.
        place: The request's class and row, and the way whose tokens were counted.
        are_alike: The ways, this one included, [A].
        counts: As for `learn_counts`.
        num_counted: Likewise.

    Returns:
        The factor.
    """
    (of_all, of_request, spread), (_, row, arm) = known, place
    _spread_of_counts(of_all, spread, place, counts)
    rate = _own_rate(spread[arm, STRENGTH], counts[1], num_counted)
    factor = _scale(of_request, row, arm, rate, counts[0], counts[1], counts[2])
    for other in range(len(are_alike)):
        if are_alike[other] and other != arm:
            for node in range(of_request.shape[2]):
                of_request[row, other, node] = min(of_request[row, other, node] * factor, 1.0)
    return factor


@jit_borrowing
def learn_text(
    known: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    place: tuple[int, int, int],
    counts: NDArray[np.int64],
    num_drafts: float,
) -> float:
    """Move what a way is worth to anybody, and to a request, towards what a text has shown.

    Other classes of temperature are scaled by as much as that changes it; returned is by how many
    tokens.

    Args:
        known: As for `learn_counts`.
        place: The class, the request's row or -1, and the way.
        counts: Drafts, and those of which each node was taken, [1 + N].
        num_drafts: Of all texts so far, these included.
    """
    (of_all, of_request, spread), (kind, row, arm) = known, place
    num_own, num_taken, num_squares = counts[0], 0, 0
    before = after = _LEAST_TOKENS
    for node in range(of_all.shape[2]):
        num_taken += counts[1 + node]
        num_squares += (2 * node + 1) * counts[1 + node]  # as if one follows the other
        before += of_all[kind, arm, node]
    expected = before - _LEAST_TOKENS
    surprise = learn_spread(spread, arm, expected, (num_own, num_taken, num_squares))
    usual = min(_MOST_OF_TEXT, 1.0 - (1.0 - RATE_OF_ALL) ** num_own)
    rate = max(num_own / (num_drafts + PRIOR_DRAFTS), _surprised(usual, surprise))
    own_rate = num_own / (num_own + spread[arm, STRENGTH])
    for node in range(of_all.shape[2]):
        worth = counts[1 + node] / num_own
        of_all[kind, arm, node] += rate * (worth - of_all[kind, arm, node])
        after += of_all[kind, arm, node]
        if row >= 0:
            of_request[row, arm, node] += own_rate * (worth - of_request[row, arm, node])
    factor = min(_LARGEST_CHANGE, after / before)
    for other in range(len(of_all)):
        if other != kind:
            for node in range(of_all.shape[2]):
                of_all[other, arm, node] = min(of_all[other, arm, node] * factor, 1.0)
    return after - before


@jit
def bounded(
    of_request: NDArray[np.float64],
    of_all: NDArray[np.float64],
    is_own: NDArray[np.bool_],
    places: NDArray[np.int64],
    parts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return what is known of requests, their rows and classes given, those of all where not own.

    Unions are within what is known of their parts.

    No node of a union is likelier than that rank of all its parts' nodes, and none less likely
    than that rank of any part's.
    """
    num_nodes = of_all.shape[2]
    result = np.empty((len(places), *of_all.shape[1:]))
    pooled = np.empty(parts.shape[1] * num_nodes)
    for row in range(len(result)):
        own, kind = places[row]
        for arm in range(len(parts)):
            result[row, arm] = of_request[own, arm] if is_own[own, arm] else of_all[kind, arm]
        for arm in range(len(parts)):
            num_parts = 0
            for part in parts[arm]:
                if part >= 0:
                    first = num_parts * num_nodes
                    pooled[first : first + num_nodes] = result[row, part]
                    num_parts += 1
            if num_parts > 1:
                ascending = np.sort(pooled[: num_parts * num_nodes])
                for node in range(num_nodes):
                    least = 0.0
                    for part in range(num_parts):
                        least = max(least, pooled[part * num_nodes + node])
                    most = ascending[-1 - node]
                    result[row, arm, node] = min(max(result[row, arm, node], least), most)
    return result


__all__ = [
    "PRIOR_DRAFTS",
    "RATE_OF_ALL",
    "blend",
    "bounded",
    "learn_counts",
    "learn_luck",
    "learn_text",
]
