"""No drafter: every step is plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.verdict import Verdict
from foretoken.drafters.base import (
    DraftContext,
    DrafterHost,
    DrafterNeeds,
    RequestView,
    Taxonomy,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDrafterOptions:
    """`none` has no options."""


class NoDrafter:
    """Proposes nothing, so that the target decodes one token per step."""

    Options: ClassVar[type[Any]] = NoDrafterOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="none",
        is_trained=False,
        termination="static",
        structure="chain",
        reference="autoregressive decoding",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(SiblingDraw)

    def __init__(self) -> None:
        self.needs = DrafterNeeds()

    @classmethod
    def create(cls, options: NoDrafterOptions, host: DrafterHost) -> NoDrafter:
        """Build it; there is nothing to configure."""
        return cls()

    def start(self, request: RequestView) -> None:
        """Keep nothing."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return empty drafts."""
        return [Draft.empty(context.token_ids[-1]) for context in contexts]

    def commit(self, request_id: str, verdict: Verdict) -> None:
        """Keep nothing."""

    def stop(self, request_id: str) -> None:
        """Forget nothing."""
