"""How the work of a round is divided, so that what the machine does meanwhile hits all alike.

A machine that others use is faster now and slower then, also within a second. Systems that
take turns with the same prompts see much the same of it; what is left, medians over many such
comparisons take out. A batch that takes long is divided into several turns: the others have theirs
in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from foretoken.bench.runner import System
from foretoken.bench.systems import PausingHost, Task, Turn, units

T = TypeVar("T")

# Of plain decoding. A turn begins with caches that others have filled, which costs an engine that
# chooses among drafters half a millisecond more than one that does not: a percent of 0.05 s.
TURN_S = 0.2
SLICE_S = 0.4  # likewise: an order and its reverse
_LEAST_TOKENS = 4  # of each request in a turn: about what a step with drafts makes


@dataclass(frozen=True, slots=True)
class PausingSystem(System):
    """A line of the results whose batches can be divided into turns."""

    host: PausingHost

    def turns(self, tasks: Sequence[Task], schedule: Schedule) -> Iterator[Turn]:
        """Yield this system's turns of a lap, each when its time has come.

        Args:
            tasks: Of the lap.
            schedule: Says how many turns that are.
        """
        if schedule.turns_per_lap == 1:
            batch_size = schedule.batch_size
            yield self.host.run(tasks, batch_size=batch_size, speculative=self.speculative)
            return
        yield from self.host.run_in_parts(
            tasks, num_parts=schedule.turns_per_lap, speculative=self.speculative
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Batches by round, slice and lap.

    In a lap every system does the same prompts, in one turn or, where a batch takes long, in
    several. A slice is some laps, and the ratios of systems are those of their seconds in a slice.
    A round is some slices.

    Args:
        batch_size: Prompts at once.
        batches_per_round: At least one.
        batches_per_lap: Likewise; one where it has several turns.
        turns_per_lap: One, or an even number: every order comes with its reverse.
        laps_per_slice: An even number if a lap is one turn.
    """

    batch_size: int
    batches_per_round: int
    batches_per_lap: int = 1
    turns_per_lap: int = 1
    laps_per_slice: int = 2

    @classmethod
    def least(cls, batch_size: int, num_prompts: int) -> Schedule:
        """Return one of whole batches for at least so many prompts a round."""
        return cls(batch_size=batch_size, batches_per_round=math.ceil(num_prompts / batch_size))

    def fitted(self, batch_s: float, least_s: float, num_tokens: int) -> Schedule:
        """Return one whose turns are short, and whose rounds are this one's or longer.

        Args:
            batch_s: What plain decoding of a batch takes.
            least_s: What plain decoding of a round is to take at least.
            num_tokens: That each request makes.
        """
        per_lap = max(1, round(TURN_S / batch_s))
        pairs_of_turns = min(round(batch_s / (2 * TURN_S)), num_tokens // (2 * _LEAST_TOKENS))
        if pairs_of_turns:
            turns, laps = 2 * pairs_of_turns, max(1, round(SLICE_S / batch_s))
        else:
            turns, laps = 1, 2 * max(1, round(SLICE_S / (2 * per_lap * batch_s)))
        per_round = self.batches_per_round
        if per_round * batch_s < least_s:
            slice_s = laps * per_lap * batch_s
            per_round = laps * per_lap * math.ceil(least_s / slice_s)
        return replace(
            self,
            batches_per_round=per_round,
            batches_per_lap=per_lap,
            turns_per_lap=turns,
            laps_per_slice=laps,
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


def orders(systems: Sequence[T], seed: int) -> Iterator[Sequence[T]]:
    """Yield the order of each round of turns, for ever: one that is drawn, then its reverse.

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


__all__ = ["PausingSystem", "Schedule", "orders"]
