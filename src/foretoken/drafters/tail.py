"""Tail: what one drafter drafted is continued by others that retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.core.tree import NO_PARENT, TokenTree
from foretoken.drafters.base import DraftContext, Drafter, DrafterHost, Follower, Taxonomy
from foretoken.drafters.composite import (
    CompositeDrafter,
    build_members,
    check_capable,
    check_members,
    expected_tokens,
    member_context,
    merge_mixed,
    ways_to_mix,
)
from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TailOptions:
    """Options of `tail`.

    Args:
        of: The drafter whose draft is continued, such as `draft-model(path=DIR,max_depth=3)`.
        then: Those that continue it, such as `suffix` or `suffix+prompt-lookup`.
        max_leaves: Most leaves that are continued, the likeliest first.
    """

    of: tuple[ComponentSpec, ...]
    then: tuple[ComponentSpec, ...]
    max_leaves: int = 2

    def __post_init__(self) -> None:
        if len(self.of) != 1:
            raise ConfigError(
                f"tail:of is one drafter; got {len(self.of)}",
                hint="for the union of several write tail:of=merged(of=first+second)",
            )
        check_members("tail:of", self.of)
        check_members("tail:then", self.then)
        check_capable("tail:then", self.then, Follower, "continue the drafts of others")
        if self.max_leaves < 1:
            raise ConfigError(
                f"tail:max_leaves is at least 1; got {self.max_leaves}", hint="change max_leaves"
            )


class TailDrafter(CompositeDrafter):
    """Lets retrieval go on where a dearer drafter stops, at the likeliest leaves of its draft.

    What is likely to be taken is decided over the whole path: the estimates of a tail are
    multiplied by that of its leaf, and the likeliest nodes of all stay. Where the first drafter
    has nothing to say, the others draft from the pending token.

    Source: the last stage of cascade speculative drafting, arXiv:2312.11462.
    """

    Options: ClassVar[type[Any]] = TailOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="several drafters (chained)",
        is_trained=False,
        termination="as its drafters'",
        structure="tree",
        reference="CS-Drafting, arXiv:2312.11462",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(
        {SiblingDraw.DETERMINISTIC, SiblingDraw.COUPLED}
    )

    def __init__(self, members: dict[str, Drafter], max_leaves: int) -> None:
        """Take the drafter to continue as the first member, those that continue as the others."""
        super().__init__(members)
        # Of these drafters; the class says what is possible at all.
        self.draws = ways_to_mix(members.values())  # type: ignore[misc]
        (_, self._first), *followers = self.members
        self._followers = [(label, it) for label, it in followers if isinstance(it, Follower)]
        self._max_leaves = max_leaves

    @classmethod
    def create(cls, options: TailOptions, host: DrafterHost) -> TailDrafter:
        """Build all of them.

        Raises:
            ModelError: A model cannot be loaded or does not fit.
        """
        return cls(build_members((*options.of, *options.then), host), options.max_leaves)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context the first drafter's draft with tails at its best leaves."""
        drafts = self._first.propose([member_context(it, 0, self._first) for it in contexts])
        return [
            self._continue(context, draft) for context, draft in zip(contexts, drafts, strict=True)
        ]

    def _continue(self, context: DraftContext, draft: Draft) -> Draft:
        tree, totals = draft.tree, draft.path_logprobs()
        leaves = [node for node, children in enumerate(tree.children) if not children]
        leaves = sorted(leaves, key=totals.__getitem__, reverse=True)[: self._max_leaves]
        grown = draft
        for leaf in leaves:
            room = context.budget.max_depth - tree.depths[leaf]
            below = replace(context, budget=replace(context.budget, max_depth=room))
            grown = _graft(grown, leaf, self._tail(below, tree.sequence(leaf)[1:]))
        return replace(grown, siblings=context.siblings).prune(context.budget.max_nodes)

    def _tail(self, context: DraftContext, path: Sequence[int]) -> Draft:
        tails = [
            follower.follow(context, path).renamed(label.partition("#")[0], label)
            for label, follower in self._followers
        ]
        if context.budget.max_width is not None:
            return max(tails, key=expected_tokens)
        return merge_mixed(tails, context.siblings)


def _graft(draft: Draft, leaf: int, tail: Draft) -> Draft:
    """Return a draft with another one in place of a leaf; both have the same token there."""
    offset = len(draft.tree) - 1
    parents = [parent + offset if parent else leaf for parent in tail.tree.parents[1:]]
    return replace(
        draft,
        tree=TokenTree(
            (*draft.tree.token_ids, *tail.tree.token_ids[1:]),
            (NO_PARENT, *draft.tree.parents[1:], *parents),
        ),
        source=(*draft.source, *tail.source[1:]),
        draft_logprobs=(*draft.draft_logprobs, *tail.draft_logprobs[1:]),
    )
