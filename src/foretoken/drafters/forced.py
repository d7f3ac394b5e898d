"""Forced tokens: draft what the request's grammar leaves no choice about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.params import SamplingParams
from foretoken.core.tree import TokenTree
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Taxonomy,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedOptions:
    """`forced` has no options."""


class ForcedDrafter(Drafter):
    """Drafts the tokens that a grammar forces: names of properties, brackets, fixed texts.

    They cost no model, and as the target may choose nothing else, all are accepted. A request
    without a grammar, or at a place where it leaves a choice, gets an empty draft.

    Source: fast-forward tokens of guidance and llguidance.
    """

    Options: ClassVar[type[Any]] = ForcedOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="grammar of the request",
        is_trained=False,
        termination="adaptive",
        structure="chain",
        reference="fast-forward tokens of guidance",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self) -> None:
        self.needs = DrafterNeeds()

    @classmethod
    def create(cls, options: ForcedOptions, host: DrafterHost) -> ForcedDrafter:
        """Build it; the grammar comes with each request."""
        return cls()

    def serves(self, params: SamplingParams, *, has_reference: bool) -> bool:
        """Return whether the request has a grammar."""
        return params.has_grammar

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context one chain of forced tokens, as long as its budget allows."""
        return [self._propose_one(context) for context in contexts]

    @staticmethod
    def _propose_one(context: DraftContext) -> Draft:
        grammar, token_ids = context.sampler.grammar, context.token_ids
        length = min(context.budget.max_depth, context.budget.max_nodes)
        forced_ids = grammar.forced(token_ids)[:length] if grammar is not None and length else []
        tree = TokenTree.chain((token_ids[-1], *forced_ids))
        return Draft.from_drafter("forced", tree)
