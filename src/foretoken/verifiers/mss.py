"""Multi-step speculative sampling: SpecInfer's rule for trees."""

from __future__ import annotations

from typing import ClassVar

from foretoken.core.draft import SiblingDraw
from foretoken.verifiers.recursive import RecursiveRejectionVerifier


class MultiStepVerifier(RecursiveRejectionVerifier):
    """Tests independent draws one after the other, each against the residual of those before.

    x is accepted with probability min(1, p(x) / q(x)); after a rejection p becomes
    norm((p - q)+), and q stays. A token that was drawn twice is tested twice. Siblings that were
    chosen by rank are refused: tested as if they were samples, likely tokens would be accepted
    more often than the target says them.

    Source: SpecInfer, arXiv:2305.09781, Algorithm 2 (VerifyStochastic), Theorem 4.2.
    """

    name: ClassVar[str] = "mss"
    criterion: ClassVar[str] = "rejection sampling, sibling by sibling"
    reference: ClassVar[str] = "SpecInfer, arXiv:2305.09781, Algorithm 2"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (SiblingDraw.IID,)
