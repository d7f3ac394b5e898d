"""Drafts: what a drafter proposes for one request in one step."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from foretoken.core.tree import TokenTree


class SiblingDraw(enum.Enum):
    """How the children of a node were chosen; a verifier may accept only some of these.

    Multi-step speculative sampling, for example, over-accepts when siblings were not sampled.
    """

    DETERMINISTIC = "deterministic"  # chosen by rank or by copying, no randomness
    COUPLED = "coupled"  # ranked by the race that the target will run at that position
    IID = "iid"  # independent samples, duplicates possible
    WITHOUT_REPLACEMENT = "without_replacement"  # samples, each excluding those before


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftBudget:
    """Upper bounds for one draft; an empty draft always respects them.

    Args:
        max_nodes: Draft tokens, the root not counted; >= 0.
        max_depth: Draft tokens on one path, the root not counted; >= 0.
    """

    max_nodes: int
    max_depth: int

    def __post_init__(self) -> None:
        if self.max_nodes < 0 or self.max_depth < 0:
            raise ValueError(f"a draft budget is not negative; got {self}")

    @property
    def is_empty(self) -> bool:
        """Whether nothing may be drafted."""
        return self.max_nodes == 0 or self.max_depth == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A token tree with what is known about how it came to be.

    Args:
        tree: Root and draft tokens.
        siblings: How siblings were drawn.
        source: Name of the drafter of each node, [N]; the root's entry is "".
        draft_logprobs: For each node, the log of the drafter's own estimate that the target
            takes this node once its parent is taken, [N]; 0 for the root.
    """

    tree: TokenTree
    siblings: SiblingDraw
    source: tuple[str, ...]
    draft_logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.tree) == len(self.source) == len(self.draft_logprobs):
            raise ValueError(
                f"a draft of {len(self.tree)} nodes needs as many sources and log-probabilities; "
                f"got {len(self.source)} and {len(self.draft_logprobs)}"
            )

    @classmethod
    def empty(cls, root_id: int) -> Draft:
        """Return the draft without draft tokens: plain decoding."""
        return cls(
            tree=TokenTree.single(root_id),
            siblings=SiblingDraw.DETERMINISTIC,
            source=("",),
            draft_logprobs=(0.0,),
        )

    @classmethod
    def from_drafter(
        cls,
        name: str,
        tree: TokenTree,
        *,
        siblings: SiblingDraw = SiblingDraw.DETERMINISTIC,
        draft_logprobs: tuple[float, ...] | None = None,
    ) -> Draft:
        """Return a draft whose nodes all come from the drafter `name`.

        Without `draft_logprobs` every node counts as certain.
        """
        return cls(
            tree=tree,
            siblings=siblings,
            source=("", *(name,) * tree.num_draft_tokens),
            draft_logprobs=draft_logprobs or (0.0,) * len(tree),
        )

    def path_logprobs(self) -> list[float]:
        """Return for each node the estimated log-probability that its whole path is taken, [N]."""
        totals = [0.0]
        for logprob, parent in zip(self.draft_logprobs[1:], self.tree.parents[1:], strict=True):
            totals.append(totals[parent] + logprob)
        return totals

    def keep(self, nodes: list[int]) -> Draft:
        """Return the draft of some nodes: ascending, the root first, each with its parent."""
        return Draft(
            tree=self.tree.keep(nodes),
            siblings=self.siblings,
            source=tuple(self.source[node] for node in nodes),
            draft_logprobs=tuple(self.draft_logprobs[node] for node in nodes),
        )

    def prune(self, max_draft_tokens: int) -> Draft:
        """Return the `max_draft_tokens` nodes most likely to be taken, with the root."""
        if self.tree.num_draft_tokens <= max_draft_tokens:
            return self
        return self.keep(self.tree.top_nodes(self.path_logprobs(), max_draft_tokens))


def merge_drafts(drafts: list[Draft]) -> Draft:
    """Return the union of several drafts of one request.

    A node that several drafters propose keeps the name of the first and the highest estimate.
    Siblings drawn in different ways count as deterministic, which every lossless verifier that
    does not look at draft probabilities accepts.

    Args:
        drafts: At least one draft; all trees have the same root token.
    """
    tree, node_maps = TokenTree.merge([draft.tree for draft in drafts])
    source = [""] * len(tree)
    logprobs = [0.0] * len(tree)
    for draft, node_map in zip(drafts, node_maps, strict=True):
        for node, merged in enumerate(node_map[1:], start=1):
            known = source[merged] != ""
            logprob = draft.draft_logprobs[node]
            logprobs[merged] = max(logprobs[merged], logprob) if known else logprob
            source[merged] = source[merged] or draft.source[node]
    draws = {draft.siblings for draft in drafts if draft.tree.num_draft_tokens}
    return Draft(
        tree=tree,
        siblings=draws.pop() if len(draws) == 1 else SiblingDraw.DETERMINISTIC,
        source=tuple(source),
        draft_logprobs=tuple(logprobs),
    )
