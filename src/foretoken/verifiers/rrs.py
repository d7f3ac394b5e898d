"""Recursive rejection sampling without replacement."""

from __future__ import annotations

from typing import ClassVar

from foretoken.core.draft import SiblingDraw
from foretoken.verifiers.recursive import RecursiveRejectionVerifier


class RecursiveRejectionWithoutReplacementVerifier(RecursiveRejectionVerifier):
    """Tests draws that exclude each other, each against what q was when it was drawn.

    x is accepted with probability min(1, p(x) / q(x)); after a rejection p becomes
    norm((p - q)+) and q becomes norm(q without x). No draw is wasted on a token that was
    rejected before, so it accepts more than `mss` with as many draws.

    Source: RSD, arXiv:2402.14160; Sequoia, arXiv:2402.12374.
    """

    name: ClassVar[str] = "rrs"
    criterion: ClassVar[str] = "rejection sampling, sibling by sibling"
    reference: ClassVar[str] = "RSD, arXiv:2402.14160; Sequoia, arXiv:2402.12374"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (SiblingDraw.WITHOUT_REPLACEMENT,)
