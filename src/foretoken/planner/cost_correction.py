"""How passes now differ from a measured curve: in level, and by how much more for more rows."""

from __future__ import annotations

import math

NOISE = 0.01  # variance of the logarithm of a pass's time about what was expected
LEVEL_DRIFT = 7e-5  # added variance of the level with each pass: about 12 passes count
SLOPE_DRIFT = 3e-6  # and of the slope, which hardly changes
LEVEL_VARIANCE, SLOPE_VARIANCE = 1.0, 0.005  # before the first pass
LARGEST_DEVIATION = 0.25  # more is taken for this: one pass that was interrupted says little


class Correction:
    """Fits log(time / curve) = level + slope * log(rows) to the passes that come by.

    A machine may read half as fast as when the curve was measured and compute as fast as then; a
    curve may have been measured while others worked. Level and slope follow by a Kalman filter: a
    level drifts, a slope hardly does, so that passes which all have as many rows move the level
    and leave the slope to those that differ.

    Attributes:
        level: Of the logarithm, at one row.
        slope: Per e-fold of rows.
    """

    __slots__ = ("_cross", "_level_variance", "_slope_variance", "level", "slope")

    def __init__(self) -> None:
        self.level = self.slope = 0.0
        self._level_variance, self._slope_variance, self._cross = (
            LEVEL_VARIANCE,
            SLOPE_VARIANCE,
            0.0,
        )

    def factor(self, num_rows: int) -> float:
        """Return how much longer a pass over so many rows takes than the curve says."""
        return math.exp(self.level + self.slope * math.log(num_rows))

    def observe(self, num_rows: int, ratio: float) -> None:
        """Learn how much longer than the curve says a pass took."""
        x = math.log(num_rows)
        deviation = math.log(max(ratio, 1e-3)) - self.level - self.slope * x
        self._level_variance += LEVEL_DRIFT
        self._slope_variance += SLOPE_DRIFT
        level_gain = self._level_variance + self._cross * x
        slope_gain = self._cross + self._slope_variance * x
        total = level_gain + slope_gain * x + NOISE
        if total < 2 * NOISE:  # what was expected is known well enough to tell an outlier
            deviation = max(-LARGEST_DEVIATION, min(LARGEST_DEVIATION, deviation))
        self.level += deviation * level_gain / total
        self.slope += deviation * slope_gain / total
        self._level_variance -= level_gain * level_gain / total
        self._slope_variance -= slope_gain * slope_gain / total
        self._cross -= level_gain * slope_gain / total


__all__ = ["LARGEST_DEVIATION", "Correction"]
