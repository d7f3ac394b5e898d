"""Medians, spreads and intervals of paired rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
SIGNIFICANT_DIGITS = 5


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return minimum, median and maximum of at least one value."""
    return {
        "min": rounded(min(values)),
        "median": rounded(statistics.median(values)),
        "max": rounded(max(values)),
    }


def rounded(value: float) -> float:
    """Return the value with as many digits as a measurement can mean."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def rates(num_tokens: Sequence[int], seconds: NDArray[np.float64]) -> list[float]:
    """Return tokens per second of each round.

    Args:
        num_tokens: Of each unit of work, the same in every round, [U].
        seconds: That each took in each round, [rounds, U].
    """
    total = float(sum(num_tokens))
    return [total / float(row.sum()) for row in seconds]


def ratio_interval(
    seconds: NDArray[np.float64], base_seconds: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median speed ratio.

    Rounds and units of work are both resampled with replacement, the same ones for both systems
    because they were measured in pairs. The statistic is that of the report: the median over
    rounds of (base seconds / seconds), each summed over units. Percentile method. With few rounds
    the interval is itself a rough estimate, and it knows nothing of other machines or prompts
    unlike these.

    Args:
        seconds: Of the system, [rounds, U].
        base_seconds: Of what it is compared with, doing the same work, [rounds, U].
        seed: Of the resampling.
    """
    generator = np.random.default_rng(seed)
    num_rounds, num_units = seconds.shape
    rows = generator.integers(num_rounds, size=(NUM_RESAMPLES, num_rounds))
    units = generator.integers(num_units, size=(NUM_RESAMPLES, num_units))
    # How often each unit was drawn, [resamples, U]: sums over draws become one matrix product.
    weights = np.stack([np.bincount(draw, minlength=num_units) for draw in units])
    ratios = (weights @ base_seconds.T) / (weights @ seconds.T)  # [resamples, rounds]
    medians = np.median(np.take_along_axis(ratios, rows, axis=1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return rounded(float(low)), rounded(float(high))


__all__ = ["NUM_RESAMPLES", "rates", "ratio_interval", "rounded", "spread"]
