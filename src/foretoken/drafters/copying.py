"""Trees of what followed earlier occurrences of the last tokens, scored by counting.

Where the occurrences come from, an index of past outputs or a datastore, is the drafters' affair.
Each is the place of the token after it in a flat array of token ids; `SEPARATOR` ends a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.jit import jit
from foretoken.core.tree import NO_PARENT, TokenTree

SEPARATOR = -1
_MAX_LENGTHS = 8  # different lengths of match that are tried, longest first


class Occurrences(NamedTuple):
    """Earlier occurrences of the last tokens of a context.

    Args:
        tokens: Where they were found, [C] int32; the array is read as a ring.
        starts: Place of the token after each, [M] int64.
        lengths: How many of the last tokens occurred there, [M] int64; at least 1.
        end: Number of tokens when the text that is read is the context itself: a copy that
            reaches it goes on with the copied tokens. -1 when texts end at separators.
    """

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    end: int


class Shape(NamedTuple):
    """Bounds of a tree.

    Args:
        max_nodes: Most draft tokens.
        max_depth: Most draft tokens on one path.
        max_width: Most children of a node.
        depth_per_match: Draft tokens on a path allowed per token of match ...
        depth_offset: ... and besides.
        min_prob: Least estimated probability that a node is reached.
    """

    max_nodes: int
    max_depth: int
    max_width: int
    depth_per_match: float
    depth_offset: int
    min_prob: float

    @classmethod
    def within(
        cls, budget: DraftBudget, *, depth_per_match: float, depth_offset: int, min_prob: float
    ) -> Shape:
        """Return a drafter's own bounds within a budget."""
        width = budget.max_nodes if budget.max_width is None else budget.max_width
        return cls(
            budget.max_nodes,
            budget.max_depth,
            max(1, width),
            float(depth_per_match),
            depth_offset,
            float(min_prob),
        )


@dataclass(frozen=True, slots=True)
class CountedTree:
    """The best tree that was found.

    Args:
        token_ids: Of its draft tokens, parents first, [N].
        parents: Node of each one's parent, counted with the root as 0, [N].
        probs: Estimated probability of each, given its parent, [N].
        score: Sum of the estimated probabilities that the nodes are reached: expected tokens.
    """

    token_ids: list[int]
    parents: list[int]
    probs: list[float]
    score: float

    def as_draft(self, root_id: int, source: str) -> Draft:
        """Return it as a draft below the pending token."""
        tree = TokenTree((root_id, *self.token_ids), (NO_PARENT, *self.parents))
        logprobs = (0.0, *[math.log(prob) for prob in self.probs])
        return Draft.from_drafter(source, tree, draft_logprobs=logprobs)


NOTHING = CountedTree([], [], [], 0.0)


def best_tree(found: Occurrences, shape: Shape) -> CountedTree:
    """Return the tree of highest expected length over all lengths of match.

    For a length, the occurrences that match at least so far are a sample of what comes next: a
    child that c of n of them have is estimated at c / (n + 1 / (k + 1)) with k tokens of context,
    the match and the path. With one occurrence this is Laplace's rule for k agreeing tokens. The
    tree then takes the most probable nodes first, as deep as the length of the match allows.
    Long matches are sure and rare, short ones frequent and vague; the score decides.

    Args:
        found: Occurrences; of equally frequent tokens, that of the first occurrence goes first.
        shape: Bounds.

    Source: SuffixDecoding, arXiv:2411.04975.
    """
    if not len(found.starts) or shape.max_nodes <= 0 or shape.max_depth <= 0:
        return NOTHING
    return counted_tree(best_nodes(found, shape))


def counted_tree(
    nodes: tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], float],
) -> CountedTree:
    """Return what `best_nodes` found as a tree, `NOTHING` if it is none."""
    num_nodes, token_ids, parents, probs, score = nodes
    if not num_nodes:
        return NOTHING
    last = num_nodes + 1
    return CountedTree(
        token_ids[1:last].tolist(), parents[1:last].tolist(), probs[1:last].tolist(), float(score)
    )


class _Nodes(NamedTuple):
    """Nodes taken so far, the root first."""

    token_ids: NDArray[np.int64]
    parents: NDArray[np.int64]
    depths: NDArray[np.int64]
    probs: NDArray[np.float64]
    num_children: NDArray[np.int64]


class _Pool(NamedTuple):
    """Children of taken nodes; each owns a run of occurrences, so there are at most M."""

    token_ids: NDArray[np.int64]
    parents: NDArray[np.int64]
    probs: NDArray[np.float64]
    totals: NDArray[np.float64]
    ages: NDArray[np.int64]
    bounds: NDArray[np.int64]  # [M, 2]


@jit
def best_nodes(
    found: Occurrences, shape: Shape
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], float]:
    """Return the tree of `best_tree`.

    Returns:
        How many draft tokens it has; of its nodes, the root first, the tokens, parents and
        probabilities given the parent; the score. The arrays may be longer.
    """
    order = _sorted_places(-found.lengths, len(found.lengths))[1]
    best_score, best_count = 0.0, 0
    best = _new_nodes(1)
    nodes = _new_nodes(shape.max_nodes + 1)
    count, num_tried = 0, 0
    while count < len(order) and num_tried < _MAX_LENGTHS:
        length = found.lengths[order[count]]
        while count < len(order) and found.lengths[order[count]] == length:
            count += 1
        num_taken, score = _grow(found, order[:count].copy(), length, shape, nodes)
        if score > best_score:
            best_score, best_count = score, num_taken
            best, nodes = nodes, _new_nodes(shape.max_nodes + 1)
        num_tried += 1
    return best_count, best.token_ids, best.parents, best.probs, best_score


@jit
def _new_nodes(size: int) -> _Nodes:
    return _Nodes(
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.ones(size, np.float64),
        np.zeros(size, np.int64),
    )


@jit
def _grow(
    found: Occurrences, members: np.ndarray, length: int, shape: Shape, nodes: _Nodes
) -> tuple[int, float]:
    """Fill `nodes` with the best-first tree of some occurrences; return its size and score."""
    num_members = len(members)
    pool = _Pool(
        np.empty(num_members, np.int64),
        np.empty(num_members, np.int64),
        np.empty(num_members, np.float64),
        np.empty(num_members, np.float64),
        np.empty(num_members, np.int64),
        np.empty((num_members, 2), np.int64),
    )
    max_depth = min(shape.max_depth, int(shape.depth_per_match * length) + shape.depth_offset)
    nodes.num_children[:] = 0
    num_nodes, score, num_in_pool, age = 0, 0.0, 0, 0
    if max_depth > 0:
        num_in_pool = _expand(
            found, members, (0, num_members, length, age), 1.0, (nodes, 0, pool, 0)
        )
        age = num_in_pool
    while num_in_pool > 0 and num_nodes < shape.max_nodes:
        chosen = 0
        for index in range(1, num_in_pool):
            more = pool.totals[index] - pool.totals[chosen]
            if more > 0 or (more == 0 and pool.ages[index] < pool.ages[chosen]):
                chosen = index
        total, parent = pool.totals[chosen], pool.parents[chosen]
        if total < shape.min_prob:
            break
        low, high = pool.bounds[chosen]
        is_taken = nodes.num_children[parent] < shape.max_width
        if is_taken:
            num_nodes += 1
            nodes.token_ids[num_nodes] = pool.token_ids[chosen]
            nodes.parents[num_nodes] = parent
            nodes.depths[num_nodes] = nodes.depths[parent] + 1
            nodes.probs[num_nodes] = pool.probs[chosen]
            nodes.num_children[parent] += 1
            score += total
        num_in_pool -= 1
        pool.token_ids[chosen] = pool.token_ids[num_in_pool]
        pool.parents[chosen] = pool.parents[num_in_pool]
        pool.probs[chosen] = pool.probs[num_in_pool]
        pool.totals[chosen] = pool.totals[num_in_pool]
        pool.ages[chosen] = pool.ages[num_in_pool]
        pool.bounds[chosen] = pool.bounds[num_in_pool]
        if is_taken and nodes.depths[num_nodes] < max_depth:
            place = (nodes, num_nodes, pool, num_in_pool)
            num_new = _expand(found, members, (low, high, length, age), total, place)
            num_in_pool += num_new
            age += num_new
    return num_nodes, score


@jit
def _expand(
    found: Occurrences,
    members: np.ndarray,
    run: tuple[int, int, int, int],
    total: float,
    place: tuple[_Nodes, int, _Pool, int],
) -> int:
    """Add the children of a node to the pool; return how many.

    Args:
        found: All occurrences.
        members: Their order; a node's are together, and are sorted here by their next token.
        run: Bounds of the node's occurrences in `members`, length of match, age of its children.
        total: Estimated probability that the node is reached.
        place: The nodes, which of them it is, the pool and its size.
    """
    low, high, length, age = run
    nodes, node, pool, num_in_pool = place
    depth = nodes.depths[node]
    next_ids = np.empty(high - low, np.int64)
    going_on = np.empty(high - low, np.int64)
    # Arrays by themselves: a call that passes tuples of them counts references to each.
    tokens, starts, end = found.tokens, found.starts, found.end
    count = 0
    for member in members[low:high]:
        at = starts[member] + depth
        if 0 <= end <= at:  # not written yet: the copy goes on with itself
            token_id = _path_token(nodes.token_ids, nodes.parents, node, depth - 1 - (at - end))
        else:
            token_id = np.int64(tokens[at % len(tokens)])
        if token_id >= 0:
            next_ids[count], going_on[count] = token_id, member
            count += 1
    next_ids, by_token = _sorted_places(next_ids, count)
    members[low : low + count] = going_on[by_token]
    num_new, first = 0, 0
    while first < count:
        token_id, stop = next_ids[first], first + 1
        while stop < count and next_ids[stop] == token_id:
            stop += 1
        prob = (stop - first) / (count + 1 / (length + depth + 1))
        new = num_in_pool + num_new
        pool.token_ids[new], pool.parents[new] = token_id, node
        pool.probs[new], pool.totals[new] = prob, total * prob
        # Of equals the first occurrence goes first, whatever its token.
        pool.ages[new] = age * len(members) + by_token[first]
        pool.bounds[new, 0], pool.bounds[new, 1] = low + first, low + stop
        num_new += 1
        first = stop
    return num_new


@jit
def _sorted_places(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `count` values in ascending order and the places where they stood.

    Values are of 32 bits, so value and place fit into one key, and equal values keep their order.
    """
    keys = np.empty(count, np.int64)
    for place in range(count):
        keys[place] = (values[place] << 32) + place
    if count > 1:
        keys.sort()
    return keys >> 32, keys & 0xFFFFFFFF


@jit
def _path_token(token_ids: np.ndarray, parents: np.ndarray, node: int, num_up: int) -> np.int64:
    """Return the token of the node that is so many levels above a node."""
    for _ in range(num_up):
        node = parents[node]
    return np.int64(token_ids[node])
