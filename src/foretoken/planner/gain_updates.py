"""Compiled code that moves what drafts are known to be worth, in arrays of classes or requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit, jit_borrowing

PRIOR_DRAFTS = 2.0  # drafts that what was known before is worth, when there are none yet
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
    """Count one draft, and move the means of the nodes that were asked for towards its own."""
    counts[at, arm] += 1
    rate = max(least_rate, 1.0 / (counts[at, arm] + PRIOR_DRAFTS))
    for node in range(num_asked):
        gains[at, arm, node] *= 1.0 - rate
        if node < len(probs):
            gains[at, arm, node] += rate * probs[node]


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


@jit_borrowing
def learn_counts(
    of_all: NDArray[np.float64],
    kind: int,
    of_request: NDArray[np.float64],
    row: int,
    arm: int,
    counts: tuple[int, int, int],
    weights: tuple[float, float],
) -> float:
    """Scale what a way is worth by counted tokens, for anybody and for a request.

    One call: each finds nothing of its own in the processor's caches.

    Args:
        of_all: By class of temperature; those of other classes are scaled alike.
        kind: The class of the request.
        of_request: By row.
        row: Of the request.
        arm: The way.
        counts: As for `_scale`.
        weights: For anybody, and for the request.

    Returns:
        The factor for the request.
    """
    num_asked, num_steps, num_taken = counts
    factor = _scale(of_all, kind, arm, weights[0], num_asked, num_steps, num_taken)
    for other in range(len(of_all)):
        if other != kind:
            for node in range(of_all.shape[2]):
                of_all[other, arm, node] = min(of_all[other, arm, node] * factor, 1.0)
    return _scale(of_request, row, arm, weights[1], num_asked, num_steps, num_taken)


@jit_borrowing
def learn_luck(
    of_request: NDArray[np.float64],
    row: int,
    arm: int,
    are_alike: NDArray[np.bool_],
    counts: tuple[int, int, int],
    rate: float,
) -> float:
    """Scale what some ways are worth to a request by what came of one of them; return the factor.

    Args:
        of_request: By row.
        row: Of the request.
        arm: The way whose tokens were counted.
        are_alike: The ways, this one included, [A].
        counts: As for `_scale`.
        rate: Their weight.
    """
    factor = _scale(of_request, row, arm, rate, counts[0], counts[1], counts[2])
    for other in range(len(are_alike)):
        if are_alike[other] and other != arm:
            for node in range(of_request.shape[2]):
                of_request[row, other, node] = min(of_request[row, other, node] * factor, 1.0)
    return factor


@jit_borrowing
def learn_text(
    known: tuple[NDArray[np.float64], NDArray[np.float64]],
    place: tuple[int, int, int],
    worth: NDArray[np.float64],
    weights: tuple[float, float],
) -> float:
    """Move what a way is worth to anybody, and to a request, towards what a text has shown.

    Other classes of temperature are scaled by as much as that changes it; returned is by how many
    tokens.

    Args:
        known: Of all by class, and of requests by row.
        place: The class, the request's row or -1, and the way.
        worth: Of its nodes, [N].
        weights: For anybody, and for the request.
    """
    (of_all, of_request), (kind, row, arm), (rate, own_rate) = known, place, weights
    before = after = _LEAST_TOKENS
    for node in range(of_all.shape[2]):
        before += of_all[kind, arm, node]
        of_all[kind, arm, node] += rate * (worth[node] - of_all[kind, arm, node])
        after += of_all[kind, arm, node]
        if row >= 0:
            of_request[row, arm, node] += own_rate * (worth[node] - of_request[row, arm, node])
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


__all__ = ["PRIOR_DRAFTS", "blend", "bounded", "learn_counts", "learn_luck", "learn_text"]
