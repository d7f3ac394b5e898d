"""How much drafts of a way differ, from step to step and from request to request.

Both say what a count is worth: against chance within a few steps, what is known of all weighs as
much as so many steps of a request's own; and only what chance cannot explain is taken for a change
of texts.

Compiled: one row of numbers per way, so that no step waits for a dozen small calls.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit_borrowing

# Columns. Of steps: squares about their requests' means, and degrees of freedom of these.
_SQUARES, _DEGREES = 0, 1
# Of requests: squares of their means about what was expected, in steps and less what chance
# explains, and steps.
_EXCESS, _STEPS = 2, 3
# Tokens that came beyond what was expected lately, and the variance of that.
_OFF, _VARIANCE = 4, 5
STRENGTH = 6  # steps of a request that what is known of all counts as much as
_NUM_COLUMNS = 7

_FADING = 0.97  # of what is known of differences, by each count
_FADING_OF_OFF = 0.5
_PRIOR_STRENGTH, _LEAST_STRENGTH, _MOST_STRENGTH = 16.0, 2.0, 60.0
_PRIOR_STEPS = 40.0  # that the first of these is known from
_PRIOR_SQUARES, _PRIOR_DEGREES = 1.5, 2.0
_USUAL, _SURPRISING = 2.5, 5.0  # standard deviations: by chance, and certainly not


def new_spread(num_ways: int) -> NDArray[np.float64]:
    """Return what is known of as many ways before anything is, [A, 7]."""
    spread = np.zeros((num_ways, _NUM_COLUMNS))
    spread[:, _SQUARES], spread[:, _DEGREES] = _PRIOR_SQUARES, _PRIOR_DEGREES
    spread[:, STRENGTH] = _PRIOR_STRENGTH
    return spread


@jit_borrowing
def learn_spread(
    spread: NDArray[np.float64], way: int, expected: float, counts: tuple[int, int, int]
) -> float:
    """Learn from a count how much drafts of a way differ; return how surprising it is, 0 to 1.

    Several counts that are off in the same direction are as surprising as a larger one.

    Args:
        spread: As `new_spread` returns it.
        way: The way.
        expected: Tokens per step.
        counts: Steps of one request, tokens that they gave, and the sum of these tokens' squares
            by step.
    """
    num_steps, num_taken, num_squares = counts
    of_way, mean = spread[way], num_taken / num_steps
    variance = of_way[_SQUARES] / of_way[_DEGREES]
    off = num_taken - expected * num_steps
    of_luck = variance / of_way[STRENGTH]
    of_way[_OFF] = _FADING_OF_OFF * of_way[_OFF] + off
    of_way[_VARIANCE] *= _FADING_OF_OFF * _FADING_OF_OFF
    of_way[_VARIANCE] += num_steps * (variance + num_steps * of_luck)
    deviations = abs(of_way[_OFF]) / max(of_way[_VARIANCE], 1e-12) ** 0.5
    surprise: float = min(1.0, max(0.0, (deviations - _USUAL) / (_SURPRISING - _USUAL)))
    of_way[_OFF] *= 1.0 - surprise  # what has been learned is expected from now on
    for column in (_SQUARES, _DEGREES, _EXCESS, _STEPS):
        of_way[column] *= _FADING
    of_way[_SQUARES] += num_squares - num_taken * mean + (1.0 - _FADING) * _PRIOR_SQUARES
    of_way[_DEGREES] += num_steps - 1 + (1.0 - _FADING) * _PRIOR_DEGREES
    variance = of_way[_SQUARES] / of_way[_DEGREES]
    of_way[_EXCESS] += off * off / num_steps - variance
    of_way[_STEPS] += num_steps
    prior = _PRIOR_STEPS * variance / _PRIOR_STRENGTH
    between = (max(0.0, of_way[_EXCESS]) + prior) / (of_way[_STEPS] + _PRIOR_STEPS)
    of_way[STRENGTH] = min(_MOST_STRENGTH, max(_LEAST_STRENGTH, variance / max(between, 1e-12)))
    return surprise


__all__ = ["STRENGTH", "learn_spread", "new_spread"]
