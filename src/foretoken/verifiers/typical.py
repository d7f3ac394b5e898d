"""Typical acceptance: what is plausible enough is kept."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Exactness
from foretoken.errors import ConfigError
from foretoken.verifiers.dice import Dice, Probs
from foretoken.verifiers.probabilistic import Decision, ProbabilisticVerifier, TargetProbs


class TypicalVerifier(ProbabilisticVerifier):
    """Keeps a draft token x if p(x) > min(epsilon, delta exp(-H(p))), H the entropy of p in nats.

    Where the target is sure only its favourites pass, where it is not most tokens do. Of the
    longest paths whose tokens all pass the likeliest is taken; the final token is sampled from
    the target. **Not lossless**: which tokens come out depends on what was drafted.

    Args:
        epsilon: A token at least as likely as this always passes.
        delta: Share of the typical probability exp(-H) that is enough.

    Raises:
        ConfigError: One of them is not in (0, 1].

    Source: Medusa, arXiv:2401.10774, section 3.3.1; the defaults are those of its code.
    """

    name: ClassVar[str] = "typical"
    criterion: ClassVar[str] = "probable enough for its entropy"
    reference: ClassVar[str] = "Medusa, arXiv:2401.10774, section 3.3.1"
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    draws: ClassVar[tuple[SiblingDraw, ...]] = (
        SiblingDraw.DETERMINISTIC,
        SiblingDraw.COUPLED,
        SiblingDraw.WITHOUT_REPLACEMENT,
        SiblingDraw.IID,
    )

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if not 0 < value <= 1:
                raise ConfigError(
                    f"typical:{name} is in (0, 1]; got {value}", hint="Medusa uses 0.09 and 0.3"
                )
        self.epsilon = epsilon
        self.delta = delta

    def check(self, draft: Draft) -> None:
        """Take every draft: how it was drawn plays no part."""

    def decide(self, draft: Draft, target_probs: TargetProbs, dice: Dice) -> Decision:
        """Find the deepest node, and of those the likeliest, above which all tokens pass."""
        tree = draft.tree
        likelihood = {ROOT: 1.0}
        thresholds: dict[int, float] = {}
        for node, parent in enumerate(tree.parents[1:], start=1):
            if parent not in likelihood:
                continue
            probs = target_probs(parent)
            if parent not in thresholds:
                thresholds[parent] = self.threshold(probs)
            prob = float(probs[tree.token_ids[node]])
            if prob > thresholds[parent]:
                likelihood[node] = likelihood[parent] * prob
        best = max(likelihood, key=lambda node: (tree.depths[node], likelihood[node], -node))
        return Decision(best, dice.draw(target_probs(best)))

    def threshold(self, probs: Probs) -> float:
        """Return the probability above which a token passes."""
        values = probs.astype(np.float64)
        values = values[values > 0]
        entropy = -float((values * np.log(values)).sum())
        return min(self.epsilon, self.delta * float(np.exp(-entropy)))
