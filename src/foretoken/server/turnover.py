"""When a full queue will have room again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0  # older finishes say nothing about now
MAX_FINISHES = 256


class Turnover:
    """Estimates, from how fast requests finish, when one more can be taken.

    Args:
        clock: Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._finished_s: deque[float] = deque(maxlen=MAX_FINISHES)
        self._promised_s = -math.inf  # until when places are promised to those turned away

    def count_finish(self) -> None:
        """Note that a request has ended, in whatever way."""
        self._finished_s.append(self._clock())

    def retry_after_s(self, num_places: int, num_unfinished: int, busy_s: float) -> int:
        """Return when to come back, whole seconds, at least 1.

        Requests are taken to finish as fast as lately, and those that were turned away before to
        come back when they were told to: each is told a time of its own, so that they do not all
        come at once. Nobody is told more than it takes to finish all that there is.

        Args:
            num_places: How many requests must finish first.
            num_unfinished: How many there are.
            busy_s: For how long the oldest of them has been here.
        """
        now_s = self._clock()
        while self._finished_s and self._finished_s[0] < now_s - WINDOW_S:
            self._finished_s.popleft()
        since_s = now_s - self._finished_s[0] if self._finished_s else 0.0
        # One more than were seen: before the first one finishes, it is expected to take as long
        # again as it has taken.
        interval_s = max(since_s, min(busy_s, WINDOW_S)) / (len(self._finished_s) + 1)
        last_s = now_s + interval_s * max(num_unfinished, num_places)
        wanted_s = max(now_s, self._promised_s) + interval_s * num_places
        self._promised_s = min(wanted_s, last_s)
        return max(1, math.ceil(self._promised_s - now_s))


__all__ = ["Turnover"]
