"""Plain decoding that goes on: steps in which a planner has nothing to decide and nothing to learn.

Beside a small model whatever is done in every step shows: where a step takes a third of a
millisecond, ten lines of Python that nothing else has called meanwhile are two percent of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from foretoken.planner.base import Order, Share
from foretoken.planner.pacing import Pace
from foretoken.planner.probing import Probes


class Rest:
    """Answers for the planner until something may have to be decided.

    Args:
        pace: Of plans; what passes here passes there.
        probes: They have the credit for whatever is tried.
    """

    def __init__(self, pace: Pace, probes: Probes) -> None:
        self._pace, self._probes = pace, probes
        self._steps_left = 0
        self._orders: list[Order] = []
        # By requests: what kinds of them the last plan was for.
        self._planned: dict[int, frozenset[tuple[float, tuple[str, ...]]]] = {}

    def begin(self, shares: Sequence[Share]) -> None:
        """Rest as long as plan and requests stay as they are, all of them decoding plainly."""
        self._steps_left = self._pace.pass_quiet_steps()
        self._orders = [{}] * len(shares)

    def orders(self, num_requests: int) -> list[Order] | None:
        """Return the answer for a step; None if somebody has to think of one.

        Args:
            num_requests: Of the step. Another number ends the rest.
        """
        if not self._steps_left:
            return None
        if num_requests != len(self._orders):
            self.end()
            return None
        self._steps_left -= 1
        return self._orders

    def end(self) -> None:
        """Wake up: what is left of the rest has not passed."""
        self._pace.take_back(self._steps_left)
        self._steps_left = 0

    def needs_plan(self, decoding: Sequence[Share], *, is_plain: bool) -> bool:
        """Return whether the plan that is due may be another than the last; to be asked of each.

        Where everybody decodes plainly, nothing is learned of drafts, and without credit nothing
        can be tried: a plan for requests like those before would say the same again.

        Args:
            decoding: Requests to plan for.
            is_plain: Whether the last plan was for plain decoding, and no trial.
        """
        kinds = frozenset((share.temperature, tuple(share.drafters)) for share in decoding)
        before, self._planned[len(decoding)] = self._planned.get(len(decoding)), kinds
        if not is_plain or self._pace.is_new or self._probes.has_credit or before != kinds:
            return True
        self._pace.go_on()
        return False


__all__ = ["Rest"]
