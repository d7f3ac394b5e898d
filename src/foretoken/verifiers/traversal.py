"""Traversal verification: block verification for trees, from the leaves up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.verifiers.block import stands
from foretoken.verifiers.dice import Dice, Probs, excess, ratio, without
from foretoken.verifiers.probabilistic import Decision, ProbabilisticVerifier, TargetProbs


@dataclass(slots=True)
class _Visit:
    """A node on the way from the root to where the traversal is.

    Args:
        node: Which.
        weight: w, the probability with which it or something below it is accepted.
        target_probs: p, what the next token would still be sampled from here.
        draft_probs: q of the next draw; p itself at a leaf, where it plays no part.
        draws: Children that wait, the next one last.
    """

    node: int
    weight: float
    target_probs: Probs
    draft_probs: Probs
    draws: list[int]


class TraversalVerifier(ProbabilisticVerifier):
    """Goes through the tree leaf by leaf; a path is judged as a whole, as in `block`.

    Walking down, w becomes min(1, w p(x) / q(x)), from 1 at the root. A leaf is accepted with its
    whole path with probability w. A leaf that falls is removed, and its parent's p becomes
    norm((w p - q)+), w becomes S / (S + 1 - w) with S the sum of (w p - q)+, and q, without
    replacement, loses the token; then comes the next child, and after the last one the parent is
    a leaf itself. The root always stands. On a chain this is `block`; it never accepts less than
    `rrs` in expectation.

    A token that was drawn twice has one subtree, and is gone through once: where it can fall,
    w p(x) < q(x), so nothing of it is left over, and the second has weight 0.

    Source: Weng et al. 2025, arXiv:2505.12398, Algorithm 2.
    """

    name: ClassVar[str] = "traversal"
    criterion: ClassVar[str] = "rejection sampling, whole paths of a tree"
    reference: ClassVar[str] = "Weng et al., arXiv:2505.12398, Algorithm 2"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (
        SiblingDraw.WITHOUT_REPLACEMENT,
        SiblingDraw.IID,
    )
    max_drafters: ClassVar[int | None] = 1

    def decide(self, draft: Draft, target_probs: TargetProbs, dice: Dice) -> Decision:
        """Visit leaves until one is accepted; the last is the root, which always is."""
        path = [_enter(draft, ROOT, 1, target_probs)]
        while True:
            visit = path[-1]
            if visit.draws:
                child = visit.draws.pop()
                token_id = draft.tree.token_ids[child]
                weight = ratio(
                    visit.weight * visit.target_probs[token_id], visit.draft_probs[token_id]
                )
                if weight > 0:
                    path.append(_enter(draft, child, weight, target_probs))
                else:  # falls for sure; below what the target never says there is no p to ask for
                    _remove(visit, draft, child)
            elif len(path) == 1 or dice.accept(visit.weight):
                return Decision(visit.node, dice.draw(visit.target_probs))
            else:
                path.pop()
                _remove(path[-1], draft, visit.node)


def _enter(draft: Draft, node: int, weight: float, target_probs: TargetProbs) -> _Visit:
    """Return the start of a visit."""
    probs = target_probs(node)
    groups = draft.draws.get(node, ())
    if not groups:
        return _Visit(node, weight, probs, probs, [])
    [group] = groups
    return _Visit(node, weight, probs, group.probs, list(reversed(group.nodes)))


def _remove(visit: _Visit, draft: Draft, child: int) -> None:
    """Account for a child that fell, with all below it."""
    rest = excess(visit.weight * visit.target_probs, visit.draft_probs)
    total = rest.sum()
    visit.weight = stands(total, visit.weight)
    if total > 0:  # else nothing is accepted here any more, or p = q and nothing can have fallen
        visit.target_probs = rest / total
    if draft.siblings is SiblingDraw.WITHOUT_REPLACEMENT:
        visit.draft_probs = without(visit.draft_probs, draft.tree.token_ids[child])
