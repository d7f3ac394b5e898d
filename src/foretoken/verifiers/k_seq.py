"""k-sequential selection: SpecTr's rule for several independent draws."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.verifiers.dice import Dice, Probs, excess, ratio
from foretoken.verifiers.probabilistic import NodewiseVerifier

NUM_BISECTIONS = 20  # rho is then at most a millionth of its range larger than it need be


class KSeqVerifier(NodewiseVerifier):
    """Accepts each of k independent draws by one test, the same for all of them.

    With b = sum of min(q, p / rho), the probability that one draw passes, each draw x passes with
    probability min(1, p(x) / (rho q(x))). The number of draws that get tested is on average
    t = 1 + (1 - b) + ... + (1 - b)**(k - 1), so some draw passes with probability t b, and token
    x is then accepted with probability t min(q, p / rho)(x). What p has more than that is the
    distribution of the final token if none passes. rho in [1, k] is the least number that asks no
    more of any token than p has: t <= rho.

    Source: SpecTr, arXiv:2310.15141, Algorithm 3; within 1 - 1/e of the best rule for k draws.
    """

    name: ClassVar[str] = "k-seq"
    criterion: ClassVar[str] = "rejection sampling, one test for all siblings"
    reference: ClassVar[str] = "SpecTr, arXiv:2310.15141, Algorithm 3"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (SiblingDraw.IID,)
    max_drafters: ClassVar[int | None] = 1

    @staticmethod
    def _test_draws(
        draft: Draft, node: int, target_probs: Probs, dice: Dice
    ) -> tuple[int | None, Probs]:
        """Return the accepted child, or None and the distribution of the final token."""
        for group in draft.draws.get(node, ()):  # one at most
            draft_probs, num_draws = group.probs, len(group.nodes)
            rho = find_division(target_probs, draft_probs, num_draws)
            for child in group.nodes:
                token_id = draft.tree.token_ids[child]
                if dice.accept(ratio(target_probs[token_id], rho * draft_probs[token_id])):
                    return child, target_probs
            return None, _rest(target_probs, draft_probs, rho, num_draws)
        return None, target_probs


def find_division(target_probs: Probs, draft_probs: Probs, num_draws: int) -> float:
    """Return the least rho in [1, k] with t <= rho, rounded up; see `KSeqVerifier`.

    t falls as b rises, and the larger rho, the smaller b; but rho b does not fall, and at rho = k
    nothing is asked too much. Every rho with t <= rho is exact, so the upper end of the bisection
    is, after any number of halvings; a larger one only accepts less.

    Args:
        target_probs: p, [V].
        draft_probs: q, [V].
        num_draws: k >= 1.
    """
    one = target_probs[0] * 0 + 1  # a number of their own kind: halvings of fractions stay exact
    low: float = one
    high: float = num_draws * one
    # For every rho in the range tokens with p <= q give p / rho and those with p >= k q give q;
    # only those between are looked at again and again. (Tokens that are both have p = q = 0, or
    # there is one draw, and rho is 1 whatever passes.)
    is_low, is_high = target_probs <= draft_probs, target_probs >= num_draws * draft_probs
    sum_low, sum_high = target_probs[is_low].sum(), draft_probs[is_high].sum()
    is_between = ~(is_low | is_high)
    between, draft_between = target_probs[is_between], draft_probs[is_between]

    def is_enough(rho: float) -> bool:
        passes = sum_low / rho + sum_high + np.minimum(draft_between, between / rho).sum()
        return bool(_num_tested(passes, num_draws) <= rho)

    if is_enough(low):
        return low
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _num_tested(passes: float, num_draws: int) -> float:
    """Return t, the average number of draws that get tested; k if none ever passes.

    Args:
        passes: b, the probability that one draw passes.
        num_draws: k.
    """
    tested: float = sum((1 - passes) ** place for place in range(num_draws))
    return tested


def _rest(target_probs: Probs, draft_probs: Probs, rho: float, num_draws: int) -> Probs:
    """Return the distribution of the final token after every draw failed, not normalised."""
    overlap = np.minimum(draft_probs, target_probs / rho)
    rest = excess(target_probs, overlap * _num_tested(overlap.sum(), num_draws))
    # Nothing is left if some draw always passes, up to rounding.
    return rest if rest.sum() > 0 else target_probs
