"""How compiled code sees a batch: all numbers in one array of int64, laid out in one call.

An array that a compiled function takes costs a fraction of a microsecond each time, so what
changes with every pass travels as one. `unpack` cuts it into its parts, on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        shifts: How many layers further in the cache than a pass says each segment's keys and
            values lie, [B]; 0 except where segments share a pass at different depths.
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
    shifts: np.ndarray
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

    def set_slots(self, index: int, start: int, blocks: Sequence[np.ndarray]) -> None:
        """Note where the positions of a sequence from `start` on lie: slots, block by block."""
        for slots in blocks:
            stop = start + len(slots)
            if stop > self.slots.shape[1]:
                self.slots = _grown(self.slots, len(self.slots), 1 << stop.bit_length())
            self.slots[index, start:stop] = slots
            start = stop

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
        + 3 * num_segments
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
    shifts = first_staged + num_segments
    slots = shifts + num_segments
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
        packed[first_staged:shifts],
        packed[shifts:slots],
        packed[slots:parents],
        packed[parents:depths],
        packed[depths : depths + num_staged],
    )


packed_size_compiled = jit(packed_size)
unpack_compiled = jit(_unpack)


def unpack(packed: np.ndarray) -> Layout:
    """Return the parts of a layout, which share its memory."""
    return _unpack(packed)
