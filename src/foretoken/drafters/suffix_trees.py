"""The drafts of `suffix`, search and tree in one compiled call: alone, and along a whole text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit
from foretoken.drafters.copying import Occurrences, Shape, best_nodes
from foretoken.drafters.suffix_index import Ring, append_tokens, find_places


@jit
def better_tree(
    own: Ring, past: Ring, query: NDArray[np.int32], shape: Shape, max_places: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], float]:
    """Return the better of two trees, from the request's own text and from past outputs.

    Args:
        own: The text.
        past: Past outputs; there may be none.
        query: The last tokens of the text.
        shape: Of the trees.
        max_places: Earlier places looked at per order.

    Returns:
        As `best_nodes`.
    """
    starts, lengths = find_places(own.arrays, own.newest, own.num_tokens, query, max_places)
    best = best_nodes(Occurrences(own.arrays.tokens, starts, lengths, own.num_tokens), shape)
    starts, lengths = find_places(past.arrays, past.newest, past.num_tokens, query, max_places)
    other = best_nodes(Occurrences(past.arrays.tokens, starts, lengths, -1), shape)
    return other if other[4] > best[4] else best


@jit
def retrace_trees(
    own: Ring, past: Ring, token_ids: NDArray[np.int32], shape: Shape, bounds: tuple[int, int]
) -> NDArray[np.int64]:
    """Count drafts along a text, and those of which each node was taken, [1 + N].

    Args:
        own: The tokens of the text that are known before the first draft, with room for all of
            it, which is filled.
        past: Past outputs; there may be none.
        token_ids: The text.
        shape: Of the trees; N is its `max_nodes`.
        bounds: Most last tokens that count as one match, most places looked at per order.
    """
    counts = np.zeros(1 + shape.max_nodes, np.int64)
    max_match, max_places = bounds
    run, end = own.run, own.num_tokens
    while end < len(token_ids):
        query = token_ids[max(0, end - max_match) : end]
        known = Ring(own.arrays, end - 1, run, end)
        num_nodes, nodes, parents, _, _ = better_tree(known, past, query, shape, max_places)
        counts[0] += 1
        taken, last = 0, 0
        for node in range(1, num_nodes + 1):  # parents first
            at = end + taken
            if at < len(token_ids) and parents[node] == last and nodes[node] == token_ids[at]:
                counts[node] += 1
                taken, last = taken + 1, node
        run = append_tokens(own.arrays, end, run, token_ids[end : end + taken + 1])
        end += taken + 1
    return counts
