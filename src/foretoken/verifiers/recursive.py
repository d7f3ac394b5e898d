"""Recursive rejection: test draws in their order, each against what the target still owes."""

from __future__ import annotations

from collections.abc import Sequence

from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.verifiers.dice import Dice, Probs, point_mass, ratio, residual, without
from foretoken.verifiers.probabilistic import NodewiseVerifier


class RecursiveRejectionVerifier(NodewiseVerifier):
    """Base of the rules that test one draw after the other, from the root down.

    At a node with target distribution p, for each draw x from q in the order of drawing: accept x
    with probability min(1, p(x) / q(x)) and go on below it; else p becomes norm((p - q)+) and, if
    draws are not put back, q becomes norm(q without x). If no draw is left, the token is sampled
    from p.

    One draw: P(accepted and = y) = min(p, q)(y), and what is sampled after a rejection is what p
    has more than that, so the sum is p(y). More draws: what they and the last sample give after a
    rejection is, by the same argument, the residual. Draws of several drafters at one node follow
    one another, each with its own q.

    Source: Leviathan et al. 2023, arXiv:2211.17192; SpecInfer, arXiv:2305.09781, Algorithm 2;
    RSD, arXiv:2402.14160.
    """

    @staticmethod
    def _test_draws(
        draft: Draft, node: int, target_probs: Probs, dice: Dice
    ) -> tuple[int | None, Probs]:
        """Return the accepted child, or None and the distribution of the final token."""
        rest = target_probs
        for group in groups_at(draft, node, target_probs):
            draft_probs = group.probs
            for child in group.nodes:
                token_id = draft.tree.token_ids[child]
                if dice.accept(ratio(rest[token_id], draft_probs[token_id])):
                    return child, rest
                rest = residual(rest, draft_probs)
                if draft.siblings is SiblingDraw.WITHOUT_REPLACEMENT:
                    draft_probs = without(draft_probs, token_id)
        return None, rest


def groups_at(draft: Draft, node: int, target_probs: Probs) -> Sequence[Draws]:
    """Return the draws at a node; a child that was not sampled is a draw from itself alone.

    With q the point mass of x, p(x) / q(x) is p(x), and (p - q)+ is p without x: exact for
    children that were chosen without chance, or by chance that the dice know nothing of.
    """
    if draft.siblings is not SiblingDraw.DETERMINISTIC:
        return draft.draws.get(node, ())
    return [
        Draws(nodes=(child,), probs=point_mass(draft.tree.token_ids[child], target_probs))
        for child in draft.tree.children[node]
    ]
