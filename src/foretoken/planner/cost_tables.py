"""Compiled tables of what passes and steps are expected to take, by their rows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit


@jit
def row_times(
    fixed: NDArray[np.float64],
    per_key: NDArray[np.float64],
    smallness: NDArray[np.float64],
    num_keys: int,
    level: float,
    extra: float,
) -> NDArray[np.float64]:
    """Return times of passes over 0, 1, ... rows: those of the curve, corrected."""
    times = np.zeros(len(fixed))
    for num_rows in range(1, len(fixed)):
        factor = math.exp(level + extra * smallness[num_rows])
        times[num_rows] = factor * (fixed[num_rows] + per_key[num_rows] * num_keys)
    return times


@jit
def step_times(
    pass_ms: NDArray[np.float64], num_fixed: int, none_ms: float, row_ms: float
) -> NDArray[np.float64]:
    """Return times of passes and what is around them from `num_fixed` rows on."""
    times = np.empty(len(pass_ms) - num_fixed)
    for place in range(len(times)):
        num_rows = num_fixed + place
        # A curve that was measured on a busy machine may say that more rows take less.
        ms = pass_ms[num_rows] + none_ms + row_ms * num_rows
        times[place] = max(ms, times[0]) if place else ms
    return times


__all__ = ["row_times", "step_times"]
