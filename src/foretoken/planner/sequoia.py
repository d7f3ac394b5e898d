"""Sequoia's dynamic program: the best tree of fixed shape for measured acceptances.

A node's b-th child is the accepted one with probability a[b], whatever the node: a tree is then
worth the sum over its nodes of the products of a along their paths, the root counting 1.

Source: Chen et al., "Sequoia", arXiv:2402.12374, section 3 and its `tree_search.py`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit
from foretoken.core.tree import NO_PARENT
from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticTree:
    """The shape of a draft, before its tokens are known.

    Args:
        parents: Index of each node's parent, as in `TokenTree`: -1 for the root, level by level,
            siblings by rank, [N].
        expected_tokens: Tokens per step that it promises, the target's own included.
    """

    parents: tuple[int, ...]
    expected_tokens: float

    @property
    def depth(self) -> int:
        """Longest path, the root not counted: the draft passes that the tree takes."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return max(depths)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeChoice:
    """The tree that a machine's times favour.

    Args:
        tree: Its shape; the root alone is plain decoding.
        step_ms: Predicted time of a step.
    """

    tree: StaticTree
    step_ms: float

    @property
    def ms_per_token(self) -> float:
        """What is minimised."""
        return self.step_ms / self.tree.expected_tokens


class TreeTable:
    """The program's table, filled once for all sizes up to a bound.

    T[m, l, b] is the value of the best tree of m nodes whose root has b children and paths of at
    most l below it:

        T[1, l, 0] = 1
        T[m, l, b] = max_y T[y, l, b - 1] + a[b] * max_b' T[m - y, l - 1, b']

    Args:
        acceptances: a: probability that the first, second, ... child is the accepted one, given
            that its parent is; they sum to at most 1. [B]
        max_nodes: Most nodes, the root counted.
        max_depth: Longest path, the root not counted.

    Raises:
        ConfigError: `acceptances` is no part of a distribution, or a bound is too small.
    """

    def __init__(self, acceptances: Sequence[float], *, max_nodes: int, max_depth: int) -> None:
        if max_nodes < 1 or max_depth < 0:
            raise ConfigError(
                f"a tree has at least its root; got max_nodes={max_nodes}, max_depth={max_depth}",
                hint="give max_nodes >= 1 and max_depth >= 0",
            )
        self.max_nodes, self.max_depth = max_nodes, max_depth
        self._acceptances = np.array([0.0, *_checked(acceptances)])
        self._values, self._splits = _fill(self._acceptances, max_nodes, max_depth)

    def best(self, num_nodes: int, depth: int) -> StaticTree | None:
        """Return the best tree of exactly `num_nodes` nodes and depth at most `depth`.

        Equal ones go to the narrower root. None if there is no such tree: the depth and the
        ranks hold fewer nodes.
        """
        values = self._values[num_nodes, depth]
        if not values.max() > -math.inf:
            return None
        expected = float(values.max())
        return StaticTree(parents=self._parents(num_nodes, depth), expected_tokens=expected)

    def _parents(self, num_nodes: int, depth: int) -> tuple[int, ...]:
        """Return the parents, level by level: each entry of a level is a subtree to unfold."""
        parents, level = [NO_PARENT], [(num_nodes, depth)]
        first = 0  # index of the level's first node
        while level:
            below = []
            for index, (size, limit) in enumerate(level, start=first):
                sizes = self._child_sizes(size, limit)
                parents += [index] * len(sizes)
                below += [(child_size, limit - 1) for child_size in sizes]
            first += len(level)
            level = below
        return tuple(parents)

    def _child_sizes(self, num_nodes: int, depth: int) -> list[int]:
        """Return the nodes of the subtree of each child of the best tree's root."""
        sizes = []
        num_left = num_nodes
        for rank in range(int(self._values[num_nodes, depth].argmax()), 0, -1):
            kept = int(self._splits[num_left, depth, rank])
            sizes.append(num_left - kept)
            num_left = kept
        return sizes[::-1]


def best_tree(acceptances: Sequence[float], *, num_nodes: int, max_depth: int) -> StaticTree:
    """Return the best tree of at most `num_nodes` nodes, the root counted.

    More nodes are never worse, so it has all of them, unless depth and ranks hold fewer.

    Raises:
        ConfigError: `acceptances` is no part of a distribution, or a bound is too small.
    """
    table = TreeTable(acceptances, max_nodes=num_nodes, max_depth=max_depth)
    while (tree := table.best(num_nodes, max_depth)) is None:
        num_nodes -= 1
    return tree


def greedy_tree(acceptances: Sequence[float], *, num_nodes: int, max_depth: int) -> StaticTree:
    """Return the tree that takes, one by one, the likeliest node that hangs on those before it.

    Where a falls with the rank, it is worth as much as the best one: its nodes are then simply
    the likeliest. Elsewhere it can miss a good child behind a bad one.
    """
    ranked = _checked(acceptances)
    paths: list[tuple[int, ...]] = [()]  # ranks along the path of each node taken
    total = 1.0
    frontier: list[tuple[float, tuple[int, ...]]] = []
    if ranked and max_depth:
        frontier.append((-ranked[0], (0,)))
    while frontier and len(paths) < num_nodes:
        negative, path = heapq.heappop(frontier)
        paths.append(path)
        total -= negative
        rank = path[-1]
        if rank + 1 < len(ranked):
            above = math.prod(ranked[step] for step in path[:-1])
            heapq.heappush(frontier, (-above * ranked[rank + 1], (*path[:-1], rank + 1)))
        if len(path) < max_depth:
            heapq.heappush(frontier, (negative * ranked[0], (*path, 0)))
    paths.sort(key=lambda path: (len(path), path))
    index_of = {path: index for index, path in enumerate(paths)}
    parents = [index_of[path[:-1]] for path in paths[1:]]
    return StaticTree(parents=(NO_PARENT, *parents), expected_tokens=total)


def choose_tree(
    acceptances: Sequence[float],
    *,
    draft_ms: float,
    verify_ms: Callable[[int], float],
    max_nodes: int,
    max_depth: int,
    overhead_ms: float = 0.0,
) -> TreeChoice:
    """Return the tree that minimises (d * t_draft + t_target(m)) / T over nodes m and depth d.

    The root alone is among them, so that plain decoding wins where it is faster.

    Args:
        acceptances: As for `TreeTable`.
        draft_ms: One draft pass, which makes a level of the tree.
        verify_ms: Measured time of a target pass by its rows; `verify_ms(1)` is a plain step.
        max_nodes: Most nodes, the root counted.
        max_depth: Longest path.
        overhead_ms: Everything else that only a speculating step does.
    """
    table = TreeTable(acceptances, max_nodes=max_nodes, max_depth=max_depth)
    plain = StaticTree(parents=(NO_PARENT,), expected_tokens=1.0)
    best = TreeChoice(tree=plain, step_ms=verify_ms(1))
    for num_nodes in range(2, max_nodes + 1):
        for depth in range(1, min(max_depth, num_nodes - 1) + 1):
            tree = table.best(num_nodes, depth)
            if tree is None:
                continue
            step_ms = depth * draft_ms + verify_ms(num_nodes) + overhead_ms
            if step_ms / tree.expected_tokens < best.ms_per_token:
                best = TreeChoice(tree=tree, step_ms=step_ms)
    return best


def _checked(acceptances: Sequence[float]) -> list[float]:
    values = [float(value) for value in acceptances]
    # Estimates are counts over counts: their sum may pass 1 by rounding.
    if any(not value >= 0.0 for value in values) or sum(values) > 1.0 + 1e-9:
        raise ConfigError(
            f"acceptances by rank are probabilities of different outcomes; got {values}",
            hint="give numbers >= 0 that sum to at most 1",
        )
    return values


@jit
def _fill(
    acceptances: NDArray[np.float64], max_nodes: int, max_depth: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return T and, for each entry, the y that made it: nodes left of the last child's subtree."""
    num_ranks = len(acceptances)
    values = np.full((max_nodes + 1, max_depth + 1, num_ranks), -np.inf)
    splits = np.zeros((max_nodes + 1, max_depth + 1, num_ranks), np.int64)
    best = np.full((max_nodes + 1, max_depth + 1), -np.inf)  # T's maximum over b
    for depth in range(max_depth + 1):
        values[1, depth, 0] = 1.0
        best[1, depth] = 1.0
        if depth == 0:
            continue
        for num_nodes in range(2, max_nodes + 1):
            for rank in range(1, num_ranks):
                for kept in range(1, num_nodes):
                    child = best[num_nodes - kept, depth - 1]
                    value = values[kept, depth, rank - 1] + acceptances[rank] * child
                    # A child worth nothing times a tree that cannot be is not a number.
                    if child > -np.inf and value > values[num_nodes, depth, rank]:
                        values[num_nodes, depth, rank] = value
                        splits[num_nodes, depth, rank] = kept
                best[num_nodes, depth] = max(best[num_nodes, depth], values[num_nodes, depth, rank])
    return values, splits
