"""Merged: several drafters as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.drafters.base import DraftContext, Drafter, DrafterHost, Taxonomy
from foretoken.drafters.composite import (
    CompositeDrafter,
    build_members,
    check_members,
    expected_tokens,
    member_context,
    merge_mixed,
    ways_to_mix,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedOptions:
    """Options of `merged`.

    Args:
        of: The drafters, such as `suffix+draft-model(path=DIR,max_depth=4)`.
    """

    of: tuple[ComponentSpec, ...]

    def __post_init__(self) -> None:
        check_members("merged:of", self.of)


class MergedDrafter(CompositeDrafter):
    """Drafts the union of what its members draft, cut to the nodes that they find likeliest.

    An engine merges the drafters that it is given by itself; this is for those that stand inside
    another drafter. Every member may use the whole budget. A rule that bounds the children of a
    node gets the draft of the member that promises most.

    Source: SpecInfer, arXiv:2305.09781, section 3: merged token trees.
    """

    Options: ClassVar[type[Any]] = MergedOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="several drafters (union)",
        is_trained=False,
        termination="as its drafters'",
        structure="tree",
        reference="SpecInfer, arXiv:2305.09781",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(
        {SiblingDraw.DETERMINISTIC, SiblingDraw.COUPLED}
    )

    def __init__(self, members: dict[str, Drafter]) -> None:
        super().__init__(members)
        # Of these drafters; the class says what is possible at all.
        self.draws = ways_to_mix(members.values())  # type: ignore[misc]

    @classmethod
    def create(cls, options: MergedOptions, host: DrafterHost) -> MergedDrafter:
        """Build the members.

        Raises:
            ModelError: A member's model cannot be loaded or does not fit.
        """
        return cls(build_members(options.of, host))

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context the union of the members' drafts, within its budget."""
        per_member = []
        for place, (label, drafter) in enumerate(self.members):
            drafts = drafter.propose([member_context(it, place, drafter) for it in contexts])
            name = label.partition("#")[0]
            per_member.append([draft.renamed(name, label) for draft in drafts])
        return [
            self._merge(context, drafts)
            for context, drafts in zip(contexts, zip(*per_member, strict=True), strict=True)
        ]

    @staticmethod
    def _merge(context: DraftContext, drafts: Sequence[Draft]) -> Draft:
        if context.budget.max_width is not None:
            drafts = [max(drafts, key=expected_tokens)]
        return merge_mixed(drafts, context.siblings).prune(context.budget.max_nodes)
