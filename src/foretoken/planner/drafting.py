"""What drafting and steps cost, learned from the steps themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, source_names
from foretoken.planner.choices import Seen
from foretoken.planner.cost import CostModel

_LEVELS_RATE = 0.2  # weight of the newest draft in the usual depth of a drafter's
_UNSEEN_SHARE = 0.1  # of a plain pass that a drafter is taken to need until it was seen
_NUM_TELLING = 6
_NUM_WARM_UP = 2  # drafts of a drafter that teach nothing: code is loaded, buffers are made


class Drafting:
    """Expected time of drafters.

    A drafter that did not draft for a request in the step before first reads what it has missed.
    Such a draft is no usual one, so it is not counted. As long as there was nothing else, the
    shortest of them is what a draft may take. A drafter's very first ones say nothing at all.

    Args:
        cost: Holds the running estimates.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._levels: dict[str, float] = {}  # usual depth of each drafter's drafts, once seen
        self._least_ms: dict[str, float] = {}  # of each drafter's drafts, usual ones or not
        self._num_seen: dict[str, int] = {}
        self._num_usual: dict[str, int] = {}

    def prices(
        self, labels: Sequence[str], num_requests: int, plain_ms: float
    ) -> NDArray[np.float64]:
        """Return what drafts of some drafters are expected to take, [L, 3].

        Each one's milliseconds of a draft without levels and of a level, and its usual levels.

        Args:
            labels: Of the drafters.
            num_requests: For how many they draft.
            plain_ms: Time of a step without drafts, to guess from where nothing is known.
        """
        prices = np.empty((len(labels), 3))
        for row, label in enumerate(labels):
            levels = self._levels.get(label)
            if levels is None:
                prices[row] = self._least_ms.get(label, _UNSEEN_SHARE * plain_ms), 0.0, 0.0
            else:
                fixed_ms = self._cost.draft_ms(label, num_requests, 0)
                prices[row] = fixed_ms, self.level_ms(label, num_requests), levels
        return prices

    def level_ms(self, label: str, num_requests: int) -> float:
        """Return the expected time of one more level of a drafter's drafts."""
        return self._cost.draft_ms(label, num_requests, 1) - self._cost.draft_ms(
            label, num_requests, 0
        )

    def is_known(self, label: str) -> bool:
        """Return whether a drafter's time was seen often enough to tell levels from the rest."""
        return self._num_usual.get(label, 0) >= _NUM_TELLING

    def is_warm(self, label: str) -> bool:
        """Return whether a drafter has drafted before the draft that was learned last."""
        return self._num_seen.get(label, 0) > _NUM_WARM_UP

    def learn(
        self,
        label: str,
        drafts: Sequence[Sequence[Draft]],
        seconds: float,
        *,
        is_caught_up: bool,
    ) -> bool:
        """Learn how long a drafter took; return whether that says something about the next time.

        Args:
            label: Of the drafter.
            drafts: Of the requests that it drafted for, in one step or in several.
            seconds: What it took, in the mean of the steps.
            is_caught_up: Whether it drafted for all of them in the step before.
        """
        self._num_seen[label] = self._num_seen.get(label, 0) + 1
        if not self.is_warm(label):
            return False
        self._least_ms[label] = min(1000.0 * seconds, self._least_ms.get(label, math.inf))
        if not is_caught_up:
            return False
        self._num_usual[label] = self._num_usual.get(label, 0) + 1
        levels = fmean(max(_levels_of(label, draft) for draft in own) for own in drafts)
        known = self._levels.get(label, levels)
        self._levels[label] = known + _LEVELS_RATE * (levels - known)
        self._cost.observe_draft(label, len(drafts[0]), levels, seconds, len(drafts))
        return True


def learn_costs(cost: CostModel, steps: Sequence[Seen], own_s: float = 0.0) -> None:
    """Have a cost model learn from some steps what passes took, and what was around them.

    Args:
        cost: Of the target's passes.
        steps: At least one; of the same requests, all of them with drafts or none.
        own_s: What planning took of them.
    """
    num_steps, num_requests = len(steps), len(steps[0].shares)
    is_plain = not steps[0].times.draft_s
    sizes = [(seen.num_rows, sum(share.num_keys for share in seen.shares)) for seen in steps]
    pass_s = sum(seen.times.pass_s for seen in steps)
    cost.observe_passes(sizes, pass_s, num_requests, is_plain=is_plain)
    drafts_s = sum(sum(seen.times.draft_s.values()) for seen in steps)
    rest_s = sum(seen.times.total_s for seen in steps) - pass_s - drafts_s - own_s
    num_rows = sum(rows for rows, _ in sizes) / num_steps
    cost.observe_overhead(
        num_requests, num_rows, rest_s / num_steps, is_plain=is_plain, num_steps=num_steps
    )


def _levels_of(label: str, draft: Draft) -> int:
    """Return the depth of what a drafter proposed of a draft."""
    depths = draft.tree.depths
    own = [depths[node] for node, name in enumerate(draft.source) if label in source_names(name)]
    return max(own, default=0)


__all__ = ["Drafting", "learn_costs"]
