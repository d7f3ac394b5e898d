"""The two clocks of a turn: the wall's, which users feel, and the processor's."""

from __future__ import annotations

import time
from typing import NamedTuple


class Seconds(NamedTuple):
    """How long something took.

    Args:
        wall_s: By the wall's clock. Whatever else the machine does is in it.
        cpu_s: Of this process, all threads together. What waits for a processor is not in it,
            what waits by spinning is.
    """

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Seconds:
        """Return what both clocks show; only differences mean something."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Seconds) -> Seconds:
        """Return the time gone by."""
        return Seconds(self.wall_s - start.wall_s, self.cpu_s - start.cpu_s)

    def plus(self, other: Seconds) -> Seconds:
        """Return both together."""
        return Seconds(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


NOTHING = Seconds(0.0, 0.0)

__all__ = ["NOTHING", "Seconds"]
