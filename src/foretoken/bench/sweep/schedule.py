"""How the work of a round is divided, so that what the machine does meanwhile hits all alike.

A machine that others use is faster now and slower then, also within a second. Systems that
take short turns with the same prompts see the same of it; what is left, medians over many such
comparisons take out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from foretoken.bench.runner import System
from foretoken.bench.systems import Task, units

TURN_S = 0.05  # of plain decoding: long beside what a cold cache costs, short beside a mood
SLICE_S = 0.2  # likewise: long enough for several prompts, which gain more or less by drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Batches by round, slice and lap.

    In a lap every system has a turn with the same prompts. A slice is some laps, and the ratios
    of systems are those of their seconds in a slice. A round is some slices.

    Args:
        batch_size: Prompts at once.
        batches_per_round: At least one.
        batches_per_lap: Likewise.
        laps_per_slice: An even number: every order comes with its reverse.
    """

    batch_size: int
    batches_per_round: int
    batches_per_lap: int = 1
    laps_per_slice: int = 2

    @classmethod
    def least(cls, batch_size: int, num_prompts: int) -> Schedule:
        """Return one of whole batches for at least so many prompts a round."""
        return cls(batch_size=batch_size, batches_per_round=math.ceil(num_prompts / batch_size))

    def fitted(self, batch_s: float, least_s: float) -> Schedule:
        """Return one whose turns are short, and whose rounds are this one's or longer.

        Args:
            batch_s: What plain decoding of a batch takes.
            least_s: What plain decoding of a round is to take at least.
        """
        per_lap = max(1, round(TURN_S / batch_s))
        laps = 2 * max(1, round(SLICE_S / (2 * per_lap * batch_s)))
        per_round = self.batches_per_round
        if per_round * batch_s < least_s:
            slice_s = laps * per_lap * batch_s
            per_round = laps * per_lap * math.ceil(least_s / slice_s)
        return replace(
            self, batches_per_round=per_round, batches_per_lap=per_lap, laps_per_slice=laps
        )

    @property
    def num_prompts(self) -> int:
        """Of a round."""
        return self.batch_size * self.batches_per_round

    def slices(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """Return the tasks of a round slice by slice."""
        return units(tasks, self.batch_size * self.batches_per_lap * self.laps_per_slice)

    def laps(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """Return the tasks of a slice lap by lap."""
        return units(tasks, self.batch_size * self.batches_per_lap)


def orders(systems: Sequence[System], seed: int) -> Iterator[Sequence[System]]:
    """Yield the order of each lap, for ever: one that is drawn, then its reverse.

    With the reverse, a machine that gets steadily slower favours nobody. Drawn orders let everybody
    come after everybody else: in a fixed cycle one would always start with the caches that the
    largest leaves, another with those of the smallest.

    Args:
        systems: All of them.
        seed: Of the orders.
    """
    generator = np.random.default_rng(seed)
    while True:
        order = [systems[place] for place in generator.permutation(len(systems))]
        yield order
        yield order[::-1]


__all__ = ["Schedule", "orders"]
