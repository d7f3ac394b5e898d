"""Steps by a plan that holds: nothing is decided in them, and what came of them is told later.

Beside a small model whatever is done in every step shows, most of all code that nothing else has
called meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from foretoken.core.draft import Draft, DraftBudget
from foretoken.planner.base import Order, Share
from foretoken.planner.choices import Seen
from foretoken.planner.pacing import Pace

_LEAST_STEPS = 2  # for which it is worth beginning
_MOST_NOTES = 3  # steps, after which it may be told that the plan is found wanting


class Cruise:
    """Answers for the planner until something may have to be decided.

    Args:
        pace: Of plans; what passes here passes there.

    Attributes:
        is_on: Whether it has answered for this step.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._steps_left = 0
        self._orders: list[Order] = []
        self._sizes: Sequence[int] = ()
        self._needs: list[int] = []  # nodes that each request's own bounds have to allow
        self.is_on = False
        self._notes: list[Seen] = []  # of steps that nobody has been told of

    def begin(self, orders: Sequence[Order], sizes: Sequence[int]) -> None:
        """Go on like in this step as long as plan and requests stay as they are.

        Args:
            orders: Of this step.
            sizes: For each request the nodes that the plan gives it.
        """
        self._steps_left = self._pace.pass_held_steps(_LEAST_STEPS)
        self._sizes, self._orders = sizes, list(orders)
        self._needs = [max((it.max_nodes for it in own.values()), default=0) for own in orders]

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

    def take_notes(self) -> list[Seen]:
        """Return what came of the steps that nobody has been told of, and forget it."""
        notes, self._notes = self._notes, []
        return notes

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
