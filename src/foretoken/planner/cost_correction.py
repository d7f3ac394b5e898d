"""How passes now differ from a measured curve: in level, by what comes on top, and plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOISE = 0.01  # variance of the logarithm of a pass's time about what was expected ...
LEAST_NOISE = 5e-4  # ... and of the mean of however many
LEVEL_DRIFT = 3e-4  # added variance of the level with each pass: about 6 passes count
EXTRA_DRIFT = 3e-5  # and of what comes on top of small passes, which changes little
PLAIN_DRIFT = 1e-5  # and of what sets plain decoding apart
LEVEL_VARIANCE, EXTRA_VARIANCE, PLAIN_VARIANCE = 1.0, 0.1, 0.02  # before the first pass
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
    """Fits log(time / curve) = level + extra * smallness to the passes that come by.

    The smallness of a pass is the time of a pass over one row over its own, by the curve. A machine
    may be faster or slower than when the curve was measured: that is the level. And a small model's
    pass finds the processor's caches full of other things, which those did not that were measured
    one after the other. As many milliseconds come on top of any pass for that, which is much for
    one row, and nothing for a hundred; a power of the rows would say less than nothing for those.

    Passes of plain decoding are apart from it by a constant: nothing comes between them, and they
    find more in the processor's caches than those that follow drafting.
    """

    def __init__(self) -> None:
        self._filter = Filter(
            (LEVEL_VARIANCE, EXTRA_VARIANCE, PLAIN_VARIANCE),
            (LEVEL_DRIFT, EXTRA_DRIFT, PLAIN_DRIFT),
        )

    @property
    def level(self) -> float:
        """Of the logarithm, of the largest passes."""
        return self._filter.state[0]

    @property
    def extra(self) -> float:
        """Of the logarithm, what a pass over one row has more than those."""
        return self._filter.state[1]

    def factor(self, smallness: float, *, is_plain: bool = False) -> float:
        """Return how much longer a pass of that smallness takes than the curve says."""
        level, extra, plain = self._filter.state
        return math.exp(level + extra * smallness + plain * is_plain)

    def observe(
        self, smallness: float, ratio: float, *, is_plain: bool = False, num_passes: int = 1
    ) -> None:
        """Learn how much longer than the curve says a pass took, or some did in the mean."""
        weights = (1.0, smallness, float(is_plain))
        noise = max(LEAST_NOISE, NOISE / num_passes)
        self._filter.observe(weights, math.log(max(ratio, 1e-3)), noise)


__all__ = ["Correction", "Filter"]
