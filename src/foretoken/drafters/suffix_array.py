"""Suffix arrays over token ids: every occurrence of a run of tokens by binary search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit

MAX_MATCH = 16  # tokens by which places are sorted; a power of two


def build_suffix_array(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the places of a text, sorted by the `MAX_MATCH` tokens from each on, [T] int32.

    Places that agree in all of these, and where the text ends, stand in the order of the text.
    Prefix doubling: who is sorted by k tokens is sorted by 2k with one more sort of pairs.

    Args:
        tokens: [T] int32; below 2**31 of them.

    Source: Manber and Myers 1993, stopped after log2(`MAX_MATCH`) rounds.
    """
    num_tokens = len(tokens)
    ranks = tokens.astype(np.int64)
    ranks -= ranks.min(initial=0) - 1  # 0 is for what lies behind the end
    order = np.argsort(ranks, kind="stable")
    length = 1
    while length < MAX_MATCH and num_tokens:
        pairs = ranks << 32
        pairs[:-length] |= ranks[length:]
        order = np.argsort(pairs, kind="stable")
        is_new = np.ones(num_tokens, np.int64)
        is_new[1:] = pairs[order[1:]] != pairs[order[:-1]]
        ranks[order] = np.cumsum(is_new)
        length *= 2
    return order.astype(np.int32)


def longest_suffix(
    tokens: NDArray[np.int32], array: NDArray[np.int32], query: NDArray[np.int32]
) -> tuple[int, int, int]:
    """Return how many last tokens of a query occur together, and where.

    Args:
        tokens: The text, [T].
        array: Its suffix array, [T].
        query: The last tokens; at most `MAX_MATCH` are looked at.

    Returns:
        The length, 0 for none, and the range in `array` of the places where its run begins.
    """
    length, low, high = find_suffix(tokens, array, query[-MAX_MATCH:])
    return int(length), int(low), int(high)


@jit
def find_suffix(tokens: np.ndarray, array: np.ndarray, query: np.ndarray) -> tuple[int, int, int]:
    """Do what `longest_suffix` does, for compiled callers: a query of at most `MAX_MATCH`."""
    for length in range(len(query), 0, -1):
        run = query[len(query) - length :]
        low = _bound(tokens, array, run, 0)
        high = _bound(tokens, array, run, 1)
        if low < high:
            return length, low, high
    return 0, 0, 0


@jit
def _bound(tokens: np.ndarray, array: np.ndarray, run: np.ndarray, past_equal: int) -> int:
    """Return the first index whose tokens are not less than the run, or greater than it."""
    low, high = 0, len(array)
    while low < high:
        middle = (low + high) // 2
        order = 0
        for step in range(len(run)):
            place = array[middle] + step
            token_id = tokens[place] if place < len(tokens) else -2
            if token_id != run[step]:
                order = -1 if token_id < run[step] else 1
                break
        if order < past_equal:
            low = middle + 1
        else:
            high = middle
    return low
