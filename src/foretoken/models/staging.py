"""What a cache's tables say of a batch's nodes, written into one array for compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from foretoken.models.layout import HEADER, PER_SEGMENT, Tables, packed_size
from foretoken.models.layout_kernels import lay_out, lay_out_staged


@dataclass(eq=False, slots=True)
class CachedSequence:
    """One sequence's place in the cache; a handle, changed only by its `KVCache`."""

    index: int  # of its row in the cache's tables
    num_cached: int = 0
    num_staged: int = 0  # nodes fed since the last commit
    num_shared: int = 0  # leading blocks that are registered for their tokens
    blocks: list[int] = field(default_factory=list)
    is_open: bool = True


def pack_new(
    tables: Tables,
    sequences: Sequence[CachedSequence],
    token_ids: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int]],
) -> np.ndarray:
    """Note the parents of new nodes, the last staged ones of each sequence, and lay them out.

    Args:
        tables: Of the cache, with room for them.
        sequences: Each once; the new nodes are counted as staged already.
        token_ids: One per new node.
        parents: As for `KVCache.stage`.

    Raises:
        ValueError: A parent does not come before its child, or there are fewer or more token
            ids than nodes.
    """
    numbers: list[int] = []
    num_rows = num_keys = num_staged = 0
    for sequence, nodes in zip(sequences, parents, strict=True):
        num_cached, stop, length = sequence.num_cached, sequence.num_staged, len(nodes)
        numbers += (sequence.index, num_cached, stop - length, length)
        num_rows += length
        num_keys += num_cached + stop
        num_staged += stop
    num_described = len(numbers)
    for ids in token_ids:
        numbers += ids
    if len(numbers) != num_described + num_rows:
        num_ids = len(numbers) - num_described
        raise ValueError(f"{num_rows} nodes have a token id each; got {num_ids}")
    for nodes in parents:
        numbers += nodes
    packed = _room_for(len(sequences), num_rows, num_keys, num_staged)
    row = lay_out(
        np.array(numbers, np.int64),
        len(sequences),
        tables.slots,
        tables.parents,
        tables.depths,
        packed,
    )
    if row >= 0:
        raise _orphan(row, numbers[2:num_described:PER_SEGMENT], parents)
    return packed


def pack_staged(
    tables: Tables,
    sequences: Sequence[CachedSequence],
    firsts: Sequence[int],
    token_ids: Sequence[Sequence[int]],
) -> np.ndarray:
    """Lay out nodes that are staged already; arguments as for `KVCache.lay_out_staged`.

    Raises:
        ValueError: A sequence has not staged so many nodes.
    """
    numbers: list[int] = []
    num_rows = num_keys = num_nodes = 0
    for sequence, first, ids in zip(sequences, firsts, token_ids, strict=True):
        stop = first + len(ids)
        if not 0 <= first < stop <= sequence.num_staged:
            raise ValueError(
                f"a sequence with {sequence.num_staged} staged nodes has no nodes {first} to "
                f"{stop - 1}"
            )
        numbers += (sequence.index, sequence.num_cached, first, len(ids))
        num_rows += len(ids)
        num_keys += sequence.num_cached + stop
        num_nodes += stop
    for ids in token_ids:
        numbers += ids
    packed = _room_for(len(sequences), num_rows, num_keys, num_nodes)
    lay_out_staged(
        np.array(numbers, np.int64),
        len(sequences),
        tables.slots,
        tables.parents,
        tables.depths,
        packed,
    )
    return packed


def _room_for(*header: int) -> np.ndarray:
    """Return room for a layout with its header filled in."""
    packed = np.empty(packed_size(*header), np.int64)
    packed[:HEADER] = header
    return packed


def _orphan(row: int, firsts: Sequence[int], parents: Sequence[Sequence[int]]) -> ValueError:
    """Say which node does not come after its parent; `firsts` were staged before, per segment."""
    segment = 0
    while row >= len(parents[segment]):
        row -= len(parents[segment])
        segment += 1
    node = firsts[segment] + row
    return ValueError(f"node {node} needs a parent in [-1, {node}); got {parents[segment][row]}")
