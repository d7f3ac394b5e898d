"""The flat, ragged batch of one forward pass: all requests, all nodes, one row each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.layout import Layout, unpack


@dataclass(frozen=True, slots=True, eq=False)
class RowStates:
    """What some rows of a segment have behind them: the first layers, run by a view of the model.

    Args:
        num_layers: How many layers.
        rows: Indices in the segment, ascending; the parent of each is cached, staged or known too.
        hidden: Their states after these layers, [K, D], as the model itself would compute them.
        cache: Where the keys and values of these layers are, in order.
        slots: In it, of each row, [K] int64.
    """

    num_layers: int
    rows: Sequence[int]
    hidden: Tensor
    cache: KVCache
    slots: np.ndarray


@dataclass(frozen=True, slots=True)
class Segment:
    """New nodes of one sequence: a prompt chunk, a token tree, or one after the other.

    Args:
        sequence: Where the keys and values of its past are, and where the new ones go.
        token_ids: One per node.
        parents: For each node its parent's index among all staged nodes of the sequence, those
            of earlier passes included; -1 hangs it on the last cached position.
        states: What is known of some of the rows, if anything; they are not computed again.
    """

    sequence: CachedSequence
    token_ids: Sequence[int]
    parents: Sequence[int]
    states: RowStates | None = None


class RaggedBatch:
    """Rows of several segments, laid out for one pass through a model.

    Building it stages the nodes in the cache; the pass writes their keys and values.

    Args:
        cache: The cache that all sequences belong to.
        segments: At least one, each with at least one node.

    Attributes:
        starts: First row of each segment, and R at the end.
        lengths: Nodes of each segment.
        num_keys: Keys that each segment may see: cached and staged positions.
        packed: Rows, segment after segment, nodes in the order given; see `layout`.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment]) -> None:
        self.cache = cache
        self.segments = segments
        self.lengths = [len(segment.token_ids) for segment in segments]
        self.starts = [0, *itertools.accumulate(self.lengths)]
        sequences = [segment.sequence for segment in segments]
        self.packed = cache.stage_all(
            sequences,
            [segment.token_ids for segment in segments],
            [segment.parents for segment in segments],
        )
        self.num_keys = [sequence.num_cached + sequence.num_staged for sequence in sequences]

    @cached_property
    def layout(self) -> Layout:
        """The parts of `packed`."""
        return unpack(self.packed)

    @cached_property
    def token_ids(self) -> Tensor:
        """Token id of each row, [R] int64."""
        return _tensor(self.layout.token_ids, self.cache.device)

    @cached_property
    def positions(self) -> Tensor:
        """Absolute position of each row, [R] int64."""
        return _tensor(self.layout.positions, self.cache.device)

    @cached_property
    def slots(self) -> Tensor:
        """Where each row's key and value go, [R] int64."""
        return _tensor(self.layout.new_slots, self.cache.device)

    @cached_property
    def reference(self) -> ReferenceLayout:
        """The padded view for attention in plain torch, built when a layer asks for it."""
        return ReferenceLayout(self)

    @property
    def num_rows(self) -> int:
        """R, rows of the flat batch."""
        return self.starts[-1]


class ReferenceLayout:
    """Padded view of a ragged batch for attention in plain torch, on any device.

    B segments are padded to the longest in nodes (N) and in keys (T). Keys stand in logical
    order: cached positions ascending, then staged nodes.

    Attributes:
        key_slots: [B * T] int64; padding repeats a slot and is masked.
        pad_rows: [B * N] int64, row of each padded node; None when nothing is padded.
        unpad_rows: [R] int64, the inverse; None likewise.
    """

    def __init__(self, batch: RaggedBatch) -> None:
        self._batch = batch
        self.shape = (len(batch.lengths), max(batch.lengths), max(batch.num_keys))
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self.key_slots = self._build_key_slots()
        self.pad_rows: Tensor | None = None
        self.unpad_rows: Tensor | None = None
        if len(batch.lengths) * max(batch.lengths) != batch.num_rows:
            self._build_padding(max(batch.lengths))

    @property
    def _is_single_row(self) -> bool:
        """Whether there is one row, and nothing staged that it could not see."""
        return self._batch.num_rows == 1 and len(self._batch.layout.parents) == 1

    def _build_key_slots(self) -> Tensor:
        batch, (num_segments, _, num_keys) = self._batch, self.shape
        rows = np.empty((num_segments, num_keys), dtype=np.int64)
        starts = batch.layout.key_starts
        for row, start, count in zip(rows, starts, batch.num_keys, strict=False):
            slots = batch.layout.slots[start : start + count]
            row[:count] = slots
            row[count:] = slots[-1]
        return _tensor(rows.reshape(-1), batch.cache.device)

    def _build_padding(self, num_nodes: int) -> None:
        padded, unpadded = [], []
        starts, lengths = self._batch.starts[:-1], self._batch.lengths
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            padded.append(start + np.minimum(np.arange(num_nodes), length - 1))
            unpadded.append(index * num_nodes + np.arange(length))
        self.pad_rows = _tensor(np.concatenate(padded), self._batch.cache.device)
        self.unpad_rows = _tensor(np.concatenate(unpadded), self._batch.cache.device)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return what to add to the scores, [B, N, T]: 0 where a node may look, else very low.

        None when every row sees every key, as in plain decoding of one request.

        Args:
            window: Positions that a node sees, itself included; None for all.
            dtype: Of the scores.
        """
        if self._is_single_row and (window is None or window >= self.shape[2]):
            return None
        if (window, dtype) not in self._biases:
            self._biases[window, dtype] = self._build_bias(window, dtype)
        return self._biases[window, dtype]

    def _build_bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        allowed = np.zeros(self.shape, dtype=bool)
        layout = self._batch.layout
        for index, (length, num_keys) in enumerate(
            zip(self._batch.lengths, self._batch.num_keys, strict=True)
        ):
            num_cached, first = layout.num_cached[index], layout.first_staged[index]
            nodes = slice(layout.node_starts[index], layout.node_starts[index + 1])
            mask = allowed[index, :length, :num_keys]
            mask[:, :num_cached] = True
            _mark_ancestors(mask[:, num_cached:], layout.parents[nodes].tolist(), first)
            if window is not None:
                depths = layout.depths[nodes]
                key_positions = np.concatenate((np.arange(num_cached), num_cached + depths))
                mask &= key_positions > num_cached + depths[first:, None] - window
        low = torch.finfo(dtype).min
        forbidden = _tensor(~allowed, self._batch.cache.device)
        return torch.zeros(self.shape, dtype=dtype, device=forbidden.device).masked_fill_(
            forbidden, low
        )


def _mark_ancestors(mask: np.ndarray, parents: Sequence[int], first: int) -> None:
    """Set `mask[j, k]` where staged node k is `first + j` or above it; mask is [new, staged]."""
    for row in range(len(mask)):
        node = first + row
        parent = parents[node]
        if parent >= first:  # parents come first: that row is complete
            mask[row] = mask[parent - first]
        else:
            while parent >= 0:
                mask[row, parent] = True
                parent = parents[parent]
        mask[row, node] = True


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
