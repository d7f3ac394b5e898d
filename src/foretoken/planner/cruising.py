"""Steps by a plan that holds: nothing is decided in them, and what came of them is told later.

Beside a small model whatever is done in every step shows, most of all code that nothing else has
called meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from foretoken.core.draft import Draft, DraftBudget
from foretoken.planner.base import Order, Share
from foretoken.planner.choices import Seen
from foretoken.planner.pacing import Pace

_MOST_NOTES = 6  # steps, after which it may be told that the plan is found wanting
# Times that it tells, until what it tells is looked at more closely: once in so many by the plan
# that holds, and always in a trial, whose first steps find the processor's caches full of others.
_WATCHED_EVERY = 4


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
        self._notes: list[Seen] = []  # of steps that nobody has been told of
        self._num_told = 0  # times, since it was looked at more closely
        self._is_trial = False

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
        """Return whether nothing has to be cut away from the drafts of a step."""
        for draft, size in zip(drafts, self._sizes, strict=True):
            if draft.tree.num_draft_tokens > size:
                return False
        return True

    def note(self, seen: Seen) -> bool:
        """Note what came of a step; return whether it is time to tell."""
        self._notes.append(seen)
        return len(self._notes) >= _MOST_NOTES

    def take_notes(self) -> tuple[list[Seen], bool]:
        """Return what came of the steps that nobody has been told of, and forget it.

        Returns:
            The steps, and whether they are to be looked at more closely. They were not while they
            were done, so that what they took is what such steps take.
        """
        notes, self._notes = self._notes, []
        self._num_told += bool(notes)
        if self._is_trial:
            return notes, self._num_told > 1
        is_watched = self._num_told >= _WATCHED_EVERY
        if is_watched:
            self._num_told = 0
        return notes, is_watched

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
