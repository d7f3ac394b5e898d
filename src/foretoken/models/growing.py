"""Draft trees that compiled code grows whole: what it needs before, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from foretoken.models.cache import BLOCK_SIZE, CachedSequence, KVCache
from foretoken.models.growth_kernels import NODE, TREE, Forest


class PlantedTree(NamedTuple):
    """A tree of the root alone, and how it is to grow: best first.

    Attributes:
        sequence: Where the model's keys and values of its past are; nothing is staged.
        known_ids: Tokens that stand and are not cached; the last is the root.
        max_nodes: Most nodes of the draft, at least 1.
        max_depth: Longest path, at least 1.
        width: Most children of one node, at least 1.
        min_gain: Expected tokens below which a level is not worth a pass.
        temperature: Of the request; 0 if nothing is added to the logits.
        noise_from: Returns rows of noise, float64 and on CPU, for the choices after the nodes of a
            depth and of those that follow it: at least one row, at most one per level that is left.
            Somebody keeps them alive while the tree grows. None if the temperature is 0.
    """

    sequence: CachedSequence
    known_ids: Sequence[int]
    max_nodes: int
    max_depth: int
    width: int
    min_gain: float
    temperature: float = 0.0
    noise_from: Callable[[int], Sequence[Tensor]] | None = None


class GrownTree(NamedTuple):
    """The nodes of a draft, ascending, the root first, and what was run for it.

    Attributes:
        token_ids: Of the nodes below the root.
        parents: Of every node, -1 for the root.
        logprobs: Likewise, 0 for the root: log of the estimated probability that the node is taken
            after its parent.
        fed_ids: Token ids of the nodes of the tree that were run, in the order of their staging
            behind the tokens that stand.
        fed_parents: Of each, its parent among the staged.
    """

    token_ids: list[int]
    parents: list[int]
    logprobs: list[float]
    fed_ids: list[int]
    fed_parents: list[int]


class Sizes(NamedTuple):
    """The most that any of some trees takes, the root's token among those that stand.

    Attributes:
        rows: Rows of a level of all trees together.
        known: Tokens that stand.
        max_nodes: Nodes of the draft.
        max_depth: Levels.
        added: Nodes added below the root, those that others push out included.
        fed: Nodes run below the root.
    """

    rows: int
    known: int
    max_nodes: int
    max_depth: int
    added: int
    fed: int

    @classmethod
    def of(cls, trees: Sequence[PlantedTree]) -> Sizes:
        """Return what some trees, at least one, take."""
        known = [len(tree.known_ids) for tree in trees]
        max_nodes = max([tree.max_nodes for tree in trees])
        max_depth = max([tree.max_depth for tree in trees])
        width = max([tree.width for tree in trees])
        added, fed, of_level = _most_nodes(max_nodes, max_depth, width)
        rows = max(sum(known), len(trees) * of_level)
        return cls(rows, max(known), max_nodes, max_depth, added, fed)


@lru_cache(maxsize=256)
def _most_nodes(max_nodes: int, max_depth: int, width: int) -> tuple[int, int, int]:
    """Return the most nodes that a tree may add and run, and run at one level."""
    added, fed, of_level = width, 0, 1
    for _ in range(max_depth - 1):
        of_level = min(of_level * width, max_nodes)
        added += of_level * width
        fed += of_level
    return added, fed, of_level


def grow_whole(
    cache: KVCache, trees: Sequence[PlantedTree], sizes: Sizes, grow: Callable[[Forest], int]
) -> list[GrownTree]:
    """Grow trees to their ends; what was run for them is staged afterwards.

    Args:
        cache: Of their sequences.
        trees: At least one.
        sizes: Theirs.
        grow: Calls `growth_kernels.grow_trees`; returns how many trees wait.

    Raises:
        CapacityError: The cache has no room; nothing is staged.
    """
    try:
        forest = _plant(cache, trees, sizes)
        while grow(forest):
            for index in np.flatnonzero(forest.trees["num_frontier"]).tolist():
                _provide(cache, trees[index], forest, index)
    except BaseException:
        for tree in trees:
            cache.rollback(tree.sequence)
        raise
    counts = forest.trees["num_staged"].tolist()
    for tree, num_staged in zip(trees, counts, strict=True):
        cache.count_staged(tree.sequence, num_staged)
    return _harvest(trees, forest, counts)


def _plant(cache: KVCache, trees: Sequence[PlantedTree], sizes: Sizes) -> Forest:
    """Return trees that are to be grown, with room and noise for the first levels."""
    num_trees, num_fed = len(trees), sizes.known + sizes.fed
    forest = Forest(
        np.array([_record(cache, tree) for tree in trees], TREE),
        np.empty((num_trees, 1 + sizes.added), NODE),
        np.empty((num_trees, sizes.max_nodes), np.int64),
        np.empty((num_trees, sizes.max_nodes), np.int64),
        np.empty((num_trees, num_fed), np.int64),
        np.empty((num_trees, num_fed), np.int64),
        np.zeros((num_trees, sizes.max_depth), np.int64),
    )
    for index, tree in enumerate(trees):
        forest.fed_ids[index, : len(tree.known_ids)] = tree.known_ids
        if tree.noise_from is not None:
            _point_at_noise(tree, forest, index, 0)
    return forest


def _record(cache: KVCache, tree: PlantedTree) -> tuple[float, ...]:
    """Return the `TREE` of one that has not begun."""
    num_known = len(tree.known_ids)
    # Most drafts need no more; a level of one that does waits until there is room for it.
    num_expected = num_known + (min(BLOCK_SIZE, tree.max_nodes) if tree.max_depth > 1 else 0)
    return (
        tree.sequence.index,
        tree.sequence.num_cached,
        0,
        num_known,
        cache.make_room(tree.sequence, num_expected),
        tree.max_nodes,
        tree.max_depth,
        tree.width,
        *(0, 0, 0, 0),  # no depth, nodes, best ones or frontier yet
        tree.min_gain,
        tree.temperature,
    )


def _provide(cache: KVCache, tree: PlantedTree, forest: Forest, index: int) -> None:
    """Give a tree what its next level needs."""
    record = forest.trees[index]
    record["room"] = cache.make_room(tree.sequence, int(record["num_fed"]))
    depth = int(record["depth"])
    if tree.noise_from is not None and not forest.noise[index, depth]:
        _point_at_noise(tree, forest, index, depth)


def _point_at_noise(tree: PlantedTree, forest: Forest, index: int, depth: int) -> None:
    """Note where the noise of a level and of those after it is."""
    if tree.noise_from is not None:
        rows = tree.noise_from(depth)
        forest.noise[index, depth : depth + len(rows)] = [row.data_ptr() for row in rows]


def _harvest(
    trees: Sequence[PlantedTree], forest: Forest, num_staged: Sequence[int]
) -> list[GrownTree]:
    counts = forest.trees["num_nodes"].tolist()
    nodes = forest.nodes[:, : max(counts)]
    token_ids, parents, logprobs = (
        nodes[name].tolist() for name in ("token_id", "parent", "logprob")
    )
    fed = [ids[:, : max(num_staged)].tolist() for ids in (forest.fed_ids, forest.fed_parents)]
    grown = []
    for index, (tree, count, stop) in enumerate(zip(trees, counts, num_staged, strict=True)):
        num_known = len(tree.known_ids)
        grown.append(
            GrownTree(
                token_ids[index][1:count],
                parents[index][:count],
                logprobs[index][:count],
                *[column[index][num_known:stop] for column in fed],
            )
        )
    return grown
