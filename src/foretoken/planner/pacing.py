"""How often to plan and what to try: both have a price, kept under a share of all time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

PLANNING_SHARE = 0.005  # of the time of all steps, at most, for planning itself
PLANNING_S = 125e-6  # for planning, at most, per request and step, however long steps are
PROBING_SHARE = 0.01  # of it, at most, for drafters that are tried and not expected to pay

_FIRST_PLANS = 8  # are made step by step, however short steps are
_MOST_STEPS = 128  # from one plan to the next
_HASTE = 4.0  # times as often as their price allows, at most, plans come where texts change ...
_CALM, _LEAST_HASTE = 0.8, 2.0  # ... and less often with each that changes nothing, down to this
_CHEAP = 2.0  # steps over which a plan is to be spread that can be left out of account
_UNSETTLED_STEPS = 2  # after a plan and the first step by it
_LEARNED_EVERY = 32  # steps between plans
_OTHER_BATCH = 1.5  # times as many requests as a plan was made for, or as few, want a new one
_TRIAL_EVERY = 3  # plans, of which one is replaced by another way if that is nearly as good
# A trial: small models' steps take about ten, or some milliseconds, until caches hold what another
# way of decoding needs. The last two of them tell what the way costs.
_TRIAL_STEPS, _LEAST_TRIAL_STEPS, _TRIAL_S = 12, 3, 0.02
_RATE = 0.1  # weight of the newest plan's price
_OUTLIER = 4.0  # times what is usual; more counts as no more than that
_FIRST_CREDIT = 4.0  # steps whose time may be spent on probing at once
_MOST_CREDIT_S = 0.2
_MOST_DEBT = 16.0  # steps whose time may be owed: code that a late trial loads comes but once
_MOST_PATIENCE = 16.0  # planned steps between two trials of a drafter that was found wanting


class Pace:
    """Spaces plans so that they take no more than a stated share of the time.

    The first few plans, and those for a batch of another size, come at once. One that has lost
    a request or two out of many is no other batch: what holds for one more or less is nearly the
    same, and where requests end one by one every second step would be planned.
    """

    def __init__(self) -> None:
        self._num_plans = 0
        self._plan_s = self._step_s = 0.0
        self._steps_left = self._num_past = 0
        self._period = 1
        self._price = math.inf  # of a plan, in steps over which it is to be spread
        self._haste = _HASTE
        self._num_requests = 0

    def begins_plan(self, num_requests: int) -> bool:
        """Return whether to plan in the step that begins; to be asked once per step."""
        self._steps_left -= 1
        self._num_past += 1
        ratio = num_requests / max(1, self._num_requests)
        is_due = self._steps_left < 0 or not 1 / _OTHER_BATCH < ratio < _OTHER_BATCH
        if is_due:
            self._num_requests = num_requests
            self._num_plans += 1
        return is_due

    @property
    def period(self) -> int:
        """Steps for which the last plan was made."""
        return self._period

    @property
    def is_new(self) -> bool:
        """Whether plans are still made step by step."""
        return self._num_plans <= _FIRST_PLANS

    @property
    def is_settled(self) -> bool:
        """Whether this step's time is one to learn from.

        It is free of planning, and of what was done otherwise before: a small model's steps take
        longer for a while after either. Of many such steps some will do. Beside large steps
        planning is nothing.
        """
        if self._price <= _CHEAP:
            return True
        is_usual = 0 <= self._steps_left < self._period - _UNSETTLED_STEPS
        return is_usual and (self._steps_left < 2 or self._steps_left % _LEARNED_EVERY == 0)

    def pass_quiet_steps(self) -> int:
        """Let the steps pass that follow this one, up to the first that is to be learned from."""
        if self._price <= _CHEAP:
            return 0
        left = self._steps_left
        num_steps = max(0, left % _LEARNED_EVERY - 1 if left >= _LEARNED_EVERY else left - 2)
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
        most = 1 if self._num_plans < _FIRST_PLANS else min(_MOST_STEPS, 2 * self._period)
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


def trial_steps(step_s: float) -> int:
    """Return how many steps a trial has, if the first of them took so many seconds."""
    return max(_LEAST_TRIAL_STEPS, min(_TRIAL_STEPS, int(_TRIAL_S / step_s)))


class Trials:
    """Says when to decode by another way than the best one for a few steps, and by which.

    Args:
        num_drafters: Each alone is a way, the first ones of all.
    """

    def __init__(self, num_drafters: int) -> None:
        self._num_drafters = num_drafters
        self._num_plans = self._num_since = self._num_trials = 0
        self._is_new_text = True

    def begin_text(self) -> None:
        """Note that requests have begun, of which what is known need not hold."""
        self._is_new_text = True

    def is_due(self, *, is_plain: bool) -> bool:
        """Return whether it is time; to be asked once per plan.

        Args:
            is_plain: Whether the plan is to decode plainly, which tells nothing about drafts.
        """
        self._num_plans += 1
        self._num_since += 1
        is_first = self._num_plans <= _FIRST_PLANS
        every = 2 if is_first else 1 if is_plain and self._is_new_text else _TRIAL_EVERY
        self._is_new_text = False
        return self._num_since >= every

    def pick(self, best: int, present: int | None) -> int | None:
        """Return the way that is tried, None for plain decoding: every drafter has its turn.

        Args:
            best: The way to draft that is best by what is known.
            present: The way that is used; None is plain decoding, beside which every second trial
                is of the best way. Beside others it is of plain decoding.
        """
        self._num_since = 0
        self._num_trials += 1
        others = [way for way in range(self._num_drafters) if way != present]
        if self._num_trials % 2 and others:
            return others[self._num_trials // 2 % len(others)]
        return best if present is None else None


class Probes:
    """Says which drafter to try beside those that the plan has, as far as the time allows.

    Args:
        labels: Of all drafters to choose from.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._idle_steps = dict.fromkeys(labels, 0.0)  # in the order of trying
        self._patience = dict.fromkeys(labels, 1.0)  # idle steps before the next trial
        self._price_s = dict.fromkeys(labels, 0.0)
        self._credit_s: float | None = None
        self._most_debt_s = 0.0

    def earn(self, seconds: float) -> None:
        """Add the share of a step's time that may be spent."""
        if self._credit_s is None:
            self._credit_s, self._most_debt_s = _FIRST_CREDIT * seconds, _MOST_DEBT * seconds
        self._credit_s = min(_MOST_CREDIT_S, self._credit_s + PROBING_SHARE * seconds)

    def pick(self, in_use: Collection[str], able: Collection[str]) -> str | None:
        """Return the drafter that has not drafted for longest, if its trial is due and can be paid.

        Trials that change nothing become rarer by and by.

        Args:
            in_use: Drafters that need no trial.
            able: Drafters that some request may have.
        """
        idle = self._idle_steps
        for label in idle:
            idle[label] += 1.0
            if label in in_use:
                idle[label], self._patience[label] = 0.0, 1.0
        due = [it for it in idle if it in able and idle[it] >= self._patience[it]]
        if not due or self._credit_s is None:
            return None
        label = max(due, key=idle.__getitem__)
        if self._price_s[label] > self._credit_s:
            return None
        idle[label] = 0.0
        self._patience[label] = min(2 * self._patience[label], _MOST_PATIENCE)
        return label

    @property
    def has_credit(self) -> bool:
        """Whether something may be tried whose price is not known before."""
        return self._credit_s is not None and self._credit_s > 0

    def pay(self, seconds: float, label: str | None = None) -> None:
        """Subtract what a trial took, of a drafter if it was one."""
        if label is not None:
            self._price_s[label] = seconds
        self._credit_s = max(-self._most_debt_s, (self._credit_s or 0.0) - seconds)


__all__ = [
    "PLANNING_S",
    "PLANNING_SHARE",
    "PROBING_SHARE",
    "Pace",
    "Probes",
    "Trials",
    "trial_steps",
]
