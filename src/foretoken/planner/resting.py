"""Plain decoding that goes on: steps in which a planner has nothing to decide and nothing to learn.

Beside a small model whatever is done in every step shows: where a step takes a third of a
millisecond, ten lines of Python that nothing else has called meanwhile are two percent of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foretoken.planner.base import Order, Share, StepTimes
from foretoken.planner.cost import CostModel
from foretoken.planner.pacing import Pace
from foretoken.planner.probing import Probes

_UNSETTLED_STEPS = 2  # of a rest, the first ones, find the processor's caches full of other things
_LEAST_STEPS = 3  # before their times tell anything


@dataclass(slots=True)
class PlainTimes:
    """What steps of plain decoding took, summed.

    Args:
        num_steps: How many.
        num_keys: Positions that their rows looked back on.
        pass_s: Their passes.
        rest_s: All but their passes.
        most_pass_s: The longest pass.
        most_rest_s: The most besides a pass.
    """

    num_steps: int = 0
    num_keys: int = 0
    pass_s: float = 0.0
    rest_s: float = 0.0
    most_pass_s: float = 0.0
    most_rest_s: float = 0.0


class Rest:
    """Answers for the planner until something may have to be decided.

    What steps take meanwhile is summed up: a step that is looked at more closely takes longer for
    that, and would be no example of those that are not.

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
        self._times: dict[int, PlainTimes] = {}  # by requests
        self._own = PlainTimes()  # for as many as there are
        self._num_keys = self._num_requests = self._num_unsettled = 0
        self._has_news = False

    def begin(self, shares: Sequence[Share]) -> None:
        """Rest as long as plan and requests stay as they are, all of them decoding plainly."""
        self._steps_left = self._pace.pass_quiet_steps()
        self._orders = [{}] * len(shares)
        self._num_requests = len(shares)
        self._num_keys = sum(share.num_keys for share in shares)
        self._num_unsettled = _UNSETTLED_STEPS
        self._own = self._times.setdefault(len(shares), PlainTimes())

    def orders(self, num_requests: int) -> list[Order] | None:
        """Return the answer for a step; None if somebody has to think of one.

        Args:
            num_requests: Of the step. Another number ends the rest.
        """
        if not self._steps_left:
            self._num_requests = 0
            return None
        if num_requests != len(self._orders):
            self.end()
            return None
        self._steps_left -= 1
        return self._orders

    def end(self) -> None:
        """Wake up: what is left of the rest has not passed."""
        self._pace.take_back(self._steps_left)
        self._steps_left = self._num_requests = 0

    def note(self, times: StepTimes) -> None:
        """Note what a step of plain decoding took; nothing if it was no part of a rest."""
        if not self._num_requests:
            return
        self._num_keys += self._num_requests
        if self._num_unsettled:
            self._num_unsettled -= 1
            return
        own, pass_s = self._own, times.pass_s
        rest_s = times.total_s - pass_s
        own.num_steps += 1
        own.num_keys += self._num_keys
        own.pass_s += pass_s
        own.rest_s += rest_s
        own.most_pass_s = max(pass_s, own.most_pass_s)
        own.most_rest_s = max(rest_s, own.most_rest_s)

    def teach(self, cost: CostModel) -> float:
        """Have a cost model learn from the steps since this was last asked; return their seconds.

        The longest of them do not count: they were interrupted.
        """
        seconds = 0.0
        for num_requests, own in self._times.items():
            seconds += own.pass_s + own.rest_s
            num_steps = own.num_steps - 1
            if num_steps < _LEAST_STEPS:
                continue
            pass_s = (own.pass_s - own.most_pass_s) / num_steps
            rest_s = (own.rest_s - own.most_rest_s) / num_steps
            num_keys = own.num_keys // own.num_steps
            cost.observe_plain(num_requests, num_keys, pass_s, rest_s, num_steps)
        self._times.clear()
        return seconds

    def tell_news(self) -> None:
        """Have a plan made, since drafts have become worth more though nobody drafted."""
        self._has_news = True
        self.end()
        self._pace.hurry()

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
        has_news, self._has_news = self._has_news, False
        if (
            has_news
            or not is_plain
            or self._pace.is_new
            or self._probes.has_credit
            or before != kinds
        ):
            return True
        self._pace.go_on()
        return False


__all__ = ["Rest"]
