"""One interface for every causal language model, target and draft alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foretoken.core.verdict import Exactness
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE, KVCache, LayerShape


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What one pass gives back.

    Args:
        logits: One row per row asked for, [rows, V], in the model's dtype.
        hidden: For each layer asked for, the states of all rows after it, [R, hidden].
    """

    logits: Tensor
    hidden: dict[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about a loaded model that the engine plans with.

    Args:
        name: Path or hub id it was loaded from.
        vocab_size: V, columns of the logits.
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
    """

    name: str
    vocab_size: int
    num_layers: int
    context_limit: int
    eos_ids: frozenset[int]
    num_parameters: int
    dtype: torch.dtype
    device: torch.device
    kv_layers: tuple[LayerShape, ...]
    exactness: Exactness = Exactness.NUMERICAL
    inexact_because: str = ""

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


class LanguageModel:
    """A causal language model that scores ragged batches of token trees.

    Args:
        info: What is known of it.
        forward_pass: How a pass is computed.
    """

    def __init__(self, info: ModelInfo, forward_pass: ForwardPass) -> None:
        self.info = info
        self._forward_pass = forward_pass

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
        """Run one pass over all rows of a batch.

        Args:
            batch: Its keys and values are written into its cache.
            rows: Rows of the flat batch whose logits are wanted, in the order wanted.
            hidden_layers: Layers whose output states are wanted; 0 is the embedding.
        """
        return self._forward_pass.forward(batch, rows, hidden_layers)
