"""Running some layers of a model, and passes some of whose rows have gone part of the way.

A view of a model runs some of its layers with the same weights: the drafts of a model about itself.
What a view of the first layers has computed is the beginning of the whole model's own pass, so it
need not be computed again: `RowStates` carry it over, and `RemainingRows` are what is left to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foretoken.models.batch import RaggedBatch
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.layout import HEADER, Layout
from foretoken.models.state_rows import put_rows


@dataclass(frozen=True, slots=True)
class LayerSet:
    """Which parts of a model's layers run; what is left out passes its input on.

    Args:
        attention: Layers whose attention runs, ascending.
        mlp: Layers whose feed-forward part (or mixture of experts) runs, ascending.

    Raises:
        ValueError: They are not ascending, or negative.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    def __post_init__(self) -> None:
        for layers in (self.attention, self.mlp):
            if any(a >= b for a, b in itertools.pairwise((-1, *layers))):
                raise ValueError(f"layers are ascending and not negative; got {layers}")

    @classmethod
    def of(cls, layers: Sequence[int]) -> LayerSet:
        """Return whole layers."""
        return cls(tuple(layers), tuple(layers))

    @classmethod
    def all(cls, num_layers: int) -> LayerSet:
        """Return all layers; also the first ones, of a model that has more."""
        return cls.of(range(num_layers))

    @classmethod
    def without(
        cls, num_layers: int, attention: Sequence[int] = (), mlp: Sequence[int] = ()
    ) -> LayerSet:
        """Return all layers but some attention and some feed-forward parts."""
        return cls(
            tuple(layer for layer in range(num_layers) if layer not in attention),
            tuple(layer for layer in range(num_layers) if layer not in mlp),
        )

    @property
    def is_whole_layers(self) -> bool:
        """Whether every layer runs as a whole or not at all."""
        return self.attention == self.mlp

    @property
    def stop(self) -> int:
        """One more than the last layer that has a part in it; 0 if there is none."""
        return max((*self.attention, *self.mlp), default=-1) + 1

    def cache_indices(self, *, own_cache: bool) -> Sequence[int]:
        """Return where the keys and values of each attention lie in a cache.

        Args:
            own_cache: Whether the cache has these layers only, or all of the model.
        """
        return range(len(self.attention)) if own_cache else self.attention


@dataclass(frozen=True, slots=True)
class CachedPast:
    """Where a model keeps the keys and values of the tokens of a request that stand.

    Args:
        cache: The model's cache.
        sequence: The request's place in it.
    """

    cache: KVCache
    sequence: CachedSequence


def copy_past(
    past: CachedPast, layers: Sequence[int], cache: KVCache, sequence: CachedSequence, stop: int
) -> None:
    """Append what a model knows of a text to a view's cache, up to a position.

    For a view of the first layers it is what the view would compute. For other views it is what
    they approximate, and better: Draft & Verify and SWIFT draft on the whole model's past too.

    Args:
        past: Of the whole model.
        layers: The attention layers that the view runs.
        cache: The view's.
        sequence: Its place for the same text; nothing is staged.
        stop: Positions it shall hold; no more than `past` does.

    Raises:
        CapacityError: The view's cache has no room.
    """
    start = sequence.num_cached
    if stop <= start:
        return
    slots = cache.stage(sequence, range(-1, stop - start - 1))
    copy_slots(
        [(past.cache.keys[layer], past.cache.values[layer]) for layer in layers],
        past.cache.slots(past.sequence, start, stop),
        list(zip(cache.keys, cache.values, strict=True)),
        slots,
    )
    cache.commit([(sequence, range(stop - start))])


def copy_slots(
    sources: Sequence[tuple[Tensor, Tensor]],
    source_slots: np.ndarray,
    targets: Sequence[tuple[Tensor, Tensor]],
    target_slots: np.ndarray,
) -> None:
    """Copy keys and values from slots of some layers to slots of others, in the same order.

    Args:
        sources: Keys and values of each layer, [slots, H, D].
        source_slots: Of the positions, [n] int64.
        targets: As many layers of the same shapes.
        target_slots: As many slots.
    """
    device = sources[0][0].device if sources else torch.device("cpu")
    from_slots = torch.from_numpy(source_slots).to(device)
    to_slots = torch.from_numpy(target_slots).to(device)
    for source, target in zip(sources, targets, strict=True):
        for old, new in zip(source, target, strict=True):
            new.index_copy_(0, to_slots, old.index_select(0, from_slots))


class RemainingRows(RaggedBatch):
    """The rows of a batch whose first layers have not been run, as a batch of their own.

    To them the other rows are nodes that an earlier pass has staged.

    Args:
        batch: Some of its segments have states.

    Attributes:
        num_layers: Layers that the known rows have behind them.
        rows: Where its rows stand in `batch`, ascending.

    Raises:
        ValueError: A known row hangs on one that is not, or segments know different layers.
    """

    def __init__(self, batch: RaggedBatch) -> None:
        self.cache = batch.cache
        self._known = [
            (start, segment.states)
            for start, segment in zip(batch.starts, batch.segments, strict=False)
            if segment.states is not None
        ]
        counts = {states.num_layers for _, states in self._known}
        if len(counts) != 1:
            raise ValueError(f"known rows of one batch have run as many layers; got {counts}")
        self.num_layers = counts.pop()
        is_known = np.zeros(batch.num_rows, bool)
        for start, states in self._known:
            is_known[start + np.array(states.rows, np.int64)] = True
        self.rows = torch.from_numpy(np.flatnonzero(~is_known)).to(batch.cache.device)
        self.segments, self.lengths, self.num_keys = [], [], []
        parts = _SegmentParts(batch.layout, is_known)
        for index, segment in enumerate(batch.segments):
            length = parts.add(index)
            if length:
                self.segments.append(segment)
                self.lengths.append(length)
                self.num_keys.append(batch.num_keys[index])
        self.starts = [0, *itertools.accumulate(self.lengths)]
        self.packed = parts.pack()

    def known_states(self, batch: RaggedBatch) -> Tensor:
        """Return room for the states of all rows of `batch`, [R, D], with the known ones in it.

        Their keys and values are put into the cache.
        """
        hidden = self._known[0][1].hidden
        states = hidden.new_empty(batch.num_rows, hidden.shape[1])
        layers = range(self.num_layers)
        for start, known in self._known:
            rows = start + np.array(known.rows, np.int64)
            put_rows(states, torch.from_numpy(rows), known.hidden)
            copy_slots(
                [(known.cache.keys[layer], known.cache.values[layer]) for layer in layers],
                known.slots,
                [(self.cache.keys[layer], self.cache.values[layer]) for layer in layers],
                batch.layout.new_slots[rows],
            )
        return states


class _SegmentParts:
    """Builds the layout of the rows that are left, segment by segment.

    Args:
        layout: Of all rows.
        is_known: [R].
    """

    def __init__(self, layout: Layout, is_known: np.ndarray) -> None:
        self._layout = layout
        self._is_known = is_known
        self._rows: list[np.ndarray] = []
        self._slots: list[np.ndarray] = []
        self._parents: list[np.ndarray] = []
        self._depths: list[np.ndarray] = []
        self._first_staged: list[int] = []
        self._num_cached: list[int] = []

    def add(self, segment: int) -> int:
        """Take a segment's remaining rows; return how many there are."""
        layout = self._layout
        rows = slice(layout.row_starts[segment], layout.row_starts[segment + 1])
        is_known = self._is_known[rows]
        num_left = int(len(is_known) - is_known.sum())
        if num_left == 0:
            return 0
        first = layout.first_staged[segment]
        nodes = slice(layout.node_starts[segment], layout.node_starts[segment + 1])
        num_cached = layout.num_cached[segment]
        slots = layout.slots[layout.key_starts[segment] : layout.key_starts[segment + 1]]
        # What was staged before, then the known rows, then the others: parents still come first.
        order = np.concatenate(
            (np.arange(first), first + np.flatnonzero(is_known), first + np.flatnonzero(~is_known))
        )
        place = np.append(np.argsort(order), -1)  # the last cached position stays what it is
        parents = place[layout.parents[nodes][order]]
        if (parents >= np.arange(len(order))).any():
            raise ValueError("a row whose first layers are known hangs on one whose are not")
        self._rows.append(rows.start + np.flatnonzero(~is_known))
        self._slots += (slots[:num_cached], slots[num_cached:][order])
        self._parents.append(parents)
        self._depths.append(layout.depths[nodes][order])
        self._first_staged.append(len(order) - num_left)
        self._num_cached.append(num_cached)
        return num_left

    def pack(self) -> np.ndarray:
        """Return the layout of all segments taken, for `layout.unpack`."""
        if not self._rows:
            return np.zeros(HEADER, np.int64)
        layout, rows = self._layout, np.concatenate(self._rows)
        num_nodes = [len(parents) for parents in self._parents]
        num_keys = np.add(num_nodes, self._num_cached)
        parts = (
            [len(self._rows), len(rows), num_keys.sum(), sum(num_nodes)],
            *(array[rows] for array in (layout.token_ids, layout.positions, layout.new_slots)),
            np.cumsum([0, *map(len, self._rows)]),
            np.cumsum([0, *num_keys]),
            np.cumsum([0, *num_nodes]),
            self._num_cached,
            self._first_staged,
            np.zeros(len(self._rows)),
            *self._slots,
            *self._parents,
            *self._depths,
        )
        return np.concatenate(parts).astype(np.int64, copy=False)
