"""What a loop with tokens in flight asks of its planner: how early to guess, and how many at once.

A model that applies one group of layers several times can take rows at different depths through
one pass of the group, a tick. How far that pays depends on what a tick costs for so many rows
and on how early the model's guesses turn out right; a planner says so anew before every tick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FlightPlan:
    """How far requests run ahead of themselves in a tick.

    Args:
        exit_loop: Loops after which a row's guess of the next token may be issued, from 1. Those
            of the model and more: never before it is final.
        max_in_flight: Most rows of one request at once. 1 is sequential decoding: this step
            is an ordinary pass through all loops, and nothing early is seen.
        scores_early: Whether guesses of all depths are to be looked at, those before `exit_loop`
            too, though none is issued then: what is learned may lead to another exit.

    Raises:
        ConfigError: A number is less than 1.
    """

    exit_loop: int
    max_in_flight: int
    scores_early: bool = False

    def __post_init__(self) -> None:
        if self.exit_loop < 1 or self.max_in_flight < 1:
            raise ConfigError(
                "exit_loop and max_in_flight are at least 1; "
                f"got {self.exit_loop} and {self.max_in_flight}",
                hint="leave them out to have them chosen",
            )

    @property
    def is_sequential(self) -> bool:
        """Whether the step is an ordinary pass."""
        return self.max_in_flight == 1


@dataclass(frozen=True, slots=True)
class TickReport:
    """What came of a step.

    Args:
        num_requests: That were decoding in it.
        num_rows: Of all of them together.
        num_keys: Cached positions that they see, summed over requests.
        tick_s: What the step took for them, in seconds: laying out, the pass, sampling, deciding.
        settled: For each token that became final and whose early guesses were looked at, the least
            and the most depth from which they can have been right, both from 1 to the number of
            loops. Looked at from depth f on and right from s > f on: (s, s). Right from the
            first look on: (1, f). Looked at only at depth d and right: (1, d); wrong: (d + 1,
            loops).
        is_pass: Whether it was an ordinary pass, as sequential decoding takes.
    """

    num_requests: int
    num_rows: int
    num_keys: int
    tick_s: float
    settled: Sequence[tuple[int, int]] = ()
    is_pass: bool = False


class FlightPlanner(Protocol):
    """Decides before every tick; its answers change speed, never tokens."""

    def plan(self, num_requests: int, num_keys: int) -> FlightPlan:
        """Return how the next tick is to be.

        Args:
            num_requests: That decode in it.
            num_keys: Cached positions that they see, summed over requests.
        """
        ...

    def observe(self, report: TickReport) -> None:
        """Learn what came of a tick, or of an ordinary pass without prompts in it."""
        ...


class FixedFlightPlanner(FlightPlanner):
    """Says the same before every tick.

    Args:
        plan: What it says.
    """

    def __init__(self, plan: FlightPlan) -> None:
        self._plan = plan

    def plan(self, num_requests: int, num_keys: int) -> FlightPlan:
        """Return the plan."""
        return self._plan

    def observe(self, report: TickReport) -> None:
        """Learn nothing."""


__all__ = ["FixedFlightPlanner", "FlightPlan", "FlightPlanner", "TickReport"]
