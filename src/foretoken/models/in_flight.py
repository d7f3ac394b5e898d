"""One tick of a model that runs a group of layers in loops: rows at different depths in one pass.

All loops have the same weights, so rows that are in different loops can share the pass that reads
these weights once: a token may enter while those before it are still on their way. Each row has
its depth's own keys and values, and looks at those of its ancestors, which are as deep or deeper.

Source: Hooper et al. 2023, SPEED: Speculative Pipelined Execution for Efficient Decoding,
arXiv:2310.12072.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foretoken.models.batch import RaggedBatch
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.loops import LoopShape

if TYPE_CHECKING:
    from foretoken.models.adapter import PartialPass


@dataclass(frozen=True, slots=True)
class InFlight:
    """Consecutive staged nodes of one sequence at one depth; their parents are as staged.

    Args:
        sequence: Where their keys and values go, and those of their past are.
        first: Index of the first of them among the staged nodes of the sequence.
        token_ids: One per node.
        depth: Loops that they have behind them, 0 to G - 1.
    """

    sequence: CachedSequence
    first: int
    token_ids: Sequence[int]
    depth: int


@dataclass(frozen=True, slots=True)
class TickOutput:
    """What one tick gives back.

    Args:
        logits: One row per row asked for, [rows, V].
        states: Of all rows after their loop, before the final norm and the coda, [R, D]; what
            the next tick goes on with. Rows that have all loops behind them need them no more.
    """

    logits: Tensor
    states: Tensor


class InFlightBatch(RaggedBatch):
    """Rows on their way through the loops, laid out for one tick; they are staged before.

    Args:
        cache: The cache that all sequences belong to.
        in_flight: At least one, each with at least one node; one segment each. Those of a
            sequence stand together, from the deepest up, no two at one depth.

    Raises:
        ValueError: Nodes are not staged, or those of a sequence are not in this order.

    Attributes:
        in_flight: As given.
        depths: Of each segment.
    """

    def __init__(self, cache: KVCache, in_flight: Sequence[InFlight]) -> None:
        for upper, lower in itertools.pairwise(in_flight):
            if upper.sequence is lower.sequence and not (
                upper.first + len(upper.token_ids) <= lower.first and upper.depth > lower.depth
            ):
                raise ValueError(
                    "nodes in flight of one sequence come from the deepest up, no two at one "
                    f"depth; got node {upper.first} at depth {upper.depth} before node "
                    f"{lower.first} at depth {lower.depth}"
                )
        self.cache = cache
        self.segments = ()  # nothing is new
        self.in_flight = in_flight
        self.depths = [entry.depth for entry in in_flight]
        self.lengths = [len(entry.token_ids) for entry in in_flight]
        self.starts = [0, *itertools.accumulate(self.lengths)]
        self.packed = cache.lay_out_staged(
            [entry.sequence for entry in in_flight],
            [entry.first for entry in in_flight],
            [entry.token_ids for entry in in_flight],
        )
        self.num_keys = [
            entry.sequence.num_cached + entry.first + len(entry.token_ids) for entry in in_flight
        ]

    def shift_layers(self, layers_per_loop: int) -> None:
        """Let a pass run each segment's own loop where it says the layers of the first."""
        self.layout.shifts[:] = [depth * layers_per_loop for depth in self.depths]

    def rows_at(self, depth: int) -> list[int]:
        """Return where the rows at one depth stand."""
        return [
            row
            for segment, found in enumerate(self.depths)
            if found == depth
            for row in range(self.starts[segment], self.starts[segment + 1])
        ]

    def at_depth(self, depth: int) -> InFlightBatch:
        """Return the rows at one depth, of which there are some, as a batch of their own."""
        return InFlightBatch(self.cache, [it for it in self.in_flight if it.depth == depth])


class TickPass:
    """Runs ticks of a model: its prelude, one loop of its group, its coda, each for its rows.

    Args:
        shape: How the model's layers are shared.
        part: Return the pass through some consecutive layers, on caches of the whole model.
        embed: Return what the first layer takes of a batch's rows, [R, D].
    """

    def __init__(
        self,
        shape: LoopShape,
        part: Callable[[range], PartialPass],
        embed: Callable[[RaggedBatch], Tensor],
    ) -> None:
        self._shape = shape
        self._embed = embed
        self._prelude = part(range(shape.prelude))
        self._group = part(shape.layers_of_loop(0))
        self._coda = part(range(shape.first_of_coda, shape.num_layers))

    def run(self, batch: InFlightBatch, states: Tensor | None, rows: Sequence[int]) -> TickOutput:
        """Run one tick; arguments, result and errors as for `LanguageModel.tick`."""
        last_loop, after = self._shape.loops - 1, self._shape.prelude + self._shape.group
        if max(batch.depths) > last_loop:
            raise ValueError(f"depths are 0 to {last_loop}; got {max(batch.depths)}")
        states = self._enter(batch, states)
        batch.shift_layers(self._shape.group)
        finishing = batch.rows_at(last_loop) if self._shape.coda else []
        if not finishing:
            output = self._group.forward(batch, rows, [after], states)
            return TickOutput(output.logits, output.hidden[after])
        early = [row for row in rows if row not in finishing]
        late = [row for row in rows if row in finishing]
        output = self._group.forward(batch, early, [after], states)
        states = output.hidden[after]
        places = [finishing.index(row) for row in late]
        final = self._coda.forward(batch.at_depth(last_loop), places, [], states[finishing])
        if not early:
            return TickOutput(final.logits, states)
        if not late:
            return TickOutput(output.logits, states)
        place_of = {row: place for place, row in enumerate((*early, *late))}
        logits = torch.cat((output.logits, final.logits))[[place_of[row] for row in rows]]
        return TickOutput(logits, states)

    def _enter(self, batch: InFlightBatch, states: Tensor | None) -> Tensor:
        """Return the states of all rows before the loops of this tick, [R, D]."""
        entering = batch.rows_at(0)
        if len(entering) < batch.num_rows and states is None:
            raise ValueError("rows that have a loop behind them go on from their states; got none")
        if states is None:
            return self._begin(batch)
        if not entering:
            return states
        begun = self._begin(batch.at_depth(0))
        merged = states.to(begun.dtype, copy=True)
        merged[entering] = begun
        return merged

    def _begin(self, batch: InFlightBatch) -> Tensor:
        """Return the states of rows without a loop behind them, after the prelude, [R, D]."""
        num_layers = self._shape.prelude
        if not num_layers:  # saves a pass that would do nothing else
            return self._embed(batch)
        return self._prelude.forward(batch, [], [num_layers]).hidden[num_layers]
