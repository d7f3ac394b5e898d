"""What steps teach a planner: what came of drafts, and what they took."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from foretoken.planner.base import Order
from foretoken.planner.choices import Choice, PlannedStep, Seen, ids_of
from foretoken.planner.cost import CostModel
from foretoken.planner.drafting import Drafting, learn_costs
from foretoken.planner.experience import Experience
from foretoken.planner.gains import Arm
from foretoken.planner.holding import Holding
from foretoken.planner.pacing import Pace
from foretoken.planner.probing import Probes
from foretoken.planner.trials import trial_steps

_MOST_OF_USUAL = 2.0  # times a usual step that those of a trial are taken to last


class Learning:
    """Hands what a step showed to those who estimate from it.

    Args:
        cost: Of the target's passes.
        arms: Ways to draft.
        labels: Drafters to choose from.
        always: Drafters that draft in every step.
        max_nodes: Most draft tokens per request and step.
        first_guess: For each of the labels, how often its first guess is taken, as far as known.
        clock: Seconds.

    Attributes:
        experience: Of drafts.
        drafting: What it takes.
        holding: What comes of the plan that holds.
        pace: Of plans, which have a price.
        probes: Trials have one, too.
    """

    def __init__(
        self,
        cost: CostModel,
        arms: Sequence[Arm],
        labels: Sequence[str],
        always: Sequence[str],
        max_nodes: int,
        first_guess: Mapping[str, float],
        clock: Callable[[], float],
    ) -> None:
        self._cost, self._clock = cost, clock
        self._always = frozenset(always)
        self.experience = Experience(arms, (*labels, *always), max_nodes, first_guess)
        self.drafting = Drafting(cost)
        self.holding = Holding(always)
        self.pace, self.probes = Pace(), Probes(labels)

    def take_counts(self, request_id: str, choice: Choice) -> None:
        """Learn what was counted of a request while a plan held that was this for it."""
        arm, size = choice
        counts = self.holding.take(request_id)
        if size and counts is not None:
            self.experience.learn_counts(request_id, arm, size, counts)

    def learn_planned(self, step: PlannedStep, seen: Seen) -> None:
        """Learn from a step that was planned, and what planning took."""
        start_s, has_prompts = self._clock(), seen.has_prompts
        self.experience.learn_all(
            seen.shares, step.orders, seen.proposed, step.probs, seen.verdicts
        )
        is_counted = step.trial_loss is not None and not has_prompts  # nothing was cut away
        if is_counted and seen.times.draft_s:
            self.holding.count(seen, is_union=len(step.arm) > 1, is_usual=False)
        for label, seconds, is_usual in self._learn_drafting(seen, step.orders, step.at_work):
            if label == self.probes.label:
                # Its very first draft loads its code, which comes but once.
                self.probes.pay(seconds if self.drafting.is_warm(label) else 0.0, label)
                self.probes.is_wasted = not (is_usual or self.drafting.is_known(label))
        if self.pace.is_settled and not has_prompts:
            learn_costs(self._cost, seen, step.own_s)
        step.own_s += self._clock() - start_s
        self.pace.planned(step.own_s, seen.times.total_s, is_new=step.is_new)
        if step.is_plain and not self.pace.is_new:
            # Where nobody drafts, plans are made for what is tried, and are part of its price.
            self.probes.pay(self.pace.plan_s)
        if step.trial_loss is not None:
            # Its first step may have to read what others have written; the others are as usual.
            step_s = min(seen.times.total_s, _MOST_OF_USUAL * self.pace.step_s)
            self.pace.hold(trial_steps(step_s, step.trial_loss, len(step.probs)))
        if self.probes.is_wasted:
            self.pace.hurry()

    def learn_held(self, seen: Seen, arm: Arm, orders: Sequence[Order]) -> None:
        """Learn from a step that was not planned: tokens are counted, some steps looked at.

        Args:
            seen: The step.
            arm: How it was drafted.
            orders: Who drafted for whom; none if the drafts are not looked at.
        """
        is_settled = self.pace.is_settled
        if is_settled:
            learn_costs(self._cost, seen, 0.0)
        if not seen.times.draft_s:
            return
        if self.count([seen], arm):
            self.pace.hurry()
        if orders:
            self.experience.judge_all(seen.shares, orders, seen.proposed, seen.verdicts)
            if is_settled:
                self._learn_drafting(seen, orders)

    def count(self, steps: Sequence[Seen], arm: Arm) -> bool:
        """Count what came of steps by a plan that holds; return whether it is found wanting."""
        for seen in steps:
            self.holding.count(seen, is_union=len(arm) > 1)
        return self.holding.is_wanting

    def _learn_drafting(
        self,
        seen: Seen,
        orders: Sequence[Order],
        at_work: Collection[tuple[str, str]] | None = None,
    ) -> list[tuple[str, float, bool]]:
        """Learn what drafting took; return each drafter, its seconds, and if they are usual ones.

        Args:
            seen: The step.
            orders: Who drafted in it.
            at_work: Who drafted for whom in the step before; None for all of them.
        """
        learned = []
        for label, seconds in seen.times.draft_s.items():
            if label in self._always:
                continue
            parts = zip(ids_of(seen.shares), orders, seen.proposed, strict=True)
            served = [(key, draft) for key, order, draft in parts if label in order]
            is_caught_up = at_work is None or all((label, key) in at_work for key, _ in served)
            own = [draft for _, draft in served]
            is_usual = self.drafting.learn(label, own, seconds, is_caught_up=is_caught_up)
            learned.append((label, seconds, is_usual))
        return learned


__all__ = ["Learning"]
