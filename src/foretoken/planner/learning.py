"""What steps teach a planner: what came of drafts, and what they took."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from foretoken.planner.base import Order
from foretoken.planner.choices import Choice, Seen, ids_of
from foretoken.planner.cost import CostModel
from foretoken.planner.drafting import Drafting
from foretoken.planner.experience import Experience
from foretoken.planner.gains import Arm
from foretoken.planner.holding import Holding


class Learning:
    """Hands what a step showed to those who estimate from it.

    Args:
        cost: Of the target's passes.
        arms: Ways to draft.
        labels: Drafters to choose from.
        always: Drafters that draft in every step.
        max_nodes: Most draft tokens per request and step.
        first_guess: For each of the labels, how often its first guess is taken, as far as known.

    Attributes:
        experience: Of drafts.
        drafting: What it takes.
        holding: What comes of the plan that holds.
    """

    def __init__(
        self,
        cost: CostModel,
        arms: Sequence[Arm],
        labels: Sequence[str],
        always: Sequence[str],
        max_nodes: int,
        first_guess: Mapping[str, float],
    ) -> None:
        self._always = frozenset(always)
        self.experience = Experience(arms, (*labels, *always), max_nodes, first_guess)
        self.drafting = Drafting(cost)
        self.holding = Holding(always)

    def take_counts(self, request_id: str, choice: Choice) -> None:
        """Learn what was counted of a request while a plan held that was this for it."""
        arm, size = choice
        counts = self.holding.take(request_id)
        if size and counts is not None:
            self.experience.learn_counts(request_id, arm, size, counts)

    def learn_drafting(
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
