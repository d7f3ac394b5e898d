"""A time that depends on two counts, estimated from the last dozens of observations."""

from __future__ import annotations

DECAY = 0.98  # of an observation's weight with each that follows: the last fifty count
LARGEST_RATIO = 4.0  # an observation so much slower than expected counts as no slower than that
NUM_TRUSTED = 5  # observations after which there is an expectation to compare with
RIDGE = 1e-3  # of the mean weight; what was known before decides where counts do not vary apart


class RunningCost:
    """Fits time = a * first + b * second, a and b >= 0, by least squares that forget.

    What the counts that occur do not tell stays what it was: where they do not vary apart, as in
    plain decoding, their sum is learned and not how it is shared between them. As long as nothing
    tells, all of it is the first one's.
    """

    __slots__ = ("_is_solved", "_mean_ms", "_num_seen", "_per_first", "_per_second", "_sums")

    def __init__(self) -> None:
        # Of first * first, first * second, second * second, first * ms and second * ms.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._num_seen = 0
        self._mean_ms = 0.0
        self._per_first = self._per_second = 0.0
        self._is_solved = True

    def observe(self, first: float, second: float, seconds: float, num_times: int = 1) -> None:
        """Learn from one observation, or the mean of several that were alike."""
        ms = 1000.0 * seconds
        if self._num_seen >= NUM_TRUSTED:
            # By the parts last worked out, which is cheap. The mean too: where nothing was
            # expected, something must still be learnable.
            expected_ms = self._per_first * first + self._per_second * second
            ms = min(ms, LARGEST_RATIO * max(self._mean_ms, expected_ms))
        xx, xy, yy, xt, yt = self._sums
        decay = DECAY**num_times
        self._sums = (
            decay * xx + num_times * first * first,
            decay * xy + num_times * first * second,
            decay * yy + num_times * second * second,
            decay * xt + num_times * first * ms,
            decay * yt + num_times * second * ms,
        )
        self._num_seen += num_times
        self._mean_ms += (ms - self._mean_ms) * max(1.0 - decay, num_times / self._num_seen)
        self._is_solved = False

    @property
    def is_known(self) -> bool:
        """Whether there was an observation."""
        return self._num_seen > 0

    def expect_ms(self, first: float, second: float) -> float:
        """Return the expected time; 0 before any observation."""
        if not self._is_solved:
            self._solve()
        return self._per_first * first + self._per_second * second

    def _solve(self) -> None:
        xx, xy, yy, xt, yt = self._sums
        known_first, known_second = self._per_first, self._per_second
        if not (known_first or known_second):
            known_first = xt / xx if xx else 0.0
        ridge = RIDGE * (xx + yy) / 2 or 1.0
        xx, yy = xx + ridge, yy + ridge
        xt, yt = xt + ridge * known_first, yt + ridge * known_second
        determinant = xx * yy - xy * xy
        self._per_first = (xt * yy - yt * xy) / determinant
        self._per_second = (yt * xx - xt * xy) / determinant
        # A negative share is noise: the other one explains all of it.
        if self._per_first < 0:
            self._per_first, self._per_second = 0.0, yt / yy
        elif self._per_second < 0:
            self._per_first, self._per_second = xt / xx, 0.0
        self._is_solved = True


__all__ = ["RunningCost"]
