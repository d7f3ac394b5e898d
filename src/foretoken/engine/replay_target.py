"""What stands for the target in a replay: nothing, or its own reading of every recording.

Drafters may ask for the target's states at tokens that stand, or for the keys and values that it
has cached of them. Both depend on the text alone, and a replay knows the text: the target reads it
in large chunks, a little ahead of the steps, for a fraction of what decoding it would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.errors import UnsupportedModelError
from foretoken.models.adapter import ForwardOutput, LanguageModel, LayerView, ModelInfo
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.partial import LayerSet, copy_slots
from foretoken.models.pools import LayerShape
from foretoken.planner.base import Order, PassingPlanner, Planner, Share

CHUNK_ROWS = 512  # tokens that are read at a time


@dataclass(frozen=True, slots=True)
class Reader:
    """How the target reads recordings.

    Args:
        target: The one that was recorded.
        layers: Whose states are wanted.
        keeps_past: Whether the replay's cache gets the target's keys and values.
    """

    target: LanguageModel
    layers: tuple[int, ...]
    keeps_past: bool


class RecordedTarget(LanguageModel):
    """Stands for the target: keeps the books of a cache, and computes nothing of drafts.

    Rows of tokens that stand get the states that the target has there; those of other nodes get
    states that mean nothing, as nobody is told of them. Logits are one column of zeros.

    Args:
        info: Of the target.
        reader: How recordings are read; None if nobody asks for more than tokens.

    Attributes:
        texts: Prompt and output of each request, by its id.
        request_ids: Of the requests of this step, in the order of the batch's segments.
    """

    def __init__(self, info: ModelInfo, reader: Reader | None) -> None:
        self.info = info if reader and reader.keeps_past else _without_cache(info)
        self.texts: dict[str, Sequence[int]] = {}
        self.request_ids: list[str] = []
        self._reader = reader
        self._readings: dict[str, _Reading] = {}

    def forward(
        self, batch: RaggedBatch, rows: Sequence[int], *, hidden_layers: Sequence[int] = ()
    ) -> ForwardOutput:
        """Return zeros for logits, and for hidden states what the target has at these positions."""
        hidden: Mapping[int, Tensor] = {}
        if self._reader is not None:
            parts = [self._read(self._reader, batch, place) for place in range(len(batch.segments))]
            hidden = {layer: torch.cat([part[layer] for part in parts]) for layer in hidden_layers}
        return ForwardOutput(logits=torch.zeros(len(rows), 1), hidden=dict(hidden))

    def with_layers(self, layers: LayerSet) -> LayerView:  # noqa: ARG002 - there are none
        """Refuse: drafters run layers of the real target.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            "a replay has no target whose layers could run",
            hint="build the drafter on the target that was recorded",
        )

    def forget(self, request_id: str) -> None:
        """Drop what was read for a request; if it begins anew, so does the reading."""
        self._readings.pop(request_id, None)

    def _read(self, reader: Reader, batch: RaggedBatch, place: int) -> dict[int, Tensor]:
        """Return the states of a segment's rows; put keys and values into the batch's cache."""
        request_id = self.request_ids[place]
        reading = self._readings.get(request_id)
        if reading is None:
            reading = self._readings[request_id] = _Reading(reader, self.texts[request_id])
        rows = slice(batch.starts[place], batch.starts[place + 1])
        positions = batch.layout.positions[rows]
        states = reading.states(positions)
        if reader.keeps_past:
            reading.copy_past(positions, batch, batch.layout.new_slots[rows])
        return states


class Attendance(PassingPlanner):
    """Leaves every decision to another planner and tells a recorded target who takes part.

    Args:
        planner: Who decides.
        target: Who is told.
    """

    def __init__(self, planner: Planner, target: RecordedTarget) -> None:
        super().__init__(planner)
        self._target = target

    def order(self, shares: Sequence[Share]) -> list[Order]:
        """Note who takes part in the step that begins."""
        self._target.request_ids = [share.request_id for share in shares]
        return super().order(shares)

    def forget(self, request_id: str) -> None:
        """Pass it on to both."""
        self._target.forget(request_id)
        super().forget(request_id)


class _Reading:
    """One text, read by the target as far as it was asked for, and up to a chunk further.

    States are kept from the first position of the last question on: a request does not go back.

    Args:
        reader: How.
        token_ids: The text.
    """

    def __init__(self, reader: Reader, token_ids: Sequence[int]) -> None:
        self._reader = reader
        self._token_ids = token_ids
        self._cache = reader.target.new_cache(len(token_ids))
        self._sequence = self._cache.open()
        self._first = 0  # position of the first state that is kept
        self._states: dict[int, Tensor] = {}

    def states(self, positions: NDArray[np.int64]) -> dict[int, Tensor]:
        """Return states at positions, [n, D] by layer; beyond the text those of its last token."""
        last = min(int(positions.max()), len(self._token_ids) - 1)
        while self._sequence.num_cached <= last:
            self._drop_before(int(positions.min()))
            self._read_chunk()
        rows = np.minimum(positions, last) - self._first
        return {layer: states[rows] for layer, states in self._states.items()}

    def copy_past(
        self, positions: NDArray[np.int64], batch: RaggedBatch, slots: NDArray[np.int64]
    ) -> None:
        """Copy the keys and values at positions that have been read to slots of a batch's cache."""
        num_read, cache = self._sequence.num_cached, self._cache
        is_known = positions < num_read
        copy_slots(
            list(zip(cache.keys, cache.values, strict=True)),
            cache.slots(self._sequence, 0, num_read)[positions[is_known]],
            list(zip(batch.cache.keys, batch.cache.values, strict=True)),
            slots[is_known],
        )

    def _read_chunk(self) -> None:
        target, sequence, layers = self._reader.target, self._sequence, self._reader.layers
        chunk = self._token_ids[sequence.num_cached : sequence.num_cached + CHUNK_ROWS]
        with self._cache.speculate([sequence]):
            segment = Segment(sequence, chunk, range(-1, len(chunk) - 1))
            batch = target.batch(self._cache, [segment])
            hidden = target.forward(batch, [], hidden_layers=layers).hidden
            self._cache.commit([(sequence, range(len(chunk)))])
        self._states = {
            layer: torch.cat([self._states[layer], hidden[layer]])
            if layer in self._states
            else hidden[layer]
            for layer in layers
        }

    def _drop_before(self, position: int) -> None:
        num_dropped = min(position, self._sequence.num_cached) - self._first
        self._first += num_dropped
        self._states = {layer: states[num_dropped:] for layer, states in self._states.items()}


def _without_cache(info: ModelInfo) -> ModelInfo:
    """Return facts of a stand-in whose cache holds next to nothing."""
    return replace(
        info,
        kv_layers=(LayerShape(1, 1, 1),),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


__all__ = ["Attendance", "Reader", "RecordedTarget"]
