"""How often to plan: planning has a price, kept under a share of all time."""

from __future__ import annotations

import math

PLANNING_SHARE = 0.005  # of the time of all steps, at most, for planning itself
PLANNING_S = 125e-6  # for planning, at most, per request and step, however long steps are

FIRST_PLANS = 8  # are made step by step, however short steps are
_MOST_STEPS = 256  # from one plan to the next
_HASTE = 4.0  # times as often as their price allows, at most, plans come where texts change ...
_CALM, _LEAST_HASTE = 0.8, 1.0  # ... and less often with each that changes nothing, down to this
_CHEAP = 2.0  # steps over which a plan is to be spread that can be left out of account
_UNSETTLED_STEPS = 2  # after a plan and the first step by it
_LEARNED_EVERY = 32  # steps between plans
_OTHER_BATCH = 1.5  # times as many requests as a plan was made for, or as few, want a new one
_RATE = 0.1  # weight of the newest plan's price
_OUTLIER = 4.0  # times what is usual; more counts as no more than that


class Pace:
    """Spaces plans so that they take no more than a stated share of the time.

    The first few plans, and those for a batch of another size, come at once. One that has lost
    a request or two out of many is no other batch: what holds for one more or less is nearly the
    same, and where requests end one by one every second step would be planned. Nor is one of a
    size that comes back: its plan goes on where it was left.
    """

    def __init__(self) -> None:
        self._num_plans = 0
        self._plan_s = self._step_s = 0.0
        self._steps_left = self._num_past = 0
        self._period = 1
        self._price = math.inf  # of a plan, in steps over which it is to be spread
        self._haste = _HASTE
        self._num_requests = 0
        self._gone_back_to, self._is_other = 0, False
        self._left: dict[int, tuple[int, int]] = {}  # by requests: of plans that were left

    def begins_plan(self, num_requests: int) -> bool:
        """Return whether to plan in the step that begins; to be asked once per step."""
        self._gone_back_to, self._is_other = 0, False
        if _difference(num_requests, self._num_requests) >= _OTHER_BATCH:
            self._change_to(num_requests)
        self._steps_left -= 1
        self._num_past += 1
        is_due = self._steps_left < 0
        if is_due:
            self._num_requests = num_requests
            self._num_plans += 1
        return is_due

    def _change_to(self, num_requests: int) -> None:
        if self._num_requests:
            self._left[self._num_requests] = self._steps_left, self._num_past
        nearest = min(self._left, key=lambda other: _difference(num_requests, other), default=0)
        if nearest and _difference(num_requests, nearest) < _OTHER_BATCH:
            self._num_requests = nearest
            self._steps_left, self._num_past = self._left.pop(nearest)
            self._gone_back_to = nearest
        else:
            self._num_requests, self._steps_left = num_requests, 0
            self._is_other = True

    @property
    def gone_back_to(self) -> int:
        """Requests of a plan that was left and goes on from this step on; 0 if there is none."""
        return self._gone_back_to

    @property
    def is_other(self) -> bool:
        """Whether there was no plan for a batch as large as this step's."""
        return self._is_other

    def drop_left(self) -> None:
        """Have plans that were left made again: what they were made from has changed."""
        self._left.clear()

    @property
    def period(self) -> int:
        """Steps for which the last plan was made."""
        return self._period

    @property
    def plan_s(self) -> float:
        """Seconds that a plan takes."""
        return self._plan_s

    @property
    def step_s(self) -> float:
        """Seconds that a planned step takes besides planning."""
        return self._step_s

    @property
    def is_new(self) -> bool:
        """Whether plans are still made step by step."""
        return self._num_plans <= FIRST_PLANS

    @property
    def is_cheap(self) -> bool:
        """Whether planning is nothing beside a step."""
        return self._price <= _CHEAP

    @property
    def is_settled(self) -> bool:
        """Whether this step's time is one to learn from.

        It is free of planning, and of what was done otherwise before: a small model's steps take
        longer for a while after either. Of many such steps some will do. Beside large steps
        planning is nothing.
        """
        if self.is_cheap:
            return True
        is_usual = 0 <= self._steps_left < self._period - _UNSETTLED_STEPS
        return is_usual and (self._steps_left < 2 or self._steps_left % _LEARNED_EVERY == 0)

    def pass_steps(self) -> int:
        """Let the steps pass that follow this one, up to the next plan; return how many."""
        if self.is_cheap:
            return 0
        num_steps = max(0, self._steps_left)
        self.take_back(-num_steps)
        return num_steps

    def take_back(self, num_steps: int) -> None:
        """Take back steps that were said to pass and did not."""
        self._steps_left += num_steps
        self._num_past -= num_steps

    def go_on(self) -> None:
        """Let the last plan hold on, since a new one would be the same."""
        self._lengthen(1 + self._price)

    def planned(self, plan_s: float, step_s: float, *, is_new: bool = True) -> None:
        """Learn what a plan took.

        Args:
            plan_s: Seconds of planning in the step.
            step_s: Of the whole step.
            is_new: Whether the plan is another one than the last.
        """
        self._haste = _HASTE if is_new else max(_LEAST_HASTE, _CALM * self._haste)
        if self.is_new:
            # Code is loaded and the machine finds its pace: the least of them says what it takes.
            self._plan_s = min(plan_s, self._plan_s or plan_s)
            self._step_s = min(step_s - plan_s, self._step_s or step_s - plan_s)
        else:
            # One that was interrupted says little.
            self._plan_s += _RATE * (min(plan_s, _OUTLIER * self._plan_s) - self._plan_s)
            step_s = min(step_s - plan_s, _OUTLIER * self._step_s)
            self._step_s += _RATE * (step_s - self._step_s)
        allowed_s = min(PLANNING_SHARE * self._step_s, PLANNING_S * self._num_requests)
        self._price = self._plan_s / max(1e-9, allowed_s)
        self._lengthen(1 + self._price)

    def _lengthen(self, steps: float) -> None:
        """Space plans by so many steps; they become rarer by and by, the first ones know little."""
        most = 1 if self._num_plans < FIRST_PLANS else min(_MOST_STEPS, 2 * self._period)
        self._period = int(min(most, steps))
        self._steps_left, self._num_past = self._period - 1, 0

    def hold(self, num_steps: int) -> None:
        """Have the next plan made after so many steps, this one counted, if it would come later.

        Plans after it are as rare as before.
        """
        self._steps_left = min(self._steps_left, num_steps - 1)

    def hurry(self) -> None:
        """Have the next step planned."""
        self._steps_left = 0

    def sooner(self) -> None:
        """Halve the steps until the next plan, down to a part of what its price asks for.

        For a change of which the first step tells nothing, such as another text. Where such
        changes bring no other plan, the part is a larger one.
        """
        least = int(min(self._price, _MOST_STEPS) / self._haste) - self._num_past
        self._steps_left = min(self._steps_left, max(self._steps_left // 2, least))


def _difference(one: int, other: int) -> float:
    """Return how many times as large the larger of two batches is."""
    return max(one, other) / max(1, min(one, other))


__all__ = [
    "FIRST_PLANS",
    "PLANNING_S",
    "PLANNING_SHARE",
    "Pace",
]
