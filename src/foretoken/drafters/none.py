"""No drafter: every step is plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Taxonomy,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDrafterOptions:
    """`none` has no options."""


class NoDrafter(Drafter):
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

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return empty drafts."""
        return [Draft.empty(context.token_ids[-1]) for context in contexts]
