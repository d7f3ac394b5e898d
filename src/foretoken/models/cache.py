"""Paged key-value cache with transactions.

Who owns which logical positions of a sequence that has T positions cached and S nodes staged:

    |<------- cached ------->|<-- staged -->|<- rest of the last block ->|
    0                        T             T+S

Cached positions hold the keys and values of tokens that stand. Staged positions hold the nodes
of a token tree (or a prompt chunk, which is a chain) in the order in which they were fed. `commit`
moves the accepted path to positions T, T+1, ... and forgets the rest; `rollback` forgets all of it.
Blocks are shared between sequences by reference count, with forks and with whoever begins with the
same tokens (see `prefix`); only full blocks below T are ever shared, so that nobody writes into a
shared block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from foretoken.errors import CapacityError
from foretoken.models.layout import Tables, unpack
from foretoken.models.layout_kernels import choose_paths, keep_nodes
from foretoken.models.pools import LayerShape, Pools
from foretoken.models.prefix import ROOT, BlockPool
from foretoken.models.staging import CachedSequence, pack_new, pack_staged

BLOCK_SIZE = 16


class KVCache:
    """Keys and values of all sequences of one model, in blocks of `BLOCK_SIZE` positions.

    Args:
        layers: Shape of each layer, in order.
        num_blocks: Capacity. On CPU the pages are only touched when used: blocks are handed out
            lowest first, so resident memory follows the highest load, not the capacity. Blocks
            that are kept for their prefix are part of the load.
        dtype: Of keys and values.
        device: Where they live.

    Attributes:
        keys: Of each layer, [slots, H, D].
        values: The same.
        flat_pools: `Pools.flat`, for compiled code.
        tables: What compiled code needs to know of the sequences.
        num_prefix_queries: Tokens that sequences were opened with.
        num_prefix_hits: Those of them that were cached already.
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
        self._pools = Pools(layers, num_blocks * BLOCK_SIZE, dtype=dtype, device=device)
        self.keys, self.values = self._pools.keys, self._pools.values
        self.flat_pools = self._pools.flat
        self._slots = np.arange(num_blocks * BLOCK_SIZE).reshape(-1, BLOCK_SIZE)  # of each block
        self.tables = Tables()
        self._blocks = BlockPool(num_blocks, BLOCK_SIZE)
        self._sequences: set[CachedSequence] = set()
        self.num_prefix_queries = self.num_prefix_hits = 0

    # -- sequences ---------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, those that are kept for their prefix included."""
        return self._blocks.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, held or free, that sequences with the same prefix can share."""
        return self._blocks.num_registered

    @property
    def num_sequences(self) -> int:
        """Sequences opened and not yet closed."""
        return len(self._sequences)

    def open(self, token_ids: Sequence[int] = ()) -> CachedSequence:
        """Return a new sequence: empty, or with what is cached of the prefix of a text.

        Args:
            token_ids: The text. Its last token is never cached: it has to be fed for logits.
        """
        sequence = CachedSequence(self.tables.take_row())
        self._sequences.add(sequence)
        self.num_prefix_queries += len(token_ids)
        if known := self._blocks.find(token_ids[:-1]):
            self._adopt(sequence, known)
            sequence.num_shared = len(known)
            self.num_prefix_hits += sequence.num_cached
        return sequence

    def share(self, sequence: CachedSequence, token_ids: Sequence[int]) -> None:
        """Let others that begin with the same tokens have the sequence's full blocks.

        Where another block is registered for the same prefix, the sequence takes it for its own.

        Args:
            sequence: What it holds depends on its tokens alone.
            token_ids: Of its positions. Nothing is done with positions beyond the last of them.

        Raises:
            ValueError: They are not the tokens that a block is registered for.
        """
        num_full = min(sequence.num_cached, len(token_ids)) // BLOCK_SIZE
        for place in range(sequence.num_shared, num_full):
            block, start = sequence.blocks[place], place * BLOCK_SIZE
            parent = sequence.blocks[place - 1] if place else ROOT
            own_ids = token_ids[start : start + BLOCK_SIZE]
            first = self._blocks.register(block, parent, own_ids)
            if first != block:
                if not self._blocks.is_held_once(block):
                    return  # a fork holds it, and what comes after it, too
                self._blocks.hold([first])
                self._blocks.release([block])
                sequence.blocks[place] = first
                self._set_slots(sequence, place)
            sequence.num_shared += 1

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """Return a new sequence with the same cached positions.

        Full blocks are shared; the last, partly filled one is copied. Staged nodes are not taken.

        Raises:
            CapacityError: No block is free for the copy.
        """
        fork = self.open()
        self._adopt(fork, sequence.blocks[: sequence.num_cached // BLOCK_SIZE])
        fork.num_shared = sequence.num_shared
        try:
            self._reserve(fork, sequence.num_cached)
        except CapacityError:
            self.close(fork)
            raise
        sources = self.slots(sequence, fork.num_cached, sequence.num_cached)
        targets = self.slots(fork, fork.num_cached, sequence.num_cached)
        self._pools.move(np.stack((sources, targets)), len(sources))
        fork.num_cached = sequence.num_cached
        return fork

    def close(self, sequence: CachedSequence) -> None:
        """Give back everything a sequence holds; closing twice does nothing."""
        if not sequence.is_open:
            return
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_cached = sequence.num_staged = sequence.num_shared = 0
        sequence.is_open = False
        self._sequences.remove(sequence)
        self.tables.free_rows.append(sequence.index)

    def slots(self, sequence: CachedSequence, start: int, stop: int) -> np.ndarray:
        """Return where the logical positions [start, stop) of a sequence lie, [stop - start]."""
        slots: np.ndarray = self.tables.slots[sequence.index, start:stop].copy()
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
        firsts = [sequence.num_staged for sequence in sequences]
        try:
            for sequence, nodes in zip(sequences, parents, strict=True):
                num_staged = sequence.num_staged + len(nodes)
                self.make_room(sequence, num_staged)
                sequence.num_staged = num_staged
            return pack_new(self.tables, sequences, token_ids, parents)
        except BaseException:
            for sequence, first in zip(sequences, firsts, strict=True):
                self.count_staged(sequence, first)
            raise

    def make_room(self, sequence: CachedSequence, num_staged: int) -> int:
        """Make room for so many staged nodes; return how many a sequence has room for.

        Raises:
            CapacityError: Not enough blocks are free; nothing has changed.
        """
        num_positions = sequence.num_cached + num_staged
        if num_positions > len(sequence.blocks) * BLOCK_SIZE:
            self._reserve(sequence, num_positions)
        room = len(sequence.blocks) * BLOCK_SIZE - sequence.num_cached
        if room > self.tables.parents.shape[1]:
            self.tables.widen_nodes(room)
        return room

    def count_staged(self, sequence: CachedSequence, num_staged: int) -> None:
        """Note how many nodes are staged, by compiled code perhaps; free the blocks behind them."""
        sequence.num_staged = num_staged
        num_needed = -(-(sequence.num_cached + sequence.num_staged) // BLOCK_SIZE)
        if num_needed < len(sequence.blocks):
            self._blocks.release(sequence.blocks[num_needed:])
            del sequence.blocks[num_needed:]

    def lay_out_staged(
        self,
        sequences: Sequence[CachedSequence],
        firsts: Sequence[int],
        token_ids: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """Lay out a pass over nodes that are staged already.

        Args:
            sequences: Open ones; one that comes more than once has a segment each time.
            firsts: For each segment, its first node among the staged ones of its sequence.
            token_ids: For each segment, of its nodes, which follow one another.

        Returns:
            The packed layout, for `layout.unpack`.

        Raises:
            ValueError: A sequence has not staged so many nodes.
        """
        return pack_staged(self.tables, sequences, firsts, token_ids)

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
        tables = self.tables
        num_moves = choose_paths(
            np.array(numbers, np.int64), len(accepted), tables.slots, tables.parents, moves
        )
        if num_moves < 0:
            nodes = accepted[-1 - num_moves][1]
            raise ValueError(f"accepted nodes {list(nodes)} are not a path of the tree")
        if num_moves:
            self._pools.move(moves, num_moves)
        for sequence, nodes in accepted:
            sequence.num_cached += len(nodes)
            self.rollback(sequence)

    def advance(self, sequence: CachedSequence, path: Sequence[int], kept: Sequence[int]) -> None:
        """Make a path of staged nodes cached and keep some of those below it staged.

        Nodes that stay are renumbered in order. Nothing is moved where all nodes before the last
        that stays are on the path or stay too, as in a chain.

        Args:
            sequence: An open sequence.
            path: Indices among the staged nodes, from the top; may be empty.
            kept: Likewise, ascending; each hangs on the last of the path (if that is empty, on
                the last cached position) or on one that is kept.

        Raises:
            ValueError: The nodes are no path, or one that is kept hangs elsewhere; nothing has
                changed.
        """
        nodes = np.array((*path, *kept), np.int64)
        moves = np.empty((2, len(nodes)), np.int64)
        tables, row = self.tables, sequence.index
        num_moves = keep_nodes(
            nodes,
            len(path),
            sequence.num_cached,
            sequence.num_staged,
            tables.slots[row],
            tables.parents[row],
            tables.depths[row],
            moves,
        )
        if num_moves < 0:
            node, role = nodes[-1 - num_moves], "accepted" if -num_moves <= len(path) else "kept"
            raise ValueError(
                f"staged node {node} cannot be {role}: accepted are {list(path)}, a path from the "
                f"top, kept are {list(kept)}, ascending and below its end"
            )
        if num_moves:
            self._pools.move(moves, num_moves)
        sequence.num_cached += len(path)
        self.count_staged(sequence, len(kept))

    def rollback(self, sequence: CachedSequence) -> None:
        """Forget all staged nodes and free the blocks that only they used."""
        self.count_staged(sequence, 0)

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
        if num_missing > self._blocks.num_free:
            raise CapacityError(
                f"the KV cache needs {num_missing} more blocks of {BLOCK_SIZE} tokens; "
                f"{self._blocks.num_free} of {self.num_blocks} are free",
                hint="run fewer requests at once or raise kv_cache_tokens",
            )
        num_held = len(sequence.blocks)
        sequence.blocks += [self._blocks.take() for _ in range(num_missing)]
        self._set_slots(sequence, num_held)

    def _adopt(self, sequence: CachedSequence, blocks: list[int]) -> None:
        """Let an empty sequence begin with full blocks of others."""
        self._blocks.hold(blocks)
        sequence.blocks = blocks
        self._set_slots(sequence, 0)
        sequence.num_cached = len(blocks) * BLOCK_SIZE

    def _set_slots(self, sequence: CachedSequence, first: int) -> None:
        """Note where the positions of a sequence's blocks from the first on lie."""
        self.tables.set_slots(
            sequence.index, first * BLOCK_SIZE, [self._slots[it] for it in sequence.blocks[first:]]
        )

    def check_integrity(self) -> None:
        """Check that every block is owned as often as its count says, and registered as it should.

        Raises:
            RuntimeError: A block is lost, owned twice, free and owned, or registered wrongly.
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
            if sequence.num_shared > sequence.num_cached // BLOCK_SIZE:
                raise RuntimeError(f"{sequence.num_shared} blocks are shared and not all are full")
            self._blocks.check_chain(sequence.blocks[: sequence.num_shared])
            for block in sequence.blocks:
                owners[block] += 1
        self._blocks.check(owners)


__all__ = ["BLOCK_SIZE", "CachedSequence", "KVCache", "LayerShape"]
