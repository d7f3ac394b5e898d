"""Token trees: many candidate continuations that share their prefixes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

ROOT = 0
NO_PARENT = -1


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A tree of token ids; node 0 is the root, parents come before their children.

    The root carries the pending token: emitted already, its KV not yet cached. Every other node
    is a draft token. Two trees are equal when they hold the same set of sequences, whatever the
    order of their nodes (SpecInfer, arXiv:2305.09781, section 3: a tree *is* its sequences).

    Args:
        token_ids: One token id per node, N >= 1.
        parents: Index of each node's parent; -1 for the root and only there.

    Raises:
        ValueError: The lengths differ, there is no root, or a parent does not come before its
            child.
    """

    token_ids: tuple[int, ...]  # [N]
    parents: tuple[int, ...]  # [N]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.parents) or not self.token_ids:
            raise ValueError(
                f"a tree needs one parent per token and at least a root; "
                f"got {len(self.token_ids)} tokens and {len(self.parents)} parents"
            )
        if self.parents[ROOT] != NO_PARENT:
            raise ValueError(f"node 0 is the root, its parent is -1; got {self.parents[ROOT]}")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"parents come first: node {node} needs a parent in [0, {node}); got {parent}"
                )

    # -- construction ------------------------------------------------------------------------

    @classmethod
    def single(cls, root_id: int) -> TokenTree:
        """Return the tree of the root alone: an empty draft, which is plain decoding."""
        return cls((root_id,), (NO_PARENT,))

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> TokenTree:
        """Return a tree without branches; `token_ids[0]` is the root."""
        return cls(tuple(token_ids), tuple(range(-1, len(token_ids) - 1)))

    @classmethod
    def from_sequences(cls, root_id: int, sequences: Iterable[Sequence[int]]) -> TokenTree:
        """Return the smallest tree that holds every sequence below one root.

        Args:
            root_id: Token id of the root.
            sequences: Continuations after the root, the root itself not included.
        """
        token_ids, parents = [root_id], [NO_PARENT]
        child_of: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            node = ROOT
            for token_id in sequence:
                child = child_of.setdefault((node, token_id), len(token_ids))
                if child == len(token_ids):
                    token_ids.append(token_id)
                    parents.append(node)
                node = child
        return cls(tuple(token_ids), tuple(parents))

    @classmethod
    def merge(cls, trees: Sequence[TokenTree]) -> tuple[TokenTree, list[list[int]]]:
        """Return the union of prefixes of several trees with one root token.

        A node of the result has the sequence s if and only if some input has one (SpecInfer,
        definition 3.2). Siblings with equal tokens become one node.

        Args:
            trees: At least one tree; all roots carry the same token.

        Returns:
            The merged tree, and for each input a list that maps its nodes to merged nodes.

        Raises:
            ValueError: There is no tree, or the root tokens differ.
        """
        roots = {tree.token_ids[ROOT] for tree in trees}
        if len(roots) != 1:
            raise ValueError(f"trees to merge need one common root token; got {sorted(roots)}")
        token_ids, parents = [roots.pop()], [NO_PARENT]
        child_of: dict[tuple[int, int], int] = {}
        node_maps = []
        for tree in trees:
            node_map = [ROOT]
            for token_id, parent in zip(tree.token_ids[1:], tree.parents[1:], strict=True):
                merged_parent = node_map[parent]
                node = child_of.setdefault((merged_parent, token_id), len(token_ids))
                if node == len(token_ids):
                    token_ids.append(token_id)
                    parents.append(merged_parent)
                node_map.append(node)
            node_maps.append(node_map)
        return cls(tuple(token_ids), tuple(parents)), node_maps

    # -- derived -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_draft_tokens(self) -> int:
        """Number of nodes without the root."""
        return len(self.token_ids) - 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root, [N]."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node in node order, [N]."""
        children: list[list[int]] = [[] for _ in self.token_ids]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.parents == tuple(range(NO_PARENT, len(self.parents) - 1))

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to `node`, both included."""
        nodes = []
        while node != NO_PARENT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def sequence(self, node: int) -> tuple[int, ...]:
        """Return the token ids from the root to `node`, both included."""
        return tuple(self.token_ids[step] for step in self.path(node))

    @cached_property
    def sequences(self) -> frozenset[tuple[int, ...]]:
        """The sequences of all nodes: what two equal trees have in common."""
        sequences: list[tuple[int, ...]] = [(self.token_ids[ROOT],)]
        for token_id, parent in zip(self.token_ids[1:], self.parents[1:], strict=True):
            sequences.append((*sequences[parent], token_id))
        return frozenset(sequences)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenTree) and self.sequences == other.sequences

    def __hash__(self) -> int:
        return hash(self.sequences)

    def ancestor_mask(self) -> Tensor:
        """Return who may attend to whom, [N, N] bool: `mask[j, k]` iff k is j or above j."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Return the nodes below the root that spell the longest prefix of `token_ids`."""
        nodes: list[int] = []
        node = ROOT
        for token_id in token_ids:
            for child in self.children[node]:
                if self.token_ids[child] == token_id:
                    node = child
                    break
            else:
                break
            nodes.append(node)
        return nodes

    # -- pruning -----------------------------------------------------------------------------

    def keep(self, nodes: Sequence[int]) -> TokenTree:
        """Return the subtree of `nodes`: ascending, the root first, each with its parent.

        Raises:
            ValueError: The order is wrong or a node is kept without its parent.
        """
        if not nodes or nodes[0] != ROOT or any(a >= b for a, b in pairwise(nodes)):
            raise ValueError(f"nodes to keep are ascending from the root; got {list(nodes)}")
        if nodes[-1] == len(nodes) - 1:  # the first ones, as of a chain, keep their numbers
            return TokenTree(self.token_ids[: len(nodes)], self.parents[: len(nodes)])
        new_index = {node: index for index, node in enumerate(nodes)}
        missing = [node for node in nodes[1:] if self.parents[node] not in new_index]
        if missing:
            raise ValueError(f"nodes kept without their parents: {missing}")
        return TokenTree(
            tuple(self.token_ids[node] for node in nodes),
            (NO_PARENT, *(new_index[self.parents[node]] for node in nodes[1:])),
        )

    def top_nodes(self, scores: Sequence[float], max_draft_tokens: int) -> list[int]:
        """Return the root and the `max_draft_tokens` best nodes that hang together.

        Args:
            scores: One score per node; a node is never taken before its parent, so scores that
                fall along every path (cumulative probabilities) give the best connected subtree.
            max_draft_tokens: Upper bound on nodes besides the root.

        Returns:
            Node indices in ascending order, ready for `keep`.
        """
        if self.num_draft_tokens <= max_draft_tokens or self.is_chain:
            return list(range(min(len(self), max_draft_tokens + 1)))
        kept = [ROOT]
        frontier = [(-scores[child], child) for child in self.children[ROOT]]
        heapq.heapify(frontier)
        while frontier and len(kept) <= max_draft_tokens:
            _, best = heapq.heappop(frontier)
            kept.append(best)
            for child in self.children[best]:
                heapq.heappush(frontier, (-scores[child], child))
        return sorted(kept)
