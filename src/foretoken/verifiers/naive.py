"""Naive sampling: the target samples, and descends if it can."""

from __future__ import annotations

from typing import ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.verifiers.dice import Dice
from foretoken.verifiers.probabilistic import Decision, ProbabilisticVerifier, TargetProbs
from foretoken.verifiers.walk import follow


class NaiveVerifier(ProbabilisticVerifier):
    """Samples from the target at each node; descends while a child carries the token.

    What is emitted are the target's own samples, whatever was drafted and however. Unlike
    `coupled` its randomness has nothing to do with the drafters', so it accepts less. The best
    draft for it holds the likeliest tokens, not samples.

    Source: SpecInfer, arXiv:2305.09781, section 4.3 (naive sampling, the baseline there).
    """

    name: ClassVar[str] = "naive"
    criterion: ClassVar[str] = "a fresh sample of the target"
    reference: ClassVar[str] = "SpecInfer, arXiv:2305.09781, section 4.3"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (
        SiblingDraw.DETERMINISTIC,
        SiblingDraw.WITHOUT_REPLACEMENT,
        SiblingDraw.IID,
        SiblingDraw.COUPLED,
    )

    def check(self, draft: Draft) -> None:
        """Take every draft: what it holds has no influence on what is sampled."""

    def decide(self, draft: Draft, target_probs: TargetProbs, dice: Dice) -> Decision:
        """Descend as far as the samples go."""
        verdict = follow(draft.tree, lambda node, _: dice.draw(target_probs(node)))
        return Decision((ROOT, *verdict.path)[-1], verdict.final_id)
