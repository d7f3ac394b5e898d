"""Ratios of counts over prompts, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.bench.statistics import NUM_RESAMPLES, rounded

Counts = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio and how far the choice of prompts lets it scatter.

    Args:
        value: Of all prompts.
        standard_error: Standard deviation over resamples.
        low: Lower end of the 95 % interval, percentile method.
        high: Its upper end.
    """

    value: float
    standard_error: float
    low: float
    high: float

    def as_record(self) -> dict[str, Any]:
        """Return the numbers as they stand in a record."""
        return {
            "value": rounded(self.value),
            "standard_error": rounded(self.standard_error),
            "interval_95": [rounded(self.low), rounded(self.high)],
        }


class Bootstrap:
    """Resamples prompts with replacement: always the same draws, so that systems are paired.

    Args:
        num_prompts: U, at least one.
        seed: Of the draws.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        shares = np.full(num_prompts, 1 / num_prompts)
        # How often each prompt was drawn, [resamples, U].
        self._weights = generator.multinomial(num_prompts, shares, size=NUM_RESAMPLES).astype(float)

    def ratio(self, numerators: Counts, denominators: Counts) -> Estimate:
        """Return sum / sum.

        Args:
            numerators: One per prompt, [U].
            denominators: Positive, [U].
        """
        above, below = np.asarray(numerators, float), np.asarray(denominators, float)
        resampled = (self._weights @ above) / (self._weights @ below)
        return _estimate(above.sum() / below.sum(), resampled)

    def gain(self, ours: tuple[Counts, Counts], theirs: tuple[Counts, Counts]) -> Estimate:
        """Return how many times as large one ratio is as another one of the same prompts.

        Args:
            ours: Numerators and denominators, [U] each.
            theirs: Likewise; the numerators are positive.
        """
        totals, resampled = [], []
        for counts in (*ours, *theirs):
            values = np.asarray(counts, float)
            totals.append(values.sum())
            resampled.append(self._weights @ values)
        above, below, their_above, their_below = resampled
        value = totals[0] * totals[3] / (totals[1] * totals[2])
        return _estimate(value, above * their_below / (below * their_above))


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(resampled.std()), float(low), float(high))


__all__ = ["Bootstrap", "Estimate"]
