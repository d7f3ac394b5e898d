"""Speculative sampling, the original rule, for chains."""

from __future__ import annotations

from typing import ClassVar

from foretoken.core.draft import SiblingDraw
from foretoken.verifiers.recursive import RecursiveRejectionVerifier


class RejectionVerifier(RecursiveRejectionVerifier):
    """Accepts a chain token by token: x with probability min(1, p(x) / q(x)).

    The first rejected token is replaced by one from norm((p - q)+); a chain that is accepted
    whole is followed by one from p. Chains that were copied, not sampled, count as point masses:
    x is accepted with probability p(x).

    Source: Leviathan et al. 2023, arXiv:2211.17192, Algorithm 1; Chen et al. 2023,
    arXiv:2302.01318.
    """

    name: ClassVar[str] = "rejection"
    criterion: ClassVar[str] = "rejection sampling, token by token"
    reference: ClassVar[str] = "Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318"
    draws: ClassVar[tuple[SiblingDraw, ...]] = (
        SiblingDraw.IID,
        SiblingDraw.WITHOUT_REPLACEMENT,
        SiblingDraw.DETERMINISTIC,
    )
    max_width: ClassVar[int | None] = 1
    max_drafters: ClassVar[int | None] = 1  # two chains make a tree
