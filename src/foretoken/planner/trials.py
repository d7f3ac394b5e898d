"""When to decode by another way than the best one for a few steps, and by which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foretoken.planner.choices import PLAIN, Choice
from foretoken.planner.gains import Arm
from foretoken.planner.pacing import FIRST_PLANS
from foretoken.planner.probing import in_turn

LEAST_LOSS = 0.01  # of its time that a trial is taken to waste however good it is
_LARGEST_LOSS = 0.4  # of it that one may be expected to waste
_LARGEST_LOSS_OF_TOLD = 0.1  # likewise, of a drafter of which only the time is to be learned
# Plans, of which one is replaced by another way if that is nearly as good: where nobody drafts,
# and where somebody does.
_EVERY, _EVERY_BESIDE_DRAFTS = 3, 6
# After which it is tried at once where drafts are used from the start: until it is timed, what it
# takes is taken from a curve that says nothing of what drafting does to the processor's caches.
_PLANS_UNTIL_PLAIN = FIRST_PLANS + 4
# Small models' steps take about ten, or some milliseconds, until caches hold what another way of
# decoding needs. Those after the first half tell what the way costs.
_STEPS, _LEAST_STEPS, _SECONDS, _LEAST_S = 12, 3, 0.02, 1e-6
# One that is expected to waste less than this part of its time lasts longer, up to so many times:
# what it costs is to begin, and few steps tell little of what is nearly as good.
_USUAL_LOSS, _LONGEST = 0.25, 5.0


class Trials:
    """Says when to try another way than the one that is used, and which.

    Every drafter has its turn, and plain decoding beside drafts, the cheap ones more often; where
    it was never used it is tried soon, however much it is expected to lose. What would lose too
    much alone is tried beside others: where two copy the same, a union costs hardly more than its
    dearer part, and what each would have given alone is counted. Of some drafters texts tell what
    they would have given; what they take tells nothing but their use, since single drafts find the
    processor's caches full of others. So those that are nearly as good are tried, too.

    Args:
        arms: Ways to draft.
        labels: Of drafters that only trials tell of.
        told: Of those that texts tell of.

    Attributes:
        loss: The part of its time that the last trial was expected to waste.
    """

    def __init__(
        self, arms: Sequence[Arm], labels: Sequence[str], told: Sequence[str] = ()
    ) -> None:
        self.loss = 0.0
        self._plain = len(arms)  # plain decoding, as one more way
        self._alone = [
            *(arms.index((label,)) for label in labels),
            self._plain,
            *(arms.index((label,)) for label in told),
        ]
        self._unions = [
            [way for way, arm in enumerate(arms) if label in arm and len(arm) > 1]
            for label in labels
        ] + [[] for _ in self._alone[len(labels) :]]
        num_told = len(told)
        self._most = [_LARGEST_LOSS] * (1 + len(labels)) + [_LARGEST_LOSS_OF_TOLD] * num_told
        self._num_idle = [0] * len(self._alone)  # plans since their last trials
        self._num_plans = self._num_since = self._num_trials = 0
        self._is_new_text = True
        self._is_plain_timed = False

    def begin_text(self) -> None:
        """Note that requests have begun, of which what is known need not hold."""
        self._is_new_text = True

    def is_due(self, *, is_plain: bool) -> bool:
        """Return whether it is time; to be asked once per plan.

        Args:
            is_plain: Whether the plan is to decode plainly, which tells nothing about drafts.
        """
        self._num_plans += 1
        self._num_idle = [idle + 1 for idle in self._num_idle]
        self._num_since += 1
        is_first = self._num_plans <= FIRST_PLANS
        usual = _EVERY if is_plain else _EVERY_BESIDE_DRAFTS
        every = 2 if is_first else 1 if is_plain and self._is_new_text else usual
        self._is_new_text = False
        self._is_plain_timed |= is_plain
        return self._num_since >= every or self._needs_plain

    @property
    def _needs_plain(self) -> bool:
        return not self._is_plain_timed and self._num_plans > _PLANS_UNTIL_PLAIN

    def pick(self, rates: NDArray[np.float64], times_ms: NDArray[np.float64], present: int) -> int:
        """Return the way that is tried; the present one if no other may be.

        How often a way is tried goes with the root of what that costs: so least is lost between
        knowing late what has become better and paying for trials. Beside plain decoding every
        second trial is of the best way to draft.

        Args:
            rates: Tokens per time that each way promises, plain decoding the last, [A + 1].
            times_ms: What a step takes, [A + 1].
            present: The way that is used.
        """
        self._num_since = 0
        self._num_trials += 1
        if self._needs_plain:
            self._is_plain_timed, self.loss = True, 1.0
            return self._plain
        losses = 1.0 - rates / rates[present]
        if present == self._plain and self._num_trials % 2 == 0:
            best = int(rates[:-1].argmax())
            self.loss = float(losses[best])
            return best if losses[best] <= _LARGEST_LOSS else present
        prices = times_ms * np.maximum(LEAST_LOSS, losses)
        found: list[tuple[float, int, int]] = []
        for turn, alone in enumerate(self._alone):
            if alone == present:
                self._num_idle[turn] = 0
                continue
            others = [alone, *(union for union in self._unions[turn] if union != present)]
            way = alone if losses[alone] <= _LARGEST_LOSS else min(others, key=losses.__getitem__)
            if losses[way] <= self._most[turn]:
                found.append((self._num_idle[turn] ** 2 / prices[way], turn, way))
        if not found:
            return present
        _, turn, way = max(found)
        self._num_idle[turn] = 0
        # How fast plain decoding is takes few steps to tell: they are all alike.
        self.loss = 1.0 if way == self._plain else float(losses[way])
        return way

    def for_few(self, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        """Return a trial beside plain decoding for a few requests, others in turn, by request.

        Who is to draft first reads what it has missed, for each of them, and few tell as much.

        Args:
            choices: As if it were for all of them.
        """
        drafting = [key for key, (_, size) in choices.items() if size]
        few = in_turn(drafting, self._num_trials)
        return {key: choice if key in few else PLAIN for key, choice in choices.items()}


def trial_steps(step_s: float, loss: float, num_requests: int) -> int:
    """Return how many steps a trial has.

    Args:
        step_s: Seconds of one.
        loss: The part of them that is expected to be wasted.
        num_requests: That draft in each; many tell as much in fewer steps.
    """
    usual = max(_LEAST_STEPS, min(_STEPS, int(_SECONDS / max(_LEAST_S, step_s))))
    longer = min(_LONGEST, _USUAL_LOSS / max(LEAST_LOSS, loss)) / max(1, num_requests)
    return int(usual * max(1.0, longer))


__all__ = ["LEAST_LOSS", "Trials", "trial_steps"]
