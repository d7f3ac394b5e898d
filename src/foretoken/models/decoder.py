"""Plain decoders (Llama, Mistral, Qwen 2 and 3) as one compiled function, straight from the files.

Going through transformers' modules costs about half a millisecond per layer and pass whatever
the layer's size; a draft model of a million parameters is nothing but that. Here a pass is one
call, weights go from the checkpoint into packed matrices without a copy in between, and every row's
arithmetic is the same however many rows share the pass. Other architectures go through
transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from foretoken.models.adapter import ForwardOutput
from foretoken.models.addresses import address_of, code_of
from foretoken.models.batch import RaggedBatch
from foretoken.models.cache import KVCache
from foretoken.models.decoder_kernels import (
    COUNTERS_PER_LAYER,
    OTHER_COUNTERS,
    Shape,
    Weights,
    run_pass,
)
from foretoken.models.growing import GrownTree, PlantedTree, Sizes, grow_whole
from foretoken.models.growth_kernels import Forest, grow_trees
from foretoken.models.kernels import padded
from foretoken.models.loops import LoopShape
from foretoken.models.partial import LayerSet
from foretoken.models.products import PANEL
from foretoken.models.state_rows import as_rows
from foretoken.models.threads import entry_point, run_together

# A second thread has to be woken for each pass, which takes longer than a small pass does.
BYTES_PER_THREAD = 24 << 20


class RotaryTable:
    """Cosines and sines of every position so far, computed as transformers does.

    Args:
        frequencies: [rotary_dim / 2] float32.
        factor: Of cosines and sines.
    """

    def __init__(self, frequencies: Tensor, factor: float) -> None:
        self._frequencies = frequencies.float()
        self._factor = factor
        self._num_positions = 0
        self._table = np.empty(0, np.float32)

    def upto(self, num_positions: int) -> np.ndarray:
        """Return the table of at least so many positions: cosines, then sines, of each; flat."""
        if num_positions > self._num_positions:
            # A power of two fills whole vectors: torch computes what is left over in another way,
            # and a position's numbers must not change when the table grows.
            self._num_positions = max(1024, 1 << num_positions.bit_length())
            angles = torch.arange(self._num_positions).float()[:, None] * self._frequencies
            both = torch.cat((angles.cos(), angles.sin()), dim=1) * self._factor
            self._table = both.view(-1).numpy()
        return self._table


def _plan(layers: LayerSet, stored_layers: Sequence[int], *, own_cache: bool) -> np.ndarray:
    """Return which parts of each layer run with which parameters and keys; see `run_pass`."""
    plan = np.zeros((len(stored_layers), 3), np.int64)
    plan[:, 0] = stored_layers
    plan[:, 1] = -1
    plan[list(layers.attention), 1] = layers.cache_indices(own_cache=own_cache)
    plan[list(layers.mlp), 2] = 1
    return plan


def _bytes_read(weights: Weights, num_layers: int) -> int:
    """Return about how much a pass reads, layers that share parameters counted each."""
    num_bytes: int = sum(array.nbytes for array in weights)
    return num_bytes * num_layers // len(weights.windows)


class CompiledDecoder:
    """A plain decoder that scores ragged batches of token trees on CPU.

    Args:
        shape: Its sizes.
        weights: Its parameters.
        rotary: Its position encoding.
        loops: Which layers share their parameters, if any do.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        rotary: RotaryTable,
        loops: LoopShape | None = None,
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._rotary = rotary
        self._stored = loops.stored_layers if loops else range(len(weights.windows))
        self._num_layers = len(self._stored)
        self._bytes = _bytes_read(weights, self._num_layers)
        self._num_counters = self._num_layers * COUNTERS_PER_LAYER + OTHER_COUNTERS
        self._plan = _plan(LayerSet.all(self._num_layers), self._stored, own_cache=True)
        self._no_hidden = (
            np.full(self._num_layers + 1, -1),
            np.empty((0, 0, shape.hidden), np.float32),
        )
        self._no_states = np.empty((0, shape.hidden), np.float32)
        self._buffers: tuple[np.ndarray, ...] = ()
        self._num_buffered = 0
        self._run_pass: Callable[..., None] | None = None  # for the types of these weights
        self._grow_trees: Callable[..., int] | None = None  # likewise
        self._pass_address = 0  # of the same code as `_run_pass`, once a tree has grown

    def with_layers(self, layers: LayerSet, *, own_cache: bool) -> CompiledDecoder:
        """Return a decoder that runs some of the layers; arguments as for `ForwardPass`."""
        view = copy.copy(self)
        view._plan = _plan(layers, self._stored, own_cache=own_cache)
        num_parts = len(layers.attention) + len(layers.mlp)
        view._bytes = self._bytes * num_parts // (2 * self._num_layers)
        view._buffers, view._num_buffered = (), 0
        return view

    def with_head_of(self, other: CompiledDecoder) -> CompiledDecoder:
        """Return a decoder with the final matrix of another one, of the same width and type."""
        clone = copy.copy(self)
        clone._shape = self._shape._replace(vocab=other._shape.vocab)
        clone._weights = self._weights._replace(head=other._weights.head)
        clone._bytes = _bytes_read(clone._weights, self._num_layers)
        clone._buffers, clone._num_buffered = (), 0
        clone._run_pass, clone._grow_trees, clone._pass_address = None, None, 0
        return clone

    def embed(self, batch: RaggedBatch) -> Tensor:
        """Return the embedding of all rows of a batch, [R, D] float32."""
        rows = self._weights.embedding.reshape(-1, self._shape.hidden)[batch.layout.token_ids]
        if rows.dtype == np.uint16:  # the upper half of a float32
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return torch.from_numpy(rows)

    def forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        hidden_layers: Sequence[int],
        states: Tensor | None = None,
    ) -> ForwardOutput:
        """Run one pass; logits and hidden states are float32."""
        vocab_size = self._shape.vocab
        num_padded = padded(vocab_size, PANEL)
        logits = np.empty((len(rows), num_padded), np.float32)
        keys, values = batch.cache.flat_pools
        hidden_index, hidden = self._room_for_hidden(hidden_layers, batch.num_rows)
        arguments = (
            self._shape,
            self._weights,
            self._plan,
            len(keys) // len(batch.cache.keys),
            batch.packed,
            self._no_states if states is None else as_rows(states),
            np.array(rows, np.int64),
            keys,
            values,
            self._rotary.upto(max(batch.num_keys)),
            self._room_for(batch.num_rows),
            logits.reshape(-1),
            hidden_index,
            hidden,
            np.zeros(self._num_counters, np.int64),
        )
        if self._run_pass is None:
            self._run_pass = entry_point(run_pass, arguments)
        run_together(self._run_pass, arguments, self._num_threads(batch.num_rows))
        return ForwardOutput(
            logits=torch.from_numpy(logits[:, :vocab_size]),
            hidden={
                layer: torch.from_numpy(hidden[index]) for index, layer in enumerate(hidden_layers)
            },
        )

    def grow(
        self,
        cache: KVCache,
        trees: Sequence[PlantedTree],
        *,
        num_columns: int,
        race_temperature: float,
    ) -> list[GrownTree] | None:
        """Grow draft trees, a pass per level for all of them; arguments as for `TreeGrower`."""
        sizes = Sizes.of(trees)
        if self._num_threads(sizes.rows) > 1:
            return None
        keys, values = cache.flat_pools
        index, no_hidden = self._no_hidden
        last = max([it.sequence.num_cached + len(it.known_ids) + it.max_depth for it in trees])
        rotary, buffers = self._rotary.upto(last), self._room_for(sizes.rows)
        model = (self._shape, self._weights, self._plan, len(keys) // len(cache.keys))
        if not self._pass_address:
            numbers, logits = np.empty(0, np.int64), np.empty(0, np.float32)
            self._pass_address = address_of(
                run_pass,
                (
                    *(*model, numbers, self._no_states, numbers, keys, values, rotary, buffers),
                    *(logits, index, no_hidden, numbers, 1),
                ),
            )

        def grow(forest: Forest) -> int:
            tables = cache.tables  # others after room was made in them
            arguments = (
                *(forest, tables.slots, tables.parents, tables.depths),
                *(min(num_columns, self._shape.vocab), race_temperature),
                *(self._pass_address, self._num_counters, *model, self._no_states),
                *(keys, values, rotary, buffers, padded(self._shape.vocab, PANEL)),
                *(index, no_hidden),
            )
            if self._grow_trees is None:
                self._grow_trees = code_of(grow_trees, arguments)
            return self._grow_trees(*arguments)

        return grow_whole(cache, trees, sizes, grow)

    def _room_for_hidden(
        self, layers: Sequence[int], num_rows: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where each layer's states go, [L + 1], and room for those wanted."""
        if not layers:
            return self._no_hidden
        index = np.full(self._num_layers + 1, -1)
        for place, layer in enumerate(layers):
            index[layer] = place
        return index, np.empty((len(layers), num_rows, self._shape.hidden), np.float32)

    def _num_threads(self, num_rows: int) -> int:
        limit = torch.get_num_threads()
        return max(1, min(limit, self._bytes * max(1, num_rows // 8) // BYTES_PER_THREAD))

    def _room_for(self, num_rows: int) -> tuple[np.ndarray, ...]:
        """Return what the parts of a layer hand on, with room for so many rows."""
        if num_rows > self._num_buffered:
            shape = self._shape
            q_size = shape.heads * shape.head_dim
            qkv_size = q_size + 2 * shape.kv_heads * shape.head_dim
            inner = padded(shape.intermediate)
            stream = padded(shape.hidden, PANEL)
            # What is multiplied has the type of the matrices; sums are float32. Padding stays 0.
            kind = self._weights.head.dtype
            self._buffers = (
                np.zeros(num_rows * stream, np.float32),
                np.zeros(num_rows * padded(qkv_size, PANEL), np.float32),
                np.zeros(num_rows * q_size + 1, kind),
                np.zeros(num_rows * stream, np.float32),
                np.zeros(num_rows * 2 * inner, np.float32),
                np.zeros(num_rows * inner, kind),
            )
            self._num_buffered = num_rows
        return self._buffers
