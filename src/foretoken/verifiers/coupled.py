"""Coupled verification: the target chooses; the draft only saved the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import Exactness, Verdict
from foretoken.verifiers.base import NextToken, TargetRows
from foretoken.verifiers.walk import choose_next, follow_target


class CoupledVerifier:
    """Lets the target choose its own token at each node; descends while a child carries it.

    The target's choice uses the keyed noise of its position, so the emitted tokens are by
    construction those of plain decoding with the same seed, whatever was drafted and however.
    With temperature 0 this is greedy verification (SpecInfer, arXiv:2305.09781, VerifyGreedy).
    """

    criterion: ClassVar[str] = "the target's own choice, sampled or greedy"
    reference: ClassVar[str] = "SpecInfer, arXiv:2305.09781, VerifyGreedy; here for sampling too"
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    draws: ClassVar[tuple[SiblingDraw, ...]] = (
        SiblingDraw.COUPLED,
        SiblingDraw.DETERMINISTIC,
        SiblingDraw.WITHOUT_REPLACEMENT,
        SiblingDraw.IID,
    )
    max_width: ClassVar[int | None] = None
    max_drafters: ClassVar[int | None] = None

    def verify(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> Verdict:
        """Walk down from the root as far as the target's own choices go."""
        return follow_target(draft.tree, rows, sampler, token_ids)

    def decide_next(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> NextToken:
        """Take the target's own choice, and the child that carries it."""
        return choose_next(draft.tree, rows, sampler, token_ids)
