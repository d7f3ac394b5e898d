"""Block verification: a chain is judged as a whole."""

from __future__ import annotations

from typing import ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.verifiers.dice import Dice, Probs, excess, ratio
from foretoken.verifiers.probabilistic import Decision, ProbabilisticVerifier, TargetProbs
from foretoken.verifiers.recursive import groups_at


class BlockVerifier(ProbabilisticVerifier):
    """Accepts the longest prefix of a chain that stands; a weak token can be made up for.

    Walking down, w becomes min(1, w p(x) / q(x)), from 1 at the root. Each inner node stands with
    probability S / (S + 1 - w), where S sums (w p - q)+ over the next token, and the last one
    with probability w. The deepest node that stands is taken, whether or not those above it did;
    the final token is from norm((w p - q)+) there, or from p after the last. Never accepts less
    than `rejection` in expectation, and the same where the first token decides. Copied chains
    count as point masses.

    Source: Sun et al. 2024, arXiv:2403.10444, Algorithm 2.
    """

    name: ClassVar[str] = "block"
    criterion: ClassVar[str] = "rejection sampling, whole chains"
    reference: ClassVar[str] = "Sun et al., arXiv:2403.10444, Algorithm 2"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (
        SiblingDraw.IID,
        SiblingDraw.WITHOUT_REPLACEMENT,
        SiblingDraw.DETERMINISTIC,
    )
    max_width: ClassVar[int | None] = 1
    max_drafters: ClassVar[int | None] = 1  # two chains make a tree

    def decide(self, draft: Draft, target_probs: TargetProbs, dice: Dice) -> Decision:
        """Look from the end of the chain for the first node that stands."""
        node = ROOT
        weight: float = 1
        inner: list[tuple[int, float, Probs]] = []  # (node, weight, q below it)
        # What the target never says has weight 0 and is the end: below it there is no p to ask for.
        while draft.tree.children[node] and weight > 0:
            probs = target_probs(node)
            [group] = groups_at(draft, node, probs)
            inner.append((node, weight, group.probs))
            [node] = group.nodes
            token_id = draft.tree.token_ids[node]
            weight = ratio(weight * probs[token_id], group.probs[token_id])
        # The nodes' coins are independent, so the deepest success is the first one from the end.
        if not inner or dice.accept(weight):
            return Decision(node, dice.draw(target_probs(node)))
        rest = target_probs(ROOT)
        for node, weight, draft_probs in reversed(inner):
            probs = target_probs(node)
            rest = excess(weight * probs, draft_probs)
            total = rest.sum()
            if not total > 0:
                rest = probs  # nothing is left over where nothing can fall but by rounding
            if dice.accept(stands(total, weight)):
                break
        return Decision(node, dice.draw(rest))  # the root always stands: its weight is 1


def stands(total: float, weight: float) -> float:
    """Return S / (S + 1 - w), the probability that a node stands once all below it fell.

    0 / 0 is 1: w = 1 and nothing is left over, so nothing below can fall but by rounding.

    Args:
        total: S, the sum of (w p - q)+.
        weight: w in [0, 1].
    """
    whole = total + (1 - weight)
    return total / whole if whole > 0 else 1
