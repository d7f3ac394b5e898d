"""The blocks of a KV cache: who holds them, and which prefix a full one stands for.

A full block of committed positions is registered under the block before it and its own token ids,
so by induction under the whole prefix that ends with it. Whoever has the same prefix may hold it
too instead of computing it again. Invariants:

- Whoever holds a registered block holds its parent, and so all of its prefix.
- A registered block that nobody holds is free, but keeps its content until it is handed out.
  Those free blocks are handed out least recently used first. A parent is used at least as long
  as its children and counts as used after them, so children go first and no registered block is
  ever without its parent.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT = -1  # the parent of a first block


class BlockPool:
    """Which blocks are free, how often the others are held, and which prefixes are registered.

    Token ids are compared, not hashes of them. They are kept as bytes, whose hash Python salts:
    nobody can choose prompts that are slow to look up.

    Args:
        num_blocks: How many there are; all are free at first.
        block_size: Positions of a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks))  # free and not registered; a heap
        self._kept: OrderedDict[int, None] = OrderedDict()  # free and registered, next one first
        self._blocks: dict[tuple[int, bytes], int] = {}  # by parent and token ids
        self._keys: dict[int, tuple[int, bytes]] = {}  # the inverse

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, registered or not."""
        return len(self._blank) + len(self._kept)

    @property
    def num_registered(self) -> int:
        """Blocks that stand for a prefix, held or free."""
        return len(self._blocks)

    def take(self) -> int:
        """Return a free block, held once from now on; there has to be one.

        Blocks that are not registered go first, the lowest before the others.
        """
        if self._blank:
            block = heapq.heappop(self._blank)
        else:
            block, _ = self._kept.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
        self._references[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks once more that are held or registered."""
        for block in blocks:
            if self._references[block] == 0:
                del self._kept[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Hold blocks once less; parents come before their children."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._keys:
                    self._kept[block] = None
                else:
                    heapq.heappush(self._blank, block)

    def is_held_once(self, block: int) -> bool:
        """Return whether one sequence alone holds a block."""
        return self._references[block] == 1

    # -- prefixes ----------------------------------------------------------------------------

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """Return the blocks of the longest registered prefix of these tokens, in order."""
        blocks: list[int] = []
        for stop in range(self._block_size, len(token_ids) + 1, self._block_size):
            parent = blocks[-1] if blocks else ROOT
            key = (parent, _as_bytes(token_ids[stop - self._block_size : stop]))
            if key not in self._blocks:
                break
            blocks.append(self._blocks[key])
        return blocks

    def register(self, block: int, parent: int, token_ids: Sequence[int]) -> int:
        """Let a full block stand for its parent's prefix and these tokens.

        Args:
            block: Whoever holds it holds the parent too.
            parent: A registered block, or `ROOT`.
            token_ids: Of its positions.

        Returns:
            The block that stands for this prefix: another one if it was registered before.

        Raises:
            ValueError: The block stands for another prefix; nothing has changed.
        """
        key = (parent, _as_bytes(token_ids))
        if self._keys.get(block, key) != key:
            raise ValueError(f"block {block} is registered for another prefix; got other tokens")
        first = self._blocks.setdefault(key, block)
        if first == block:
            self._keys[block] = key
        return first

    # -- integrity ---------------------------------------------------------------------------

    def check(self, owners: Sequence[int]) -> None:
        """Check that nothing is lost and that the invariants above hold.

        Args:
            owners: How many sequences hold each block.

        Raises:
            RuntimeError: A block is lost, both free and held, or registered wrongly.
        """
        if owners != self._references:
            raise RuntimeError(f"block owners {owners} differ from counts {self._references}")
        free = [*self._blank, *self._kept]
        if len(set(free)) != len(free) or any(owners[block] for block in free):
            raise RuntimeError("the free lists hold a block twice or an owned block")
        if len(free) + sum(count > 0 for count in owners) != len(owners):
            raise RuntimeError("a block is neither free nor owned")
        self._check_registered(owners)

    def check_chain(self, blocks: Sequence[int]) -> None:
        """Check that blocks are registered one below the other.

        Raises:
            RuntimeError: One of them is not.
        """
        for parent, block in zip((ROOT, *blocks), blocks, strict=False):
            if block not in self._keys or self._keys[block][0] != parent:
                raise RuntimeError(f"block {block} is not registered below {parent}")

    def _check_registered(self, owners: Sequence[int]) -> None:
        if {block: key for key, block in self._blocks.items()} != self._keys:
            raise RuntimeError("a block is registered for no prefix or for several")
        if set(self._kept) != {block for block in self._keys if not owners[block]}:
            raise RuntimeError("a free block is among the wrong ones")
        order = {block: place for place, block in enumerate(self._kept)}
        for block, (parent, _) in self._keys.items():
            if parent == ROOT:
                continue
            if parent not in self._keys:
                raise RuntimeError(f"block {block} is registered without its parent {parent}")
            if owners[block] > owners[parent]:
                raise RuntimeError(f"block {block} is held more often than its parent {parent}")
            if parent in order and order[parent] < order[block]:
                raise RuntimeError(f"block {parent} would be handed out before its child {block}")


def _as_bytes(token_ids: Sequence[int]) -> bytes:
    return array("q", token_ids).tobytes()
