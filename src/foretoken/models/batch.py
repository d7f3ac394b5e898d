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


@dataclass(frozen=True, slots=True)
class Segment:
    """New nodes of one sequence: a prompt chunk, a token tree, or one after the other.

    Args:
        sequence: Where the keys and values of its past are, and where the new ones go.
        token_ids: One per node.
        parents: For each node its parent's index among all staged nodes of the sequence, those
            of earlier passes included; -1 hangs it on the last cached position.
    """

    sequence: CachedSequence
    token_ids: Sequence[int]
    parents: Sequence[int]


class RaggedBatch:
    """Rows of several segments, laid out for one pass through a model.

    Building it stages the nodes in the cache; the pass writes their keys and values.

    Args:
        cache: The cache that all sequences belong to.
        segments: At least one, each with at least one node.

    Attributes:
        token_ids: [R] int64, segment after segment, nodes in the order given.
        positions: [R] int64, absolute: cached positions plus depth.
        slots: [R] int64, where each row's key and value go.
        starts: First row of each segment, and R at the end.
        lengths: Nodes of each segment.
        num_keys: Keys that each segment may see: cached and staged positions.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment]) -> None:
        self.cache = cache
        self.segments = segments
        self.lengths = [len(segment.token_ids) for segment in segments]
        self.starts = [0, *itertools.accumulate(self.lengths)]
        token_ids: list[int] = []
        positions: list[int] = []
        slots = []
        for segment, length in zip(segments, self.lengths, strict=True):
            sequence = segment.sequence
            slots.append(cache.stage(sequence, segment.parents))
            token_ids += segment.token_ids
            positions += [sequence.num_cached + depth for depth in sequence.depths[-length:]]
        self.num_keys = [
            segment.sequence.num_cached + segment.sequence.num_staged for segment in segments
        ]
        self.token_ids = torch.tensor(token_ids, device=cache.device)
        self.positions = torch.tensor(positions, device=cache.device)
        self.slots = _tensor(slots[0] if len(slots) == 1 else np.concatenate(slots), cache.device)

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
        self.shape = (len(batch.segments), max(batch.lengths), max(batch.num_keys))
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self.key_slots = self._build_key_slots()
        self.pad_rows: Tensor | None = None
        self.unpad_rows: Tensor | None = None
        if len(batch.segments) * max(batch.lengths) != batch.num_rows:
            self._build_padding(max(batch.lengths))

    @property
    def _is_single_row(self) -> bool:
        """Whether there is one row, and nothing staged that it could not see."""
        return self._batch.num_rows == 1 and self._batch.segments[0].sequence.num_staged == 1

    def _build_key_slots(self) -> Tensor:
        batch, (num_segments, _, num_keys) = self._batch, self.shape
        rows = np.empty((num_segments, num_keys), dtype=np.int64)
        for row, segment, count in zip(rows, batch.segments, batch.num_keys, strict=True):
            slots = batch.cache.slots(segment.sequence, 0, count)
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
        for index, segment in enumerate(self._batch.segments):
            sequence, length = segment.sequence, self._batch.lengths[index]
            num_cached, num_staged = sequence.num_cached, sequence.num_staged
            first = num_staged - length
            mask = allowed[index, :length, : num_cached + num_staged]
            mask[:, :num_cached] = True
            _mark_ancestors(mask[:, num_cached:], sequence.parents, first)
            if window is not None:
                depths = np.asarray(sequence.depths)
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
