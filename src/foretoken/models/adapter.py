"""One interface for every causal language model, target and draft alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from foretoken.core.verdict import Exactness
from foretoken.errors import UnsupportedModelError
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE, KVCache
from foretoken.models.growing import GrownTree, PlantedTree
from foretoken.models.in_flight import InFlightBatch, TickOutput, TickPass
from foretoken.models.loops import LoopShape
from foretoken.models.partial import LayerSet, RemainingRows
from foretoken.models.pools import LayerShape
from foretoken.models.state_rows import put_rows


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What one pass gives back.

    Args:
        logits: One row per row asked for, [rows, V], in the model's dtype.
        hidden: For each layer asked for, the states of all rows after it, [R, hidden].
    """

    logits: Tensor
    hidden: dict[int, Tensor]

    def wait(self) -> None:
        """Return when it has been computed; on CPU it has."""
        if self.logits.device.type != "cpu":
            torch.accelerator.synchronize(self.logits.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about a loaded model that the engine plans with.

    Args:
        name: Path or hub id it was loaded from.
        vocab_size: V, columns of the logits.
        hidden_size: D, columns of the states between layers.
        num_layers: Attention layers.
        context_limit: Positions that the model can address.
        eos_ids: Token ids that end a sequence.
        num_parameters: Distinct parameters.
        dtype: Of weights and cache.
        device: Where it runs.
        kv_layers: What each attention layer stores per position.
        exactness: Bitwise if the bits of a row's logits depend on its own past alone, whatever
            shares the pass and however the past was fed; else numerical.
        inexact_because: Which layer or operation stands against bitwise, where that is known.
        loops: How its layers are shared; None where each has weights of its own. `num_layers` and
            `kv_layers` count a layer as often as it runs.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_limit: int
    eos_ids: frozenset[int]
    num_parameters: int
    dtype: torch.dtype
    device: torch.device
    kv_layers: tuple[LayerShape, ...]
    exactness: Exactness = Exactness.NUMERICAL
    inexact_because: str = ""
    loops: LoopShape | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached position takes over all layers."""
        return sum(shape.num_values for shape in self.kv_layers) * self.dtype.itemsize


class ForwardPass(Protocol):
    """Computes a pass: through transformers' modules, or compiled for the architecture."""

    def forward(
        self, batch: RaggedBatch, rows: Sequence[int], hidden_layers: Sequence[int]
    ) -> ForwardOutput:
        """Run all rows; arguments and result as for `LanguageModel.forward`."""
        ...

    def embed(self, batch: RaggedBatch) -> Tensor:
        """Return what the first layer takes of all rows of a batch, [R, D]."""
        ...

    def with_layers(self, layers: LayerSet, *, own_cache: bool) -> PartialPass:
        """Return what runs some of the layers with the same weights.

        Args:
            layers: Those that run.
            own_cache: Whether it is given caches of these layers only, or of the whole model.

        Raises:
            UnsupportedModelError: The architecture's layers cannot be left out like this.
        """
        ...


class PartialPass(Protocol):
    """Computes a pass through some of a model's layers, embedding and head included."""

    def forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        hidden_layers: Sequence[int],
        states: Tensor | None = None,
    ) -> ForwardOutput:
        """Run all rows; otherwise as for `LanguageModel.forward`.

        Args:
            batch: As there.
            rows: As there.
            hidden_layers: As there; layers keep their numbers.
            states: What the first layer that runs takes instead of the embedding, [R, D].
        """
        ...


@runtime_checkable
class TreeGrower(Protocol):
    """A forward pass that can also grow draft trees on its own, all levels in one call."""

    def grow(
        self,
        cache: KVCache,
        trees: Sequence[PlantedTree],
        *,
        num_columns: int,
        race_temperature: float,
    ) -> list[GrownTree] | None:
        """Grow draft trees best first, a pass per level for all of them.

        The nodes that were run are staged afterwards. None, and nothing done, where it would take
        longer than to run level by level.

        Args:
            cache: Of their sequences.
            trees: At least one.
            num_columns: How many tokens the target has; others are not drafted.
            race_temperature: As for `core.ranking.rank_row`.

        Raises:
            CapacityError: The cache has no room; nothing is staged.
        """
        ...


class LanguageModel:
    """A causal language model that scores ragged batches of token trees.

    Args:
        info: What is known of it.
        forward_pass: How a pass is computed.
    """

    def __init__(self, info: ModelInfo, forward_pass: ForwardPass) -> None:
        self.info = info
        self._forward_pass = forward_pass
        self._parts: dict[LayerSet, PartialPass] = {}  # what passes that go on with states run
        self._ticks: TickPass | None = None

    @property
    def forward_pass(self) -> ForwardPass:
        """How a pass is computed."""
        return self._forward_pass

    @property
    def tree_grower(self) -> TreeGrower | None:
        """What grows trees as passes of this model would, if there is something."""
        for name in ("batch", "forward"):
            if getattr(type(self), name) is not getattr(LanguageModel, name):
                return None
        return self._forward_pass if isinstance(self._forward_pass, TreeGrower) else None

    def with_layers(self, layers: LayerSet) -> LayerView:
        """Return a view that shares all weights and runs some of the layers.

        Embedding, final norm and head are the model's own. With all layers, logits are the
        model's own bit for bit.

        Args:
            layers: At least one attention among them.

        Raises:
            ValueError: The model has no such layers.
            UnsupportedModelError: The architecture's layers cannot be left out like this.
        """
        num_layers = self.info.num_layers
        if not layers.attention or layers.stop > num_layers:
            raise ValueError(
                f"a view runs at least one attention of the layers 0 to {num_layers - 1}; "
                f"got {layers}"
            )
        kv_layers = tuple(self.info.kv_layers[layer] for layer in layers.attention)
        info = replace(self.info, num_layers=len(kv_layers), kv_layers=kv_layers, loops=None)
        return LayerView(info, self._forward_pass.with_layers(layers, own_cache=True), layers)

    def new_cache(self, num_tokens: int) -> KVCache:
        """Return an empty cache with room for at least `num_tokens` positions in all."""
        return KVCache(
            self.info.kv_layers,
            -(-num_tokens // BLOCK_SIZE),
            dtype=self.info.dtype,
            device=self.info.device,
        )

    def batch(self, cache: KVCache, segments: Sequence[Segment]) -> RaggedBatch:
        """Stage new nodes in the cache and lay them out for `forward`.

        Raises:
            CapacityError: The cache has no room.
        """
        return RaggedBatch(cache, segments)

    def forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        *,
        hidden_layers: Sequence[int] = (),
    ) -> ForwardOutput:
        """Run one pass over all rows of a batch; layers whose result is known are not run again.

        Args:
            batch: Its keys and values are written into its cache.
            rows: Rows of the flat batch whose logits are wanted, in the order wanted.
            hidden_layers: Layers whose output states are wanted; 0 is the embedding. As in
                transformers, those after the whole model's last layer are normalized.
        """
        if any(segment.states is not None for segment in batch.segments):
            remaining = RemainingRows(batch)
            # States of layers before that are not known for all rows.
            if min(hidden_layers, default=remaining.num_layers) >= remaining.num_layers:
                return self._resume(batch, remaining, rows, hidden_layers)
        return self._forward_pass.forward(batch, rows, hidden_layers)

    def tick(self, batch: InFlightBatch, states: Tensor | None, rows: Sequence[int]) -> TickOutput:
        """Run one loop of the shared layers for all rows, each the loop at its own depth.

        Rows at depth 0 enter through embedding and prelude. Those that have all loops behind
        them afterwards run the coda, and their logits are the model's own; earlier ones are what
        final norm and head make of the state so far. Tick by tick, a token gets the bits of an
        ordinary pass wherever the model's exactness is bitwise.

        Args:
            batch: Its keys and values are written into its cache. A row's ancestors in flight
                are in the batch, or have been this deep before.
            states: What the last tick gave for each row, [R, D]; rows at depth 0 are ignored.
                None where all rows are.
            rows: Rows of the flat batch whose logits are wanted, in the order wanted.

        Raises:
            UnsupportedModelError: The model's layers have weights of their own each.
            ValueError: A depth is beyond the last loop, or states are missing.
        """
        if self.info.loops is None:
            raise UnsupportedModelError(
                f"{self.info.name}: no layers share their weights, so rows at different "
                "depths have no pass in common",
                hint="use a drafter that does not draft inside the target's pass",
            )
        if self._ticks is None:
            self._ticks = TickPass(
                self.info.loops,
                lambda layers: self._part(LayerSet.of(layers)),
                self._forward_pass.embed,
            )
        return self._ticks.run(batch, states, rows)

    def _resume(
        self,
        batch: RaggedBatch,
        remaining: RemainingRows,
        rows: Sequence[int],
        hidden_layers: Sequence[int],
    ) -> ForwardOutput:
        """Run the first layers for the remaining rows, then the others for all rows."""
        num_layers = remaining.num_layers
        states = remaining.known_states(batch)
        if remaining.num_rows:
            first = self._part(LayerSet.all(num_layers))
            hidden = first.forward(remaining, [], [num_layers]).hidden[num_layers]
            put_rows(states, remaining.rows, hidden)
        last = self._part(LayerSet.of(range(num_layers, self.info.num_layers)))
        return last.forward(batch, rows, hidden_layers, states)

    def _part(self, layers: LayerSet) -> PartialPass:
        if layers not in self._parts:
            self._parts[layers] = self._forward_pass.with_layers(layers, own_cache=False)
        return self._parts[layers]


class LayerView(LanguageModel):
    """Some layers of a model, as a model of its own with its own cache; made by `with_layers`.

    Args:
        info: The model's, with the layers that have attention here.
        partial_pass: How a pass is computed.
        layers: What runs, in the model's numbers.
    """

    def __init__(self, info: ModelInfo, partial_pass: PartialPass, layers: LayerSet) -> None:
        self.info = info
        self.layers = layers
        self._partial_pass = partial_pass

    @property
    def tree_grower(self) -> TreeGrower | None:
        """What grows trees as passes of this view would, if there is something."""
        return self._partial_pass if isinstance(self._partial_pass, TreeGrower) else None

    def with_layers(self, layers: LayerSet) -> LayerView:
        """Refuse: views are made from the whole model.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"views are made from the whole model, not from its view {self.layers}")

    def forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        *,
        hidden_layers: Sequence[int] = (),
        states: Tensor | None = None,
    ) -> ForwardOutput:
        """Run one pass over all rows of a batch; hidden layers keep the whole model's numbers.

        Args:
            batch: As for the whole model.
            rows: Likewise.
            hidden_layers: Likewise.
            states: What the first layer that runs takes instead of the embedding, [R, D].
        """
        return self._partial_pass.forward(batch, rows, hidden_layers, states)
