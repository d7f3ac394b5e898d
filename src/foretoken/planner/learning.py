"""What steps teach a planner: what came of drafts, and what they took."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from foretoken.core.draft import Draft
from foretoken.planner.choices import Choice, Passed, PlannedStep, Seen, ids_of
from foretoken.planner.cost import CostModel
from foretoken.planner.drafting import Drafting, learn_costs
from foretoken.planner.experience import Experience
from foretoken.planner.gains import Arm
from foretoken.planner.holding import Holding
from foretoken.planner.pacing import Pace
from foretoken.planner.probing import Probes
from foretoken.planner.trials import LEAST_LOSS, trial_steps

_NUM_JUDGED = 2  # steps of some, the last ones, whose drafts are looked at
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

    def pay(
        self, num_tokens: int, seconds: float, replaced: float | None, num_steps: int = 1
    ) -> None:
        """Give the time of steps its share for trials; those of a trial cost what they lost.

        Args:
            num_tokens: That they gave.
            seconds: That they took, without prompts.
            replaced: Tokens per millisecond of the way that a trial replaces; None if they are
                those of a plan.
            num_steps: How many.
        """
        self.probes.earn(seconds, num_steps)
        if replaced is not None:
            loss_s = seconds - num_tokens / replaced / 1000.0
            self.probes.pay(LEAST_LOSS * seconds + loss_s)

    def take_counts(self, request_id: str, choice: Choice) -> None:
        """Learn what was counted of a request while a plan held that was this for it."""
        arm, size = choice
        counts = self.holding.take(request_id)
        if size and counts is not None:
            self.experience.learn_counts(request_id, arm, size, counts)

    def learn_planned(self, step: PlannedStep, seen: Seen, replaced: float | None) -> None:
        """Learn from a step that was planned, and what planning took; `replaced` as for `pay`."""
        start_s, has_prompts = self._clock(), seen.has_prompts
        if step.is_new:
            self.probes.end_calm()
        if not has_prompts:
            self.pay(seen.num_tokens, seen.times.total_s, replaced)
        self.experience.learn_all(
            seen.shares, seen.orders, seen.proposed, step.probs, seen.verdicts
        )
        is_counted = step.trial_loss is not None and not has_prompts  # nothing was cut away
        if is_counted and seen.times.draft_s:
            self.holding.count([seen], is_union=len(step.arm) > 1, is_usual=False)
        for label, seconds, is_usual in self._learn_drafting([seen], step.at_work):
            if label == self.probes.label:
                # Its very first draft loads its code, which comes but once.
                self.probes.pay(seconds if self.drafting.is_warm(label) else 0.0, label)
                self.probes.is_wasted = not (is_usual or self.drafting.is_known(label))
        if self.pace.is_settled and not has_prompts:
            learn_costs(self._cost, [seen], step.own_s)
        step.own_s += self._clock() - start_s
        self.pace.planned(step.own_s, seen.times.total_s, is_new=step.is_new)
        if step.is_plain and not self.pace.is_new:
            # Where nobody drafts, plans are made for what is tried, and are part of its price.
            self.probes.pay(self.pace.plan_s)
        if step.trial_loss is not None:
            # Its first step may have to read what others have written; the others are as usual.
            step_s = min(seen.times.total_s, _MOST_OF_USUAL * self.pace.step_s)
            num_drafted = sum(len(probs) > 1 for probs in step.probs)
            self.pace.hold(trial_steps(step_s, step.trial_loss, num_drafted))
        if self.probes.is_wasted:
            self.pace.hurry()

    def count_passed(self, passed: Passed, replaced: float | None) -> bool:
        """Count steps that nobody looks at; return whether their plan is found wanting.

        Args:
            passed: Of one drafter alone.
            replaced: As for `pay`.
        """
        num_tokens = passed.num_plain_tokens + sum(passed.num_tokens)
        self.pay(num_tokens, passed.plain_s + sum(passed.seconds), replaced, passed.num_steps)
        self.holding.count_passed(passed)
        return bool(passed.num_tokens) and self.holding.is_wanting

    def learn_held(
        self, steps: Sequence[Seen], arm: Arm, *, is_judged: bool, is_timed: bool
    ) -> bool:
        """Learn from steps that were not planned; return whether their plan is found wanting.

        Args:
            steps: Of the same requests, one after the other.
            arm: How they were drafted.
            is_judged: Whether drafts of some are looked at. Tokens are counted in any case.
            is_timed: Whether what the steps took is learned from.
        """
        drafted = [seen for seen in steps if seen.times.draft_s]
        if is_timed:
            self._learn_times(drafted or steps)
        self.holding.count(drafted, is_union=len(arm) > 1)
        if is_judged:
            for seen in drafted[-_NUM_JUDGED:]:
                self.experience.judge_all(seen.shares, seen.orders, seen.proposed, seen.verdicts)
        return bool(drafted) and self.holding.is_wanting

    def _learn_times(self, steps: Sequence[Seen]) -> None:
        """Learn what steps took: the smaller ones in the mean, and the larger ones.

        The mean of all would not tell what a row takes, nor what a level of a draft does.
        """
        by_rows = sorted(steps, key=_num_rows)
        for half in (by_rows[: len(steps) // 2], by_rows[len(steps) // 2 :]):
            if half:
                learn_costs(self._cost, half)
                self._learn_drafting(half)

    def _learn_drafting(
        self, steps: Sequence[Seen], at_work: Collection[tuple[str, str]] | None = None
    ) -> list[tuple[str, float, bool]]:
        """Learn what drafting took; return each drafter, its seconds, and if they are usual ones.

        Args:
            steps: Of the same requests, one after the other, with drafts.
            at_work: Who drafted for whom in the step before; None for all of them.
        """
        learned = []
        for label in steps[0].times.draft_s:
            if label in self._always:
                continue
            served = [_served(label, seen) for seen in steps if label in seen.times.draft_s]
            is_caught_up = at_work is None or all(
                (label, key) in at_work for own in served for key, _ in own
            )
            drafts = [[draft for _, draft in own] for own in served]
            seconds = sum(seen.times.draft_s.get(label, 0.0) for seen in steps) / len(served)
            is_usual = self.drafting.learn(label, drafts, seconds, is_caught_up=is_caught_up)
            learned.append((label, seconds, is_usual))
        return learned


def _num_rows(seen: Seen) -> int:
    return seen.num_rows


def _served(label: str, seen: Seen) -> list[tuple[str, Draft]]:
    """Return the requests that a drafter drafted for in a step, and what was proposed for them."""
    parts = zip(ids_of(seen.shares), seen.orders, seen.proposed, strict=True)
    return [(key, draft) for key, order, draft in parts if label in order]


__all__ = ["Learning"]
