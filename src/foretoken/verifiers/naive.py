"""Naive sampling: the target samples, and descends if it can."""

from __future__ import annotations

from typing import ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.verifiers.dice import Dice, Probs, point_mass
from foretoken.verifiers.probabilistic import NodewiseVerifier
from foretoken.verifiers.walk import child_with


class NaiveVerifier(NodewiseVerifier):
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

    @staticmethod
    def _test_draws(
        draft: Draft, node: int, target_probs: Probs, dice: Dice
    ) -> tuple[int | None, Probs]:
        """Return the child that carries the sample, or None and the sample as a distribution."""
        token_id = dice.draw(target_probs)
        return child_with(draft.tree, node, token_id), point_mass(token_id, target_probs)
