"""Which drafter to try beside those in use: that has a price, kept under a share of all time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from foretoken.core.draft import DraftBudget
from foretoken.planner.base import Share

PROBING_SHARE = 0.0085  # of it, at most, for drafters that are tried and not expected to pay
# Steps in which no plan has changed, after which it shrinks with the root of their number, down to
# this part of it. Trials cost what they take, and to know late costs what is missed meanwhile: the
# best share goes with the root of how often something changes, and that is less than once so far.
_CALM_STEPS, _LEAST_PART = 1000, 1 / 3
_FIRST_CREDIT = 4.0  # steps whose time may be spent on probing at once
_MOST_CREDIT = 16.0  # likewise, where nothing was tried for long: hours would buy a slow minute
_MOST_DEBT = 16.0  # steps whose time may be owed: code that a late trial loads comes but once
_RATE = 0.1  # weight of the newest step in what one takes
_MOST_PATIENCE = 16.0  # planned steps between two trials of a drafter that was found wanting
_SIZES = (4, 1, 2)  # nodes of drafts that are only tried, in turn, to tell levels' cost
_MOST_REQUESTS = 4  # that a trial is for


class Probes:
    """Says which drafter to try beside those that the plan has, as far as the time allows.

    A few requests tell as much of it as many do, and cost less.

    Args:
        labels: Of all drafters to choose from.

    Attributes:
        label: Who is tried in a planned step; None if nobody is.
        earned_s: The share for trials of all time, spent or not.
        is_wasted: Whether it had to read what it had missed first, so that its time says little.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._idle_steps = dict.fromkeys(labels, 0.0)  # in the order of trying
        self._patience = dict.fromkeys(labels, 1.0)  # idle steps before the next trial
        self._price_s = dict.fromkeys(labels, 0.0)
        self._credit_s: float | None = None
        self._step_s = 0.0  # what one takes
        self._num_calm = 0  # steps since a plan has changed
        self._num_probes = 0
        self._request_ids: frozenset[str] = frozenset()
        self.label: str | None = None
        self.is_wasted = False
        self.earned_s = 0.0

    def earn(self, seconds: float, num_steps: int = 1) -> None:
        """Add the share of the time of steps that may be spent.

        Args:
            seconds: That they took together.
            num_steps: How many.
        """
        step_s = seconds / num_steps
        if self._credit_s is None:
            self._credit_s, self._step_s = _FIRST_CREDIT * step_s, step_s
        self._step_s += _RATE * (step_s - self._step_s)
        self._num_calm += num_steps
        own_s = self._share * seconds
        self.earned_s += own_s
        most_s = max(self._credit_s, _MOST_CREDIT * self._step_s)
        self._credit_s = min(most_s, self._credit_s + own_s)

    @property
    def _share(self) -> float:
        part = math.sqrt(_CALM_STEPS / max(_CALM_STEPS, self._num_calm))
        return PROBING_SHARE * max(_LEAST_PART, part)

    def end_calm(self) -> None:
        """Note that a plan has changed: other things may, too."""
        self._num_calm = 0

    def choose(self, in_use: Collection[str], decoding: Sequence[Share]) -> None:
        """Choose a drafter that nobody uses, if its time has come; the last one if it was wasted.

        Args:
            in_use: Drafters that need no trial.
            decoding: Requests that may be drafted for.
        """
        is_again, self.is_wasted = self.is_wasted, False
        if is_again and self.label not in in_use:
            return
        self.label = self.pick(in_use, {it for share in decoding for it in share.drafters})
        if self.label is not None:
            able = [share.request_id for share in decoding if self.label in share.drafters]
            self._request_ids = frozenset(in_turn(able, self._num_probes))
            self._num_probes += 1

    def order(self, share: Share, budget: DraftBudget) -> dict[str, DraftBudget]:
        """Return the order for who is tried, nobody for most requests.

        Args:
            share: A request.
            budget: Its own bounds.
        """
        label = self.label
        if label is None or label not in share.drafters:
            return {}
        if share.request_id not in self._request_ids:
            return {}
        size = _SIZES[self._num_probes % len(_SIZES)]
        return {label: replace(budget, max_nodes=min(size, budget.max_nodes))}

    def cancel(self) -> None:
        """Try nobody."""
        self.label = None

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
        self._credit_s = max(-_MOST_DEBT * self._step_s, (self._credit_s or 0.0) - seconds)


def in_turn(request_ids: Sequence[str], number: int) -> Sequence[str]:
    """Return those of some requests that the trial of a number is for: a few tell enough."""
    first = _MOST_REQUESTS * number % len(request_ids)
    return [*request_ids[first:], *request_ids[:first]][:_MOST_REQUESTS]


__all__ = ["PROBING_SHARE", "Probes", "in_turn"]
