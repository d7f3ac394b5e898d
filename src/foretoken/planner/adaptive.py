"""The adaptive planner: one formula decides who drafts, how much is scored, and when not to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.verdict import Verdict
from foretoken.planner.base import Order, Planner, Retrace, Share, StepTimes, Text
from foretoken.planner.choices import (
    PLAIN,
    Choice,
    Plan,
    PlannedStep,
    Seen,
    are_ample,
    compile_ahead,
    ids_of,
    keep_best,
    longer,
    share_out,
    ways_of,
    who_drafts,
    with_free,
)
from foretoken.planner.cost import CostModel
from foretoken.planner.cruising import Cruise
from foretoken.planner.gains import Arm, list_arms
from foretoken.planner.learning import Learning
from foretoken.planner.outlook import Formula, Outlook
from foretoken.planner.resting import Rest
from foretoken.planner.retracing import Retracing
from foretoken.planner.trials import LEAST_LOSS, Trials

_BEYOND_EVERY = 8  # planned steps, after as many at first, in which drafts are larger than planned
_BEYOND_STEPS = 64  # after which every planned step may be one
_NEWS = 0.25  # tokens that drafts are worth more than was thought, after which plans are made anew


class AdaptivePlanner(Planner):
    """Chooses, for all requests of a step together, what maximizes expected tokens per second.

    With the nodes of all drafts sorted by the estimated probability that they are emitted, n of
    them make `(requests + sum of the n best probabilities) / (drafting + pass(rows + n) + rest)`.
    Before drafting, the same formula with the mean worth of recent drafts in place of
    probabilities says which drafters are to draft, and how much; n = 0 is plain decoding. A level
    of a tree that brings less than its time would bring elsewhere is not drafted. Costs come from
    a measured curve that follows the machine, probabilities from the drafters' own estimates
    corrected by what came of them.

    Planning takes time, so it is done in every so many steps that it stays under a stated share
    of it; in between the last plan holds. What it leaves out is tried now and then, under a
    stated share too (`planner/pacing.py`, `planner/trials.py`).

    Args:
        cost: Of the target's passes.
        labels: Drafters to choose from, at least one.
        always: Drafters that draft in every step, because what they propose is certain and free.
        max_nodes: Most draft tokens per request and step.
        first_guess: For each of the labels, how often its first guess is taken, as far as known.
        retraces: Of those of the labels that can tell what they would have given.
        clock: Seconds; what planning takes is measured by it.
    """

    def __init__(
        self,
        cost: CostModel,
        labels: Sequence[str],
        *,
        always: Sequence[str] = (),
        max_nodes: int,
        first_guess: Mapping[str, float],
        retraces: Mapping[str, Retrace] = MappingProxyType({}),
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._cost = cost
        self._clock = clock
        self._always = frozenset(always)
        self._max_nodes = max_nodes
        self._labels = tuple(labels)
        arms, untold = list_arms(labels), [label for label in labels if label not in retraces]
        told = [label for label in labels if label in retraces]
        self._arms: list[Arm] = [*arms, PLAIN[0]]
        self._formula = Formula(arms, labels)
        self._learning = Learning(cost, arms, labels, always, max_nodes, first_guess, clock)
        self._experience = self._learning.experience
        self._drafting, self._holding = self._learning.drafting, self._learning.holding
        self._pace, self._probes = self._learning.pace, self._learning.probes
        self._trials, self._cruise = Trials(arms, untold, told), Cruise(self._pace, self._always)
        self._rest = Rest(self._pace, self._probes)
        self._retracing = Retracing(retraces, max_nodes, self._experience, self._probes, clock)
        # The plan that holds: a way to draft and its size, and what it is for each request.
        self._choice = PLAIN
        self._choices: dict[str, Choice] = {}
        self._kept = Plan(PLAIN, 0.0, 0.0)
        self._plans: dict[int, Plan] = {}  # by requests
        # By the plan that holds, for requests of a choice and some drafters.
        self._orders: dict[tuple[Choice, tuple[str, ...]], tuple[DraftBudget | None, Order]] = {}
        self._present: Arm = ()  # what it prefers, which a trial may replace for some steps
        self._is_trial = self._is_new = False
        self._rate = 0.0  # tokens per millisecond that it promises
        self._delivered = math.inf  # those that it gives, if known
        self._is_idle = False  # nothing is drafted in this step, and nothing learned from it
        self._num_decoding = self._num_plans = 0
        self._step: PlannedStep | None = None  # if this one is planned
        self._ordered: Sequence[Order] = ()  # in this one
        self._proposed: Sequence[Draft] = ()  # before anything was cut away
        compile_ahead()

    # -- before drafting ---------------------------------------------------------------------

    def order(self, shares: Sequence[Share]) -> list[Order]:
        """Return for each request who drafts and within which bounds."""
        orders = self._rest.orders(len(shares)) or self._cruise.orders(shares)
        self._ordered = orders = self._decide(shares) if orders is None else orders
        return orders

    def _decide(self, shares: Sequence[Share]) -> list[Order]:
        """Return the orders of a step; it may be one to plan in."""
        self._count_cruise()
        decoding = [share for share in shares if share.budget is not None]
        self._step, self._is_idle = None, False
        has_choice = any(share.drafters for share in decoding)  # or there is nothing to plan
        is_due = has_choice and self._pace.begins_plan(len(decoding))
        if has_choice and self._pace.gone_back_to:
            self._go_back_to(self._pace.gone_back_to, decoding)
        if is_due and (self._pace.is_other or self._needs_plan(decoding)):
            start_s = self._clock()
            wasted = self._probes.label if self._probes.is_wasted else None
            self._step = PlannedStep(who_drafts(self._choices, (wasted,) if wasted else ()))
            self._num_plans += 1
            self._wake()
            self._take_counts(decoding)
            self._retracing.learn_all(decoding)
            self._plan(decoding, self._step)
            self._orders.clear()
            orders = [self._order(share) for share in shares]
            self._step.own_s = self._clock() - start_s
            return orders
        if is_due:  # the plan that holds is also the one for as many as there are now
            self._plans[len(decoding)] = self._kept
        if self._choice is PLAIN and all(self._always.isdisjoint(it.drafters) for it in decoding):
            self._is_idle = not self._pace.is_cheap
            if self._is_idle and len(decoding) == len(shares):
                self._rest.begin(shares, is_trial=self._is_trial)
            return [{}] * len(shares)
        orders = [self._usual_order(share) for share in shares]
        sizes = [self._choices.get(it.request_id, self._choice)[1] for it in shares]
        self._cruise.begin(shares, orders, sizes, is_trial=self._is_trial)
        return orders

    def _count_cruise(self) -> None:
        """Learn what came of steps in which nothing was decided; plan if that was too little."""
        passed, steps, is_watched = self._cruise.take_notes()
        is_wanting = passed is not None and self._learning.count_passed(passed, self._replaced)
        if is_wanting or (steps and self._learn_held(steps, is_timed=is_watched)):
            self._cruise.end()
            self._pace.hurry()

    @property
    def _replaced(self) -> float | None:
        """Tokens per millisecond of the way that a trial replaces; None if there is no trial."""
        return min(self._rate, self._delivered) if self._is_trial else None

    def _learn_held(self, steps: Sequence[Seen], *, is_timed: bool) -> bool:
        """Learn from steps by the plan that holds; return whether it is found wanting."""
        for seen in steps:
            self._learning.pay(seen.num_tokens, seen.times.total_s, self._replaced)
        arm, is_judged = self._choice[0], self._is_trial or is_timed
        return self._learning.learn_held(steps, arm, is_judged=is_judged, is_timed=is_timed)

    def _needs_plan(self, decoding: Sequence[Share]) -> bool:
        """Return whether a plan that is due may be another than the one that holds."""
        is_plain = self._choice is PLAIN and not (self._is_trial or self._probes.is_wasted)
        return self._rest.needs_plan(decoding, is_plain=is_plain)

    def _go_back_to(self, num_requests: int, decoding: Sequence[Share]) -> None:
        """Go on with the plan that was made when there were as many requests before."""
        self._wake()
        self._take_counts(decoding)
        # There is none where planning was interrupted; the last one goes on until it is done.
        plan = self._kept = self._plans.get(num_requests, self._kept)
        self._num_decoding, self._delivered = num_requests, math.inf
        self._choice, self._rate = plan.choice, plan.rate
        self._present, self._is_trial = plan.choice[0], False
        self._probes.cancel()
        self._holding.begin(plan.plain_rate)
        self._choices.clear()
        self._orders.clear()

    def _wake(self) -> None:
        """Learn what a rest took; if it was a trial, pay what it lost."""
        rest_s = self._rest.teach(self._cost)
        if self._replaced is not None and rest_s:
            lost = 1.0 - self._holding.plain_rate / self._replaced
            self._probes.pay(max(LEAST_LOSS, lost) * rest_s)

    def _take_counts(self, decoding: Sequence[Share]) -> None:
        """Learn what came of the plan that held until now."""
        for request_id in ids_of(decoding):
            self._learning.take_counts(request_id, self._choices.get(request_id, self._choice))

    def _usual_order(self, share: Share) -> Order:
        """Return the order of a step that is not planned; the last one, if bounds are the same."""
        choice, budget = self._choices.get(share.request_id, self._choice), share.budget
        known, size = self._orders.get((choice, share.drafters)), choice[1]
        is_own = self._always.isdisjoint(share.drafters)  # those have the request's own bounds
        if known and (known[0] is budget or (is_own and are_ample(known[0], budget, size))):
            return known[1]
        order = self._order(share)
        if known is None or are_ample(budget, budget, size):
            self._orders[choice, share.drafters] = budget, order
        return order

    def _order(self, share: Share) -> Order:
        budget = share.budget
        if budget is None or budget.is_empty:
            return {}
        arm, size = self._choices.get(share.request_id, self._choice)
        order = {label: budget for label in share.drafters if label in self._always}
        order |= {it: self._bounds(it, size, budget) for it in arm if it in share.drafters}
        return order | self._probes.order(share, budget) if self._step is not None else order

    def _bounds(self, label: str, size: int, budget: DraftBudget) -> DraftBudget:
        """Return the bounds of a drafter's draft for a request that is to have so many nodes."""
        is_tried = self._is_trial and label not in self._present
        min_gain = 0.0 if is_tried else self._level_gain(label)
        if self._step is not None and self._looks_beyond and not self._is_trial:
            size = longer(size, self._max_nodes)
        return replace(budget, max_nodes=min(size, budget.max_nodes), min_gain=min_gain)

    @property
    def _looks_beyond(self) -> bool:
        """Whether drafts are larger than the plan wants, to see what larger ones are worth."""
        every = max(1, min(_BEYOND_EVERY, _BEYOND_STEPS // self._pace.period))
        return self._num_plans <= _BEYOND_EVERY or self._num_plans % every == 0

    def _level_gain(self, label: str) -> float:
        """Return the tokens that a drafter has to promise each request for one more level."""
        count = self._num_decoding
        gain = self._rate * self._drafting.level_ms(label, count) / count
        return gain * self._experience.boast(label)

    def _plan(self, decoding: Sequence[Share], step: PlannedStep) -> None:
        """Choose the way to draft, and its size for each request."""
        self._num_decoding = count = len(decoding)
        # As if no prompts were read beside: the plan holds for the steps after this one, too.
        step_ms = self._step_ms(decoding, count, count * self._max_nodes)  # [1 + B * N]
        plain_ms = self._cost.plain_ms(sum(share.num_keys for share in decoding), count)
        plain_rate = count / plain_ms
        if not self._is_trial and self._present:
            self._delivered = self._holding.rate or self._delivered
        self._holding.begin(plain_rate)
        prices = self._drafting.prices(self._labels, count, plain_ms)
        gains = self._experience.gains(decoding)  # [B, A, N]
        able = ways_of(decoding, self._arms[:-1])  # [B, A]
        outlook = self._formula.outlook(gains, able, prices, step_ms, plain_ms)
        best = outlook.best(self._arms.index(self._present))
        self._rate = float(outlook.rates[best])
        self._choose_way(decoding, best, outlook)
        if best != outlook.plain:
            step.draft_ms = float(outlook.draft_ms[best])
        self._keep(Plan(self._choice, self._rate, plain_rate))
        in_use = {label for arm, _ in self._choices.values() for label in arm}
        self._probes.choose(in_use, decoding)
        self._choose_trial(decoding, outlook)

    def _keep(self, plan: Plan) -> None:
        """Keep a plan for batches of this size; if it is another, those for other sizes may be."""
        if not self._pace.is_other and plan.choice[0] != self._kept.choice[0]:
            self._pace.drop_left()
        self._kept = self._plans[self._num_decoding] = plan

    def _choose_way(self, decoding: Sequence[Share], way: int, outlook: Outlook) -> None:
        """Have requests draft in one way, or decode plainly."""
        if way == outlook.plain:
            self._choice, self._choices = PLAIN, dict.fromkeys(ids_of(decoding), PLAIN)
            return
        size = int(outlook.sizes[way])
        self._choices = share_out(decoding, self._arms[way], outlook.nodes[:, way], size)
        self._choice = self._arms[way], max(1, round(size / len(decoding)))

    def _choose_trial(self, decoding: Sequence[Share], outlook: Outlook) -> None:
        """Decode by another way now and then for a few steps, if it may be the best.

        What the plan never does is never timed, and may have become cheaper than it was. A few
        steps, because the first ones find the processor's caches full of something else.
        """
        self._is_new = self._choice[0] != self._present
        if self._is_new or self._pace.is_other:
            self._delivered = math.inf
        self._present, self._is_trial = self._choice[0], False
        is_due = self._trials.is_due(is_plain=self._choice is PLAIN) and self._probes.label is None
        if is_due and self._probes.has_credit:
            present = self._arms.index(self._present)
            tried = self._trials.pick(outlook.rates, outlook.times_ms, present)
            self._is_trial = tried != present
            if self._is_trial:
                self._choose_way(decoding, tried, outlook)
                if present == outlook.plain:
                    self._choices = self._trials.for_few(self._choices)

    # -- after drafting ----------------------------------------------------------------------

    def choose(self, shares: Sequence[Share], drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts cut down to the nodes that are worth their rows."""
        if self._is_idle:
            return list(drafts)
        self._proposed = drafts
        if self._cruise.is_on and self._cruise.are_within(drafts):
            return list(drafts)
        if self._step is None:
            return [self._within(*pair) for pair in zip(shares, drafts, strict=True)]
        if not any(draft.tree.num_draft_tokens for draft in drafts):
            self._step.probs = [[1.0]] * len(drafts)  # of the roots
            return list(drafts)
        start_s, pairs = self._clock(), zip(shares, drafts, strict=True)
        self._step.probs = [self._experience.path_probs(*pair) for pair in pairs]
        chosen = list(drafts) if self._is_trial else self._best_nodes(shares, self._step)
        self._step.own_s += self._clock() - start_s
        return chosen

    def _within(self, share: Share, draft: Draft) -> Draft:
        """Return a draft within the size that the plan gives it; a merged one may be larger."""
        planned = self._choices.get(share.request_id, self._choice)[1]
        size = with_free(planned, draft, self._always)
        return self._experience.cut(share, draft, size)

    def _best_nodes(self, shares: Sequence[Share], step: PlannedStep) -> list[Draft]:
        """Return the drafts with the n likeliest nodes of all of them, for the best n."""
        scouts = [draft.scout_paths() for draft in self._proposed]
        num_scouts = sum(len(kept) - 1 for kept in scouts if kept)
        num_nodes = sum(draft.tree.num_draft_tokens for draft in self._proposed) - num_scouts
        num_rows = sum(share.num_rows for share in shares) + num_scouts
        cost_ms = self._step_ms(shares, num_rows, num_nodes) + step.draft_ms
        return keep_best(self._proposed, step.probs, scouts, self._num_decoding, cost_ms)

    # -- after the step ----------------------------------------------------------------------

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Learn what was kept, and what it took."""
        if self._is_idle:
            self._rest.note(times)
            return
        cruise, is_cruising = self._cruise, self._cruise.is_on or self._cruise.is_ahead
        if is_cruising and not cruise.keeps:
            if cruise.count(verdicts, times):
                self._count_cruise()
            return
        seen = Seen(shares, self._ordered, self._proposed, scored, verdicts, times)
        if is_cruising:
            if cruise.keep(seen):
                self._count_cruise()
        elif self._step is not None:
            self._step.arm, self._step.is_plain = self._choice[0], not self._present
            self._step.trial_loss = self._trials.loss if self._is_trial else None
            self._step.is_new = self._is_new
            self._learning.learn_planned(self._step, seen, self._replaced)
        elif not seen.has_prompts and self._learn_held([seen], is_timed=self._pace.is_settled):
            self._pace.hurry()

    def _step_ms(
        self, shares: Sequence[Share], num_fixed: int, num_nodes: int
    ) -> NDArray[np.float64]:
        """Return what a step takes with so many rows in any case and 0, 1, ... nodes beside."""
        keys, count = sum(share.num_keys for share in shares), len(shares)
        # Always as large a table, so that the cost model has it at hand.
        most = max(num_fixed + num_nodes, count * (1 + self._max_nodes))
        return self._cost.step_table(most, keys, count, num_fixed)[: num_nodes + 1]

    def finish(self, text: Text) -> None:
        """Learn what drafters would have given along a text that has ended."""
        if self._retracing.learn(text) > _NEWS and self._retracing.base not in self._choice[0]:
            self._rest.tell_news()

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended; what comes next may be another text."""
        self._cruise.end()
        self._count_cruise()
        self._learning.take_counts(request_id, self._choices.get(request_id, self._choice))
        self._trials.begin_text()
        self._rest.end()
        self._pace.sooner()
        self._experience.forget(request_id)
        self._retracing.forget(request_id)
        self._choices.pop(request_id, None)
