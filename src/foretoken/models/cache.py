"""Paged key-value cache with transactions.

Who owns which logical positions of a sequence that has T positions cached and S nodes staged:

    |<------- cached ------->|<-- staged -->|<- rest of the last block ->|
    0                        T             T+S

Cached positions hold the keys and values of tokens that stand. Staged positions hold the nodes
of a token tree (or a prompt chunk, which is a chain) in the order in which they were fed. `commit`
moves the accepted path to positions T, T+1, ... and forgets the rest; `rollback` forgets all of it.
Blocks are shared between sequences by reference count; only full blocks below T are ever shared,
so that nobody writes into a shared block.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foretoken.errors import CapacityError
from foretoken.models.layout import (
    HEADER,
    PER_SEGMENT,
    Tables,
    choose_paths,
    lay_out,
    move_slots,
    packed_size,
    unpack,
)

BLOCK_SIZE = 16
_OFFSETS = np.arange(BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per position."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_values(self) -> int:
        """Numbers stored per position."""
        return self.num_heads * (self.key_dim + self.value_dim)


@dataclass(eq=False, slots=True)
class CachedSequence:
    """One sequence's place in the cache; a handle, changed only by its `KVCache`."""

    index: int  # of its row in the cache's tables
    num_cached: int = 0
    num_staged: int = 0  # nodes fed since the last commit
    blocks: list[int] = field(default_factory=list)
    is_open: bool = True


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a CPU tensor's memory as an array; bfloat16, which numpy lacks, as uint16."""
    array: np.ndarray = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    return array


class KVCache:
    """Keys and values of all sequences of one model, in blocks of `BLOCK_SIZE` positions.

    Args:
        layers: Shape of each layer, in order.
        num_blocks: Capacity. On CPU the pages are only touched when used: blocks are handed out
            lowest first, so resident memory follows the highest load, not the capacity.
        dtype: Of keys and values.
        device: Where they live.

    Attributes:
        keys: Of each layer, [slots, H, D].
        values: The same.
        flat_pools: On CPU, flat views for compiled code, bfloat16 as uint16: keys and values of
            the layers of one shape, [L, slots, H, D] each, then those of the next shape.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.device = device
        num_slots = num_blocks * BLOCK_SIZE
        # One tensor per distinct layer shape, so that a commit moves all its layers at once.
        grouped: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(layers):
            grouped.setdefault(shape, []).append(index)
        self._pools: list[Tensor] = []  # [L, slots, H, D] each
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for shape, indices in grouped.items():
            prefix = (len(indices), num_slots, shape.num_heads)
            key_pool = torch.empty(*prefix, shape.key_dim, dtype=dtype, device=device)
            value_pool = torch.empty(*prefix, shape.value_dim, dtype=dtype, device=device)
            self._pools += [key_pool, value_pool]
            keys.update(zip(indices, key_pool, strict=True))
            values.update(zip(indices, value_pool, strict=True))
        self.keys = [keys[index] for index in range(len(layers))]  # each [slots, H, D]
        self.values = [values[index] for index in range(len(layers))]
        host_pools = self._pools if device.type == "cpu" else []
        self.flat_pools = [as_array(pool).reshape(-1) for pool in host_pools]
        # As bytes, [L, slots, bytes]: what is moved needs no type.
        self._byte_pools = [pool.view(torch.uint8).flatten(2).numpy() for pool in host_pools]
        self._tables = Tables()
        self._free = list(range(num_blocks))  # a heap: lowest first
        self._references = [0] * num_blocks
        self._sequences: set[CachedSequence] = set()

    # -- sequences ---------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def num_sequences(self) -> int:
        """Sequences opened and not yet closed."""
        return len(self._sequences)

    def open(self) -> CachedSequence:
        """Return a new, empty sequence."""
        sequence = CachedSequence(self._tables.take_row())
        self._sequences.add(sequence)
        return sequence

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """Return a new sequence with the same cached positions.

        Full blocks are shared; the last, partly filled one is copied. Staged nodes are not taken.

        Raises:
            CapacityError: No block is free for the copy.
        """
        num_full = sequence.num_cached // BLOCK_SIZE
        fork = self.open()
        fork.blocks = sequence.blocks[:num_full]
        slots = self._tables.slots
        slots[fork.index] = slots[sequence.index]
        for block in fork.blocks:
            self._references[block] += 1
        fork.num_cached = num_full * BLOCK_SIZE
        try:
            self._reserve(fork, sequence.num_cached)
        except CapacityError:
            self.close(fork)
            raise
        sources = self.slots(sequence, fork.num_cached, sequence.num_cached)
        targets = self.slots(fork, fork.num_cached, sequence.num_cached)
        self._move(np.stack((sources, targets)), len(sources))
        fork.num_cached = sequence.num_cached
        return fork

    def close(self, sequence: CachedSequence) -> None:
        """Give back everything a sequence holds; closing twice does nothing."""
        if not sequence.is_open:
            return
        self._release(sequence.blocks)
        sequence.blocks = []
        sequence.num_cached = sequence.num_staged = 0
        sequence.is_open = False
        self._sequences.remove(sequence)
        self._tables.free_rows.append(sequence.index)

    def slots(self, sequence: CachedSequence, start: int, stop: int) -> np.ndarray:
        """Return where the logical positions [start, stop) of a sequence lie, [stop - start]."""
        slots: np.ndarray = self._tables.slots[sequence.index, start:stop].copy()
        return slots

    # -- transactions ------------------------------------------------------------------------

    def stage(self, sequence: CachedSequence, parents: Sequence[int]) -> np.ndarray:
        """Make room for new nodes after those staged already.

        Args:
            sequence: An open sequence.
            parents: For each new node, its parent's index among all staged nodes; -1 hangs it
                on the last cached position.

        Returns:
            The slots of the new nodes, in order, [len(parents)] int64.

        Raises:
            CapacityError: Not enough blocks are free; nothing has changed.
            ValueError: A parent does not come before its child; nothing has changed.
        """
        packed = self.stage_all([sequence], [[0] * len(parents)], [parents])
        return unpack(packed).new_slots

    def stage_all(
        self,
        sequences: Sequence[CachedSequence],
        token_ids: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """Stage new nodes of several sequences and lay out the pass that will fill them.

        Args:
            sequences: Open ones, each once.
            token_ids: One per new node.
            parents: As for `stage`.

        Returns:
            The packed layout, for `layout.unpack`.

        Raises:
            CapacityError: Not enough blocks are free; nothing has changed.
            ValueError: A parent does not come before its child, or there are fewer or more token
                ids than nodes; nothing has changed.
        """
        numbers: list[int] = []
        num_rows = num_keys = num_staged = 0
        try:
            for sequence, nodes in zip(sequences, parents, strict=True):
                num_cached, first, length = sequence.num_cached, sequence.num_staged, len(nodes)
                num_positions = num_cached + first + length
                if num_positions > len(sequence.blocks) * BLOCK_SIZE:
                    self._reserve(sequence, num_positions)
                if first + length > self._tables.parents.shape[1]:
                    self._tables.widen_nodes(first + length)
                sequence.num_staged = first + length
                numbers += (sequence.index, num_cached, first, length)
                num_rows += length
                num_keys += num_positions
                num_staged += first + length
            num_segments, num_described = len(sequences), len(numbers)
            for ids in token_ids:
                numbers += ids
            if len(numbers) != num_described + num_rows:
                num_ids = len(numbers) - num_described
                raise ValueError(f"{num_rows} nodes have a token id each; got {num_ids}")
            for nodes in parents:
                numbers += nodes
            header = (num_segments, num_rows, num_keys, num_staged)
            packed = np.empty(packed_size(*header), np.int64)
            packed[:HEADER] = header
            tables = self._tables
            row = lay_out(
                np.array(numbers, np.int64),
                num_segments,
                tables.slots,
                tables.parents,
                tables.depths,
                packed,
            )
            if row >= 0:
                raise _orphan(row, numbers[2:num_described:PER_SEGMENT], parents)
        except BaseException:
            for sequence, first in zip(sequences, numbers[2::PER_SEGMENT], strict=False):
                sequence.num_staged = first
                self._trim(sequence)
            raise
        return packed

    def commit(self, accepted: Sequence[tuple[CachedSequence, Sequence[int]]]) -> None:
        """Keep one path of staged nodes per sequence, in order from the top, and drop the rest.

        Args:
            accepted: Sequences with the indices of their accepted nodes among the staged.

        Raises:
            ValueError: The nodes are no path from the last cached position downward.
        """
        numbers: list[int] = []
        for sequence, nodes in accepted:
            numbers += (sequence.index, sequence.num_cached, sequence.num_staged, len(nodes))
        num_described = len(numbers)
        for _, nodes in accepted:
            numbers += nodes
        moves = np.empty((2, len(numbers) - num_described), np.int64)
        tables = self._tables
        num_moves = choose_paths(
            np.array(numbers, np.int64), len(accepted), tables.slots, tables.parents, moves
        )
        if num_moves < 0:
            nodes = accepted[-1 - num_moves][1]
            raise ValueError(f"accepted nodes {list(nodes)} are not a path of the tree")
        if num_moves:
            self._move(moves, num_moves)
        for sequence, nodes in accepted:
            sequence.num_cached += len(nodes)
            self.rollback(sequence)

    def rollback(self, sequence: CachedSequence) -> None:
        """Forget all staged nodes and free the blocks that only they used."""
        sequence.num_staged = 0
        self._trim(sequence)

    @contextmanager
    def speculate(self, sequences: Sequence[CachedSequence]) -> Iterator[KVCache]:
        """Open a transaction: whatever is staged and not committed inside is rolled back."""
        try:
            yield self
        finally:
            for sequence in sequences:
                if sequence.is_open and sequence.num_staged:
                    self.rollback(sequence)

    # -- blocks ------------------------------------------------------------------------------

    def _reserve(self, sequence: CachedSequence, num_positions: int) -> None:
        num_missing = -(-num_positions // BLOCK_SIZE) - len(sequence.blocks)
        if num_missing > len(self._free):
            raise CapacityError(
                f"the KV cache needs {num_missing} more blocks of {BLOCK_SIZE} tokens; "
                f"{len(self._free)} of {self.num_blocks} are free",
                hint="run fewer requests at once or raise kv_cache_tokens",
            )
        tables = self._tables
        if num_positions > tables.slots.shape[1]:
            tables.widen_slots(num_positions)
        for _ in range(num_missing):
            block = heapq.heappop(self._free)
            self._references[block] = 1
            start = len(sequence.blocks) * BLOCK_SIZE
            first = block * BLOCK_SIZE
            tables.slots[sequence.index, start : start + BLOCK_SIZE] = _OFFSETS + first
            sequence.blocks.append(block)

    def _trim(self, sequence: CachedSequence) -> None:
        """Free the blocks behind the last position."""
        num_needed = -(-(sequence.num_cached + sequence.num_staged) // BLOCK_SIZE)
        if num_needed < len(sequence.blocks):
            self._release(sequence.blocks[num_needed:])
            del sequence.blocks[num_needed:]

    def _release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                heapq.heappush(self._free, block)

    def _move(self, moves: np.ndarray, num_moves: int) -> None:
        """Copy from slots to slots, [2, >= num_moves]; no source comes after it as a target."""
        for array in self._byte_pools:
            move_slots(array, moves, num_moves)
        if not self._byte_pools:
            sources, targets = torch.from_numpy(moves[:, :num_moves]).to(self.device)
            for pool in self._pools:
                pool.index_copy_(1, targets, pool.index_select(1, sources))

    def check_integrity(self) -> None:
        """Check that every block is owned exactly as often as its count says.

        Raises:
            RuntimeError: A block is lost, owned twice or both free and owned.
        """
        owners = [0] * self.num_blocks
        for sequence in self._sequences:
            num_positions = sequence.num_cached + sequence.num_staged
            if len(sequence.blocks) != -(-num_positions // BLOCK_SIZE):
                raise RuntimeError(
                    f"a sequence of {num_positions} positions holds {len(sequence.blocks)} blocks"
                )
            if len(set(sequence.blocks)) != len(sequence.blocks):
                raise RuntimeError(f"a sequence holds a block twice: {sequence.blocks}")
            for block in sequence.blocks:
                owners[block] += 1
        if owners != self._references:
            raise RuntimeError(f"block owners {owners} differ from counts {self._references}")
        free = set(self._free)
        if len(free) != len(self._free) or any(owners[block] for block in free):
            raise RuntimeError("the free list holds a block twice or an owned block")
        if len(free) + sum(count > 0 for count in owners) != self.num_blocks:
            raise RuntimeError("a block is neither free nor owned")


def _orphan(row: int, firsts: Sequence[int], parents: Sequence[Sequence[int]]) -> ValueError:
    """Say which node does not come after its parent; `firsts` were staged before, per segment."""
    segment = 0
    while row >= len(parents[segment]):
        row -= len(parents[segment])
        segment += 1
    node = firsts[segment] + row
    return ValueError(f"node {node} needs a parent in [-1, {node}); got {parents[segment][row]}")
