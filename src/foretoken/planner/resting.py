"""Plain decoding that goes on: steps in which a planner has nothing to decide and nothing to learn.

Beside a small model whatever is done in every step shows: where a step takes a third of a
millisecond, ten lines of Python that nothing else has called meanwhile are two percent of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from foretoken.planner.base import Order, Share, StepTimes
from foretoken.planner.cost import CostModel
from foretoken.planner.pacing import Pace
from foretoken.planner.probing import Probes

# The first steps of a rest find the processor's caches full of other things; beside the embedded
# pair it takes ten of them until a step takes what others take. Of trials, which are about as
# short, so large a share does not count either, and what is left says a little too much.
_UNSETTLED_STEPS, _UNSETTLED_SHARE = 2, 0.6
_LEAST_STEPS = 3  # before their times tell anything
_MOST_NOTES = 64  # steps, after which what they took is summed up
# Times what is usual among those: more counts as no more than that. Interruptions belong to what
# steps take, those with drafts have them, too; but a single one may be as long as many steps.
_MOST_OF_USUAL = 3.0


@dataclass(slots=True)
class PlainTimes:
    """What steps of plain decoding took, summed.

    Args:
        num_steps: How many.
        num_keys: Positions that their rows looked back on.
        pass_s: Their passes.
        rest_s: All but their passes.
    """

    num_steps: int = 0
    num_keys: int = 0
    pass_s: float = 0.0
    rest_s: float = 0.0


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
        self._notes: list[StepTimes] = []  # of steps that are not summed up yet
        self._seconds = 0.0  # of steps since the last lesson
        self._num_keys = self._num_requests = self._num_unsettled = 0
        self._has_news = False

    def begin(self, shares: Sequence[Share], *, is_trial: bool = False) -> None:
        """Rest as long as plan and requests stay as they are, all of them decoding plainly.

        Args:
            shares: The requests.
            is_trial: Whether that is another way than the one that the plan prefers.
        """
        self._add_up()
        self._steps_left = self._pace.pass_steps()
        self._orders = [{}] * len(shares)
        self._num_requests = len(shares)
        self._num_keys = sum(share.num_keys for share in shares)
        in_trial = int(_UNSETTLED_SHARE * self._steps_left) if is_trial else 0
        self._num_unsettled = max(_UNSETTLED_STEPS, in_trial)
        self._own = self._times.setdefault(len(shares), PlainTimes())

    def orders(self, num_requests: int) -> list[Order] | None:
        """Return the answer for a step; None if somebody has to think of one.

        Args:
            num_requests: Of the step. Another number ends the rest.
        """
        if not self._steps_left:
            self._add_up()
            self._num_requests = 0
            return None
        if num_requests != len(self._orders):
            self.end()
            return None
        self._steps_left -= 1
        return self._orders

    def end(self) -> None:
        """Wake up: what is left of the rest has not passed."""
        self._add_up()
        self._pace.take_back(self._steps_left)
        self._steps_left = self._num_requests = 0

    def note(self, times: StepTimes) -> None:
        """Note what a step of plain decoding took, whether it was part of a rest or not."""
        self._notes.append(times)
        if len(self._notes) >= _MOST_NOTES:
            self._add_up()

    def _add_up(self) -> None:
        """Give the time of steps its share for trials, and sum up those that are part of a rest."""
        if not self._notes:
            return
        notes, self._notes = self._notes, []
        seconds = sum(times.total_s for times in notes)
        self._probes.earn(seconds, len(notes))
        if not self._num_requests:
            return
        self._seconds += seconds
        own, num_unsettled = self._own, min(self._num_unsettled, len(notes))
        self._num_unsettled -= num_unsettled
        self._num_keys += num_unsettled * self._num_requests
        settled = notes[num_unsettled:]
        if settled:
            num_steps, num_more = len(settled), self._num_requests  # positions with each step
            own.num_keys += num_steps * self._num_keys + num_more * num_steps * (num_steps + 1) // 2
            self._num_keys += num_steps * num_more
            own.num_steps += num_steps
            own.pass_s += _usual_sum([times.pass_s for times in settled])
            own.rest_s += _usual_sum([times.total_s - times.pass_s for times in settled])

    def teach(self, cost: CostModel) -> float:
        """Have a cost model learn from the steps since the last time; return their seconds."""
        self._add_up()
        seconds, self._seconds = self._seconds, 0.0
        for num_requests, own in self._times.items():
            num_steps = own.num_steps
            if num_steps >= _LEAST_STEPS:
                pass_s, rest_s = own.pass_s / num_steps, own.rest_s / num_steps
                num_keys = own.num_keys // num_steps
                cost.observe_plain(num_requests, num_keys, pass_s, rest_s, num_steps)
        self._times.clear()
        return seconds

    def tell_news(self) -> None:
        """Have a plan made, since drafts of somebody who does not draft have become worth more."""
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


def _usual_sum(seconds: Sequence[float]) -> float:
    """Return the sum of some times, none of them counted as more than what is usual among them."""
    most = _MOST_OF_USUAL * median(seconds)
    return sum(min(it, most) for it in seconds)


__all__ = ["Rest"]
