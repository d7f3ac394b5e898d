"""Compiled code that stages nodes, lays batches out, and keeps what was accepted of them."""

from __future__ import annotations

import numpy as np

from foretoken.core.jit import jit
from foretoken.models.layout import PER_SEGMENT, unpack_compiled


@jit
def _describe(layout, segment, first, num_new, num_cached, slots, parents, depths):
    """Write one segment behind those before it: nodes [first, first + num_new) of a sequence.

    Args:
        layout: Written to; the starts of this segment are there, those of the next come here.
        segment: Its number.
        first: Index of its first node among the staged nodes of the sequence.
        num_new: Its rows.
        num_cached: Cached positions of the sequence.
        slots: Of the sequence, from the tables.
        parents: Likewise.
        depths: Likewise.
    """
    num_staged = first + num_new
    row = layout.row_starts[segment]
    key, node = layout.key_starts[segment], layout.node_starts[segment]
    layout.num_cached[segment] = num_cached
    layout.first_staged[segment] = first
    layout.shifts[segment] = 0
    for new in range(num_new):
        layout.positions[row + new] = num_cached + depths[first + new]
        layout.new_slots[row + new] = slots[num_cached + first + new]
    for position in range(num_cached + num_staged):
        layout.slots[key + position] = slots[position]
    for staged in range(num_staged):
        layout.parents[node + staged] = parents[staged]
        layout.depths[node + staged] = depths[staged]
    layout.row_starts[segment + 1] = row + num_new
    layout.key_starts[segment + 1] = key + num_cached + num_staged
    layout.node_starts[segment + 1] = node + num_staged


@jit
def stage_segment(
    layout, segment, first, token_ids, parents, num_cached, slots, all_parents, depths
):
    """Stage the new nodes of one sequence and write its segment behind those before it.

    Args:
        layout: As for `_describe`.
        segment: Likewise.
        first: How many nodes the sequence has staged before.
        token_ids: Of the new nodes.
        parents: Likewise.
        num_cached: Cached positions of the sequence.
        slots: Of the sequence, from the tables.
        all_parents: Likewise; written to.
        depths: Likewise; written to.

    Returns:
        -1, or the first of the new nodes whose parent does not come before it.
    """
    num_new, row = len(token_ids), layout.row_starts[segment]
    for new in range(num_new):
        staged, parent = first + new, parents[new]
        if parent < -1 or parent >= staged:
            return new
        all_parents[staged] = parent
        depths[staged] = 0 if parent < 0 else depths[parent] + 1
        layout.token_ids[row + new] = token_ids[new]
    _describe(layout, segment, first, num_new, num_cached, slots, all_parents, depths)
    return -1


@jit
def lay_out(
    numbers: np.ndarray,
    num_segments: int,
    slot_table: np.ndarray,
    parent_table: np.ndarray,
    depth_table: np.ndarray,
    packed: np.ndarray,
) -> int:
    """Stage the new nodes of all segments and lay out the batch.

    Args:
        numbers: For each segment its sequence's index in the tables, its numbers of cached
            positions, of nodes staged before and of new ones; then the token ids of all segments;
            then all parents.
        num_segments: B.
        slot_table: Slot of each position of each sequence.
        parent_table: Parent of each staged node of each sequence; written to.
        depth_table: Its depth; written to.
        packed: Written to; of `packed_size`, its header filled in.

    Returns:
        -1, or the first row whose parent does not come before it. Tables may have changed then,
        but only behind the nodes staged before.
    """
    layout = unpack_compiled(packed)
    num_rows = packed[1]
    token_ids = numbers[PER_SEGMENT * num_segments :]
    parents = token_ids[num_rows:]
    layout.row_starts[0] = layout.key_starts[0] = layout.node_starts[0] = 0
    row = 0
    for segment in range(num_segments):
        at = PER_SEGMENT * segment
        index, num_cached = numbers[at], numbers[at + 1]
        first, stop = numbers[at + 2], row + numbers[at + 3]
        orphan: int = stage_segment(
            layout,
            segment,
            first,
            token_ids[row:stop],
            parents[row:stop],
            num_cached,
            slot_table[index],
            parent_table[index],
            depth_table[index],
        )
        if orphan >= 0:
            return row + orphan
        row = stop
    return -1


@jit
def lay_out_staged(
    numbers: np.ndarray,
    num_segments: int,
    slot_table: np.ndarray,
    parent_table: np.ndarray,
    depth_table: np.ndarray,
    packed: np.ndarray,
) -> None:
    """Lay out a batch of nodes that are staged already; arguments as for `lay_out`.

    Args:
        numbers: As there, without parents; several segments may be of one sequence.
        num_segments: B.
        slot_table: Slot of each position of each sequence.
        parent_table: Parent of each staged node of each sequence.
        depth_table: Its depth.
        packed: Written to; of `packed_size`, its header filled in.
    """
    layout = unpack_compiled(packed)
    layout.token_ids[:] = numbers[PER_SEGMENT * num_segments :]
    layout.row_starts[0] = layout.key_starts[0] = layout.node_starts[0] = 0
    row = 0
    for segment in range(num_segments):
        at = PER_SEGMENT * segment
        index, num_cached = numbers[at], numbers[at + 1]
        first, num_new = numbers[at + 2], numbers[at + 3]
        slots, parents, depths = slot_table[index], parent_table[index], depth_table[index]
        _describe(layout, segment, first, num_new, num_cached, slots, parents, depths)
        row += num_new


@jit
def choose_paths(
    numbers: np.ndarray,
    num_sequences: int,
    slot_table: np.ndarray,
    parent_table: np.ndarray,
    moves: np.ndarray,
) -> int:
    """Find what has to be moved for one path of staged nodes per sequence to be cached.

    Args:
        numbers: For each sequence its index in the tables, its numbers of cached positions, of
            staged nodes and of nodes on the path; then the nodes of all paths.
        num_sequences: How many.
        slot_table: Slot of each position of each sequence.
        parent_table: Parent of each staged node of each sequence.
        moves: Written to, [2, nodes]: sources, then targets, path by path from the top.

    Returns:
        How many moves there are; if something is no path, -1 - its index.
    """
    nodes = numbers[PER_SEGMENT * num_sequences :]
    num_moves, first = 0, 0
    for place in range(num_sequences):
        at = PER_SEGMENT * place
        index, num_cached = numbers[at], numbers[at + 1]
        num_staged, length = numbers[at + 2], numbers[at + 3]
        above = -1
        for depth in range(length):
            node = nodes[first + depth]
            if node < 0 or node >= num_staged or parent_table[index, node] != above:
                return -1 - place
            above = node
            if node != depth:
                moves[0, num_moves] = slot_table[index, num_cached + node]
                moves[1, num_moves] = slot_table[index, num_cached + depth]
                num_moves += 1
        first += length
    return num_moves


@jit
def keep_nodes(
    nodes: np.ndarray,
    num_accepted: int,
    num_cached: int,
    num_staged: int,
    slots: np.ndarray,
    parents: np.ndarray,
    depths: np.ndarray,
    moves: np.ndarray,
) -> int:
    """Make one path of a sequence's staged nodes cached and keep some that hang below it.

    Args:
        nodes: Of the path from the top, then those that stay staged, ascending.
        num_accepted: How many of them are the path.
        num_cached: Cached positions of the sequence so far.
        num_staged: Its staged nodes so far.
        slots: Slot of each of its positions.
        parents: Parent of each staged node; renumbered.
        depths: Likewise.
        moves: Written to, [2, at least len(nodes)]: sources, then targets.

    Returns:
        How many moves there are; if a node does not fit, -1 - its place in `nodes`, and nothing
        has changed.
    """
    new_parents = np.full(len(nodes), -1)
    last_accepted = nodes[num_accepted - 1] if num_accepted > 0 else -1
    before = -1
    for place in range(len(nodes)):
        node = nodes[place]
        if node <= before or node >= num_staged:
            return -1 - place
        parent = parents[node]
        fits = parent == (before if place < num_accepted else last_accepted)
        for above in range(num_accepted, place):
            if nodes[above] == parent:
                fits, new_parents[place] = True, above - num_accepted
        if not fits:
            return -1 - place
        before = node
    num_moves = 0
    for place in range(len(nodes)):
        if nodes[place] != place:
            moves[0, num_moves] = slots[num_cached + nodes[place]]
            moves[1, num_moves] = slots[num_cached + place]
            num_moves += 1
    for place in range(num_accepted, len(nodes)):
        kept = place - num_accepted
        parents[kept] = new_parents[place]
        depths[kept] = depths[nodes[place]] - num_accepted
    return num_moves


@jit
def move_slots(pool: np.ndarray, moves: np.ndarray, num_moves: int) -> None:
    """Copy what some slots hold into others, one after the other.

    Args:
        pool: [layers, slots, bytes] uint8.
        moves: Sources and targets, [2, at least `num_moves`].
        num_moves: How many.
    """
    num_bytes = pool.shape[2]
    for layer in range(len(pool)):
        for move in range(num_moves):
            source, target = moves[0, move], moves[1, move]
            for i in range(num_bytes):  # thirteen times as fast as to assign slices
                pool[layer, target, i] = pool[layer, source, i]
