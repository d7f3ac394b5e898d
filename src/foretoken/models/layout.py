"""How compiled code sees a batch: all numbers in one array of int64, laid out in one call.

An array that a compiled function takes costs a fraction of a microsecond each time, so what
changes with every pass travels as one. `unpack` cuts it into its parts, on either side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from foretoken.core.jit import jit

HEADER = 4  # numbers of segments, rows, keys and staged nodes
PER_SEGMENT = 4  # numbers that describe a segment to `lay_out`


class Layout(NamedTuple):
    """A batch as arrays of int64, which is what compiled code reads.

    Attributes:
        token_ids: [R].
        positions: [R], absolute: cached positions plus depth.
        new_slots: [R], where each row's key and value go.
        row_starts: First row of each segment, and R at the end, [B + 1].
        key_starts: The same for `slots`.
        node_starts: The same for `parents` and `depths`.
        num_cached: Cached positions of each segment's sequence, [B].
        first_staged: Index of each segment's first row among the staged nodes, [B].
        slots: For each segment, where its cached positions and then its staged nodes lie.
        parents: For each segment, of all staged nodes; -1 is the last cached position.
        depths: For each segment, of all staged nodes.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    new_slots: np.ndarray
    row_starts: np.ndarray
    key_starts: np.ndarray
    node_starts: np.ndarray
    num_cached: np.ndarray
    first_staged: np.ndarray
    slots: np.ndarray
    parents: np.ndarray
    depths: np.ndarray


class Tables:
    """What compiled code needs to know of all sequences, one row each; all int64.

    Attributes:
        slots: Slot of every logical position that a sequence's blocks hold.
        parents: Of its staged nodes: index among the staged, -1 for the last cached position.
        depths: Likewise.
        free_rows: Rows that no sequence has.
    """

    def __init__(self) -> None:
        self.slots, self.parents, self.depths = (np.zeros((1, 64), np.int64) for _ in range(3))
        self.free_rows = [0]

    def take_row(self) -> int:
        """Return a row for a new sequence."""
        if not self.free_rows:
            num_rows = len(self.slots)
            self.slots, self.parents, self.depths = (
                _grown(table, 2 * num_rows, table.shape[1])
                for table in (self.slots, self.parents, self.depths)
            )
            self.free_rows = list(range(num_rows, 2 * num_rows))
        return self.free_rows.pop()

    def widen_slots(self, num_positions: int) -> None:
        """Make room for so many positions of a sequence."""
        self.slots = _grown(self.slots, len(self.slots), 1 << num_positions.bit_length())

    def widen_nodes(self, num_nodes: int) -> None:
        """Make room for so many staged nodes of a sequence."""
        size = len(self.parents), 1 << num_nodes.bit_length()
        self.parents, self.depths = _grown(self.parents, *size), _grown(self.depths, *size)


def _grown(table: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    """Return a table of this size that begins with another."""
    grown = np.zeros((num_rows, num_columns), table.dtype)
    grown[: len(table), : table.shape[1]] = table
    return grown


def packed_size(num_segments: int, num_rows: int, num_keys: int, num_staged: int) -> int:
    """Return how many numbers a layout takes, keys and staged nodes counted over all segments."""
    return (
        HEADER
        + 3 * num_rows
        + 3 * (num_segments + 1)
        + 2 * num_segments
        + (num_keys + 2 * num_staged)
    )


def _unpack(packed: np.ndarray) -> Layout:
    num_segments, num_rows, num_keys, num_staged = packed[0], packed[1], packed[2], packed[3]
    positions = HEADER + num_rows
    new_slots = positions + num_rows
    row_starts = new_slots + num_rows
    key_starts = row_starts + num_segments + 1
    node_starts = key_starts + num_segments + 1
    num_cached = node_starts + num_segments + 1
    first_staged = num_cached + num_segments
    slots = first_staged + num_segments
    parents = slots + num_keys
    depths = parents + num_staged
    return Layout(
        packed[HEADER:positions],
        packed[positions:new_slots],
        packed[new_slots:row_starts],
        packed[row_starts:key_starts],
        packed[key_starts:node_starts],
        packed[node_starts:num_cached],
        packed[num_cached:first_staged],
        packed[first_staged:slots],
        packed[slots:parents],
        packed[parents:depths],
        packed[depths : depths + num_staged],
    )


unpack_compiled = jit(_unpack)


def unpack(packed: np.ndarray) -> Layout:
    """Return the parts of a layout, which share its memory."""
    return _unpack(packed)


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
    layout.token_ids[:] = token_ids[:num_rows]
    row, key, node = 0, 0, 0
    for segment in range(num_segments):
        at = PER_SEGMENT * segment
        index, num_cached = numbers[at], numbers[at + 1]
        first, num_new = numbers[at + 2], numbers[at + 3]
        num_staged = first + num_new
        slots, all_parents, depths = slot_table[index], parent_table[index], depth_table[index]
        layout.row_starts[segment] = row
        layout.key_starts[segment] = key
        layout.node_starts[segment] = node
        layout.num_cached[segment] = num_cached
        layout.first_staged[segment] = first
        for staged in range(first, num_staged):
            parent = parents[row]
            if parent < -1 or parent >= staged:
                return row
            depth = 0 if parent < 0 else depths[parent] + 1
            all_parents[staged], depths[staged] = parent, depth
            layout.positions[row] = num_cached + depth
            layout.new_slots[row] = slots[num_cached + staged]
            row += 1
        for position in range(num_cached + num_staged):
            layout.slots[key + position] = slots[position]
        for staged in range(num_staged):
            layout.parents[node + staged] = all_parents[staged]
            layout.depths[node + staged] = depths[staged]
        key += num_cached + num_staged
        node += num_staged
    layout.row_starts[num_segments] = row
    layout.key_starts[num_segments] = key
    layout.node_starts[num_segments] = node
    return -1


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
