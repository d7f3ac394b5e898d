"""Drafts: what a drafter proposes for one request in one step."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from foretoken.core.drawing import share_draws
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree

_JOINT = "+"  # between the names of drafters that proposed the same node


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
        max_width: Children of one node, >= 1; None for any number.
        min_gain: Expected tokens below which one more level of a tree does not pay for itself;
            a drafter that grows level by level stops there, others need not care.
    """

    max_nodes: int
    max_depth: int
    max_width: int | None = None
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if self.max_nodes < 0 or self.max_depth < 0:
            raise ValueError(f"a draft budget is not negative; got {self}")
        if self.max_width is not None and self.max_width < 1:
            raise ValueError(f"a node may have at least one child; got {self}")

    @property
    def is_empty(self) -> bool:
        """Whether nothing may be drafted."""
        return self.max_nodes == 0 or self.max_depth == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """The samples that made children of one node, in the order in which they were drawn.

    A rule that compares probabilities is exact if every draw it sees is a fresh sample of
    `probs`, given all that decided that it be made. Hence the rule of the house: **how many draws
    a node gets is decided before any draw of its level is made.** It may depend on shallower
    levels, tokens included, and on `probs`; a draw that was made stands, whatever it and those
    after it turned out to be. Growing (`drafters/growth.py`), `Draft.prune` and `merge_drafts`
    keep to it, the bound on nodes included: a level may make as many draws as there are nodes
    left, equal ones counted, because how many of them are equal is known too late. What they
    leave over is for the next level.

    Why this is enough: take away the draws of the deepest level. Given all shallower ones, those
    of each of its nodes are independent samples of `probs`, in a number that is settled, with
    leaves for children. At such a node every exact rule says the next token with the target's
    probability and goes on like the target, as if the node had been a leaf; what happens
    elsewhere in the tree does not look at these draws. So the output's law is that of the tree
    without the level, and, level by level, that of the root alone: plain decoding.

    A bound that is applied to what was drawn breaks it. Two draws, room for one node: keeping the
    second if and only if it equals the first makes it no sample of `probs` any more.

    Args:
        nodes: The child that each draw made or met, [K]; i.i.d. duplicates repeat theirs.
        probs: The distribution of the first draw, [V]; without replacement, each later one
            excludes the tokens drawn before it.
    """

    nodes: tuple[int, ...]
    probs: NDArray[np.float64]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Draws)
            and self.nodes == other.nodes
            and np.array_equal(self.probs, other.probs)
        )

    def __hash__(self) -> int:
        return hash((self.nodes, self.probs.tobytes()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A token tree with what is known about how it came to be.

    Args:
        tree: Root and draft tokens.
        siblings: How siblings were drawn.
        source: Name of the drafter of each node, [N]; "first+second" if several proposed it,
            "" for the root.
        draft_logprobs: For each node, the log of the drafter's own estimate that the target
            takes this node once its parent is taken, [N]; 0 for the root.
        draws: For nodes whose children were sampled, how they came about; one entry per drafter
            that sampled there.
        scouts: Nodes whose rows a drafter wants to see whatever their chances, as Jacobi guesses
            are; a bound cuts them, and what they hang on, last.

    Raises:
        ValueError: The lengths differ, a draw made a node that is no child of its node, or a scout
            is no draft token.
    """

    tree: TokenTree
    siblings: SiblingDraw
    source: tuple[str, ...]
    draft_logprobs: tuple[float, ...]
    draws: Mapping[int, tuple[Draws, ...]] = field(default_factory=dict)
    scouts: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not len(self.tree) == len(self.source) == len(self.draft_logprobs):
            raise ValueError(
                f"a draft of {len(self.tree)} nodes needs as many sources and log-probabilities; "
                f"got {len(self.source)} and {len(self.draft_logprobs)}"
            )
        for parent, groups in self.draws.items():
            for group in groups:
                strangers = set(group.nodes).difference(self.tree.children[parent])
                if strangers:
                    raise ValueError(
                        f"draws at node {parent} make its children "
                        f"{self.tree.children[parent]}; got {sorted(strangers)}"
                    )
        if self.scouts and not 0 < min(self.scouts) <= max(self.scouts) < len(self.tree):
            raise ValueError(
                f"scouts are nodes below the root, under {len(self.tree)}; "
                f"got {sorted(self.scouts)}"
            )

    @classmethod
    @lru_cache(maxsize=4096)  # each step of plain decoding has one, and few tokens are frequent
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
        draws: Mapping[int, tuple[Draws, ...]] | None = None,
        scouts: frozenset[int] = frozenset(),
    ) -> Draft:
        """Return a draft whose nodes all come from the drafter `name`.

        Without `draft_logprobs` every node counts as certain.
        """
        return cls(
            tree=tree,
            siblings=siblings,
            source=("", *(name,) * tree.num_draft_tokens),
            draft_logprobs=draft_logprobs or (0.0,) * len(tree),
            draws=draws or {},
            scouts=scouts,
        )

    def renamed(self, name: str, label: str) -> Draft:
        """Return the draft with the drafter `name` called `label`: one of several of a kind."""
        if name == label:
            return self
        source = tuple(label if source == name else source for source in self.source)
        return replace(self, source=source)

    def path_logprobs(self) -> list[float]:
        """Return for each node the estimated log-probability that its whole path is taken, [N]."""
        totals = [0.0]
        for logprob, parent in zip(self.draft_logprobs[1:], self.tree.parents[1:], strict=True):
            totals.append(totals[parent] + logprob)
        return totals

    def prune(self, max_draft_tokens: int) -> Draft:
        """Return the draft with at most `max_draft_tokens` nodes besides the root.

        Of sampled nodes the earliest draws stay, level by level, as `Draws` explains; of others
        the scouts and then those most likely to be taken. Equal estimates count as likelier the
        shallower they are.
        """
        if self.draws:
            return self._prune_draws(max_draft_tokens)
        if self.tree.num_draft_tokens <= max_draft_tokens:
            return self
        return self._keep(self.tree.top_nodes(self._worths(), max_draft_tokens), {})

    def _worths(self) -> list[float]:
        """Return what nodes are cut by, the lowest first: estimates, those of scouts lifted."""
        worths = self.path_logprobs()
        if self.scouts:
            lift = 1.0 - min(worths)
            for node in self.scout_paths():
                worths[node] += lift
        return worths

    def keep(self, nodes: Sequence[int]) -> Draft:
        """Return the draft of some nodes: ascending, the root first, each with its parent.

        Raises:
            ValueError: They are no such nodes, or there are draws, which only `prune` may cut.
        """
        if self.draws:
            raise ValueError("a draft whose siblings were sampled is cut by prune alone")
        return self._keep(nodes, {})

    def scout_paths(self) -> frozenset[int]:
        """Return the scouts and the nodes above them, the root included; none without scouts."""
        return frozenset(above for scout in self.scouts for above in self.tree.path(scout))

    def _prune_draws(self, num_left: int) -> Draft:
        num_draws = sum(len(group.nodes) for groups in self.draws.values() for group in groups)
        # Not whether the *nodes* fit: what was drawn must not decide whether there is a cut.
        if num_draws <= num_left:
            return self
        kept, level = [ROOT], [ROOT]
        draws: dict[int, tuple[Draws, ...]] = {}
        while level:
            places = [(node, group) for node in level for group in self.draws.get(node, ())]
            shares = share_draws([len(group.nodes) for _, group in places], num_left)
            made: set[int] = set()
            for (node, group), share in zip(places, shares, strict=True):
                if share:
                    nodes = group.nodes[:share]
                    draws[node] = (*draws.get(node, ()), Draws(nodes=nodes, probs=group.probs))
                    made.update(nodes)
            level = sorted(made)
            kept += level
            num_left -= len(level)
        return self._keep(sorted(kept), draws)

    def _keep(self, nodes: Sequence[int], draws: Mapping[int, tuple[Draws, ...]]) -> Draft:
        """Return the draft of some nodes: ascending, the root first, each with its parent."""
        new_index = {node: index for index, node in enumerate(nodes)}
        return Draft(
            tree=self.tree.keep(nodes),
            siblings=self.siblings,
            source=tuple(self.source[node] for node in nodes),
            draft_logprobs=tuple(self.draft_logprobs[node] for node in nodes),
            draws={new_index[node]: _renamed(groups, new_index) for node, groups in draws.items()},
            scouts=frozenset(new_index[node] for node in self.scouts if node in new_index),
        )


def source_names(source: str) -> list[str]:
    """Return the names of the drafters that proposed a node; none for the target's own token."""
    return source.split(_JOINT) if source else []


def merge_drafts(drafts: Sequence[Draft]) -> Draft:
    """Return the union of several drafts of one request.

    Nodes are in the order of their levels, so that a bound cuts the deepest of all drafters and
    not the last drafter. A node that several propose keeps all their names and the highest
    estimate. Drafts whose siblings were sampled in one way keep their draws, several `Draws` at a
    node that several drafters reached: drafters sample independently of each other, so what
    holds for each holds for all. Siblings drawn in different ways count as deterministic, and
    their draws are dropped: the result is for rules that take any tree. Scouts stay scouts.

    Args:
        drafts: At least one draft; all trees have the same root token.
    """
    tree, node_maps = _merge_by_level([draft.tree for draft in drafts])
    names: list[dict[str, None]] = [{} for _ in range(len(tree))]
    logprobs = [0.0] * len(tree)
    draws: dict[int, tuple[Draws, ...]] = {}
    scouts: set[int] = set()
    for draft, node_map in zip(drafts, node_maps, strict=True):
        new_index = dict(enumerate(node_map))
        for node, merged in enumerate(node_map[1:], start=1):
            logprob = draft.draft_logprobs[node]
            logprobs[merged] = max(logprobs[merged], logprob) if names[merged] else logprob
            names[merged].update(dict.fromkeys(source_names(draft.source[node])))
        for node, groups in draft.draws.items():
            merged = node_map[node]
            draws[merged] = draws.get(merged, ()) + _renamed(groups, new_index)
        scouts.update(node_map[node] for node in draft.scouts)
    ways = {draft.siblings for draft in drafts if draft.tree.num_draft_tokens}
    return Draft(
        tree=tree,
        siblings=next(iter(ways)) if len(ways) == 1 else SiblingDraw.DETERMINISTIC,
        source=tuple(_JOINT.join(found) for found in names),
        draft_logprobs=tuple(logprobs),
        draws=draws if len(ways) == 1 else {},
        scouts=frozenset(scouts),
    )


def _merge_by_level(trees: Sequence[TokenTree]) -> tuple[TokenTree, list[list[int]]]:
    """Return what `TokenTree.merge` does, with the nodes in the order of their depths."""
    tree, node_maps = TokenTree.merge(trees)
    order = sorted(range(len(tree)), key=tree.depths.__getitem__)
    new_index = {node: index for index, node in enumerate(order)}
    by_level = TokenTree(
        tuple(tree.token_ids[node] for node in order),
        (NO_PARENT, *(new_index[tree.parents[node]] for node in order[1:])),
    )
    return by_level, [[new_index[node] for node in node_map] for node_map in node_maps]


def _renamed(groups: Sequence[Draws], new_index: Mapping[int, int]) -> tuple[Draws, ...]:
    return tuple(
        Draws(nodes=tuple(new_index[node] for node in group.nodes), probs=group.probs)
        for group in groups
    )
