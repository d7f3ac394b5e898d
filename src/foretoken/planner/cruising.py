"""Steps by a plan that holds: nothing is decided in them, and what came of them is told later.

Beside a small model whatever is done in every step shows, most of all code that nothing else has
called meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.verdict import Verdict
from foretoken.planner.base import Order, Share, StepTimes
from foretoken.planner.choices import Passed, Seen
from foretoken.planner.pacing import Pace

# Steps, after which it may be told that the plan is found wanting: of those that are looked at or
# kept, and of those of which numbers are counted. To be told takes as long as five steps' notes.
_MOST_NOTES, _MOST_COUNTED = 6, 12
# Of so many times that it tells, all steps of one are kept to be looked at more closely, and of the
# others numbers: what is kept is cold when it is looked at. In a trial all are kept but those of
# the first time: its first steps find the processor's caches full of others.
_WATCHED_EVERY = 8


class Cruise:
    """Answers for the planner until something may have to be decided.

    Args:
        pace: Of plans; what passes here passes there.
        always: Drafters that draft in every step; each request has its own bounds for them.

    Attributes:
        is_on: Whether it has answered for this step.
    """

    def __init__(self, pace: Pace, always: Collection[str] = ()) -> None:
        self._pace, self._always = pace, frozenset(always)
        self._steps_left = 0
        self._orders: list[Order] = []
        self._sizes: Sequence[int] = ()
        self._needs: list[int] = []  # nodes that each request's own bounds have to allow
        self.is_on = False
        # Of steps that nobody has been told of.
        self._notes: list[Seen] = []
        self._passed = Passed((), [])
        self._num_noted = 0
        self._num_told = 0  # times, since steps were kept
        self._is_trial = self._is_union = False

    def begin(
        self,
        shares: Sequence[Share],
        orders: Sequence[Order],
        sizes: Sequence[int],
        *,
        is_trial: bool = False,
    ) -> None:
        """Go on like in this step as long as plan and requests stay as they are, if possible.

        It is not where prompts are read, or who drafts always does.

        Args:
            shares: Requests of this step.
            orders: Who drafts for them.
            sizes: For each request the nodes that the plan gives it.
            is_trial: Whether that is another way than the one that the plan prefers.
        """
        for share in shares:
            is_decoding = share.budget is not None and share.num_rows == 1
            if not (is_decoding and self._always.isdisjoint(share.drafters)):
                return
        self._steps_left = self._pace.pass_steps()
        if is_trial:
            self._num_told = 0
        self._is_trial = is_trial
        # What each would have given alone is told by what each has proposed.
        self._is_union = any(len(order) > 1 for order in orders)
        self._passed = Passed(shares, [[] for _ in shares])
        self._sizes, self._orders = sizes, list(orders)
        self._needs = [max((it.max_nodes for it in own.values()), default=0) for own in orders]

    @property
    def is_ahead(self) -> bool:
        """Whether it answers for the steps to come."""
        return self._steps_left > 0

    def orders(self, shares: Sequence[Share]) -> list[Order] | None:
        """Return the answer for a step; None if somebody has to think of one."""
        self.is_on = False
        if not self._steps_left:
            return None
        if len(shares) != len(self._needs):
            self.end()
            return None
        self._steps_left -= 1
        self.is_on = True
        orders = self._orders
        for place, need in enumerate(self._needs):
            budget = shares[place].budget
            if budget is None or budget.max_nodes < need or budget.max_depth < need:
                if orders is self._orders:
                    orders = list(orders)
                orders[place] = _narrowed(orders[place], budget)
        return orders

    def are_within(self, drafts: Sequence[Draft]) -> bool:
        """Return whether nothing has to be cut away from the drafts of a step.

        One drafter keeps within its bounds; what several have drafted together may be larger.
        """
        if not self._is_union:
            return True
        for draft, size in zip(drafts, self._sizes, strict=True):
            if draft.tree.num_draft_tokens > size:
                return False
        return True

    @property
    def is_watched(self) -> bool:
        """Whether what comes of these steps is looked at more closely."""
        return self._num_told >= (1 if self._is_trial else _WATCHED_EVERY - 1)

    @property
    def keeps(self) -> bool:
        """Whether steps are to be kept; of others numbers are enough."""
        return self._is_union or self.is_watched

    def keep(self, seen: Seen) -> bool:
        """Keep a step; return whether it is time to tell."""
        self._notes.append(seen)
        self._num_noted += 1
        return self._num_noted >= _MOST_NOTES

    def count(self, verdicts: Sequence[Verdict | None], times: StepTimes) -> bool:
        """Count a step; return whether it is time to tell."""
        self._passed.add(verdicts, times)
        self._num_noted += 1
        return self._num_noted >= (_MOST_NOTES if self._is_trial else _MOST_COUNTED)

    def take_notes(self) -> tuple[Passed | None, list[Seen], bool]:
        """Return what came of the steps that nobody has been told of, and forget it.

        Returns:
            Numbers of steps, if any were counted; the steps that were kept; and whether these are
            to be looked at more closely. They were not while they were done, so that what they
            took is what such steps take.
        """
        if not self._num_noted:
            return None, [], False
        notes, self._notes = self._notes, []
        passed, is_watched = self._passed, self.is_watched
        self._passed = Passed(passed.shares, [[] for _ in passed.shares])
        self._num_noted = 0
        self._num_told = 0 if is_watched and not self._is_trial else self._num_told + 1
        return None if notes else passed, notes, is_watched

    def end(self) -> None:
        """Have somebody think again in the next step: what is left has not passed."""
        self._pace.take_back(self._steps_left)
        self._steps_left = 0


def _narrowed(order: Order, budget: DraftBudget | None) -> Order:
    """Return an order within a request's own bounds, which shrink towards its end."""
    if budget is None or budget.is_empty:
        return {}
    return {
        label: replace(
            budget, max_nodes=min(own.max_nodes, budget.max_nodes), min_gain=own.min_gain
        )
        for label, own in order.items()
    }


__all__ = ["Cruise"]
