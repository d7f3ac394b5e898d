"""How passes now differ from a measured curve: in level, with their rows, and in plain decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOISE = 0.01  # variance of the logarithm of a pass's time about what was expected ...
LEAST_NOISE = 5e-4  # ... and of the mean of however many
LEVEL_DRIFT = 3e-4  # added variance of the level with each pass: about 6 passes count
SLOPE_DRIFT = 3e-6  # and of the slope, which hardly changes
PLAIN_DRIFT = 1e-5  # and of what sets plain decoding apart
LEVEL_VARIANCE, SLOPE_VARIANCE, PLAIN_VARIANCE = 1.0, 0.005, 0.02  # before the first pass
OUTLIER = 2.5  # standard deviations from what was expected; more counts as no more than this ...
MOST_DEVIATION = 0.7  # ... and the first times, of which nothing is expected, as no more than this


class Filter:
    """A Kalman filter of some numbers that drift, each observation a weighted sum of them.

    Args:
        variances: Of each number, about 0, before the first observation.
        drifts: Added to its variance with each.

    Attributes:
        state: The numbers.
    """

    __slots__ = ("_covariance", "_drifts", "state")

    def __init__(self, variances: Sequence[float], drifts: Sequence[float]) -> None:
        places = range(len(variances))
        self.state = [0.0] * len(variances)
        self._drifts = drifts
        self._covariance = [
            [variances[row] if row == column else 0.0 for column in places] for row in places
        ]

    def observe(self, weights: Sequence[float], value: float, noise: float = NOISE) -> None:
        """Learn from one observation; one far from what was expected says little.

        Args:
            weights: Of the numbers.
            value: Observed.
            noise: Its variance.
        """
        state, covariance = self.state, self._covariance
        for place, drift in enumerate(self._drifts):
            value -= weights[place] * state[place]
            covariance[place][place] += drift
        gains = [sum(map(float.__mul__, row, weights)) for row in covariance]
        total = sum(map(float.__mul__, gains, weights)) + noise
        limit = min(MOST_DEVIATION, OUTLIER * math.sqrt(total))
        value = max(-limit, min(limit, value))
        for place, gain in enumerate(gains):
            step = gain / total
            state[place] += step * value
            row = covariance[place]
            for column, other in enumerate(gains):
                row[column] -= step * other


class Correction:
    """Fits log(time / curve) = level + slope * log(rows) to the passes that come by.

    A machine may read half as fast as when the curve was measured and compute as fast as then; a
    curve may have been measured while others worked. A level drifts, a slope hardly does, so that
    passes which all have as many rows move the level and leave the slope to those that differ.

    Passes of plain decoding are apart from it by a constant: nothing comes between them, and they
    find more in the processor's caches than those that follow drafting.
    """

    def __init__(self) -> None:
        self._filter = Filter(
            (LEVEL_VARIANCE, SLOPE_VARIANCE, PLAIN_VARIANCE),
            (LEVEL_DRIFT, SLOPE_DRIFT, PLAIN_DRIFT),
        )

    @property
    def level(self) -> float:
        """Of the logarithm, at one row."""
        return self._filter.state[0]

    @property
    def slope(self) -> float:
        """Of the logarithm, per e-fold of rows."""
        return self._filter.state[1]

    def factor(self, num_rows: int, *, is_plain: bool = False) -> float:
        """Return how much longer a pass over so many rows takes than the curve says."""
        level, slope, plain = self._filter.state
        return math.exp(level + slope * math.log(num_rows) + plain * is_plain)

    def observe(
        self, num_rows: float, ratio: float, *, is_plain: bool = False, num_passes: int = 1
    ) -> None:
        """Learn how much longer than the curve says a pass took, or some did in the mean."""
        weights = (1.0, math.log(num_rows), float(is_plain))
        noise = max(LEAST_NOISE, NOISE / num_passes)
        self._filter.observe(weights, math.log(max(ratio, 1e-3)), noise)


__all__ = ["Correction", "Filter"]
