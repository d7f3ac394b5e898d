"""One interface for every causal language model of transformers, target and draft alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from foretoken.errors import UnsupportedModelError
from foretoken.models.attention import (
    BATCH_KEYWORD,
    DECODER_HINT,
    AttentionBackend,
    AttentionCall,
    ReferenceAttention,
)
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

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached position takes over all layers."""
        return sum(shape.num_values for shape in self.kv_layers) * self.dtype.itemsize


class LanguageModel:
    """A transformers model that scores ragged batches of token trees.

    Args:
        module: A causal language model, loaded with this package's attention implementation.
        name: Path or hub id, for messages.
        context_limit: Positions that the model can address.
        eos_ids: Token ids that end a sequence.

    Raises:
        UnsupportedModelError: A layer does not call the registered attention exactly once.
    """

    def __init__(
        self, module: PreTrainedModel, *, name: str, context_limit: int, eos_ids: frozenset[int]
    ) -> None:
        self._module = module.eval().requires_grad_(False)
        kv_layers, vocab_size = _probe(module, name)
        self.info = ModelInfo(
            name=name,
            vocab_size=vocab_size,
            num_layers=len(kv_layers),
            context_limit=context_limit,
            eos_ids=eos_ids,
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            dtype=module.dtype,
            device=module.device,
            kv_layers=kv_layers,
        )

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

    @torch.inference_mode()
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
        output = self._module(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            output_hidden_states=bool(hidden_layers),
            logits_to_keep=self._rows_to_keep(batch, rows),
            **{BATCH_KEYWORD: ReferenceAttention(batch)},
        )
        return ForwardOutput(
            logits=output.logits[0],
            hidden={layer: output.hidden_states[layer][0] for layer in hidden_layers},
        )

    def _rows_to_keep(self, batch: RaggedBatch, rows: Sequence[int]) -> Tensor | int:
        """Return what transformers calls logits_to_keep; 0 means all rows and costs nothing."""
        if rows == range(batch.num_rows):
            return 0
        return torch.tensor(rows, dtype=torch.int64, device=self.info.device)


class _Probe(AttentionBackend):
    """Records what each layer asks for; its output is never used."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: list[LayerShape] = []
        self.windows: list[int | None] = []

    def attend(self, call: AttentionCall) -> Tensor:
        self.layers.append(call.layer)
        self.shapes.append(LayerShape(call.key.shape[1], call.key.shape[2], call.value.shape[2]))
        self.windows.append(call.window)
        return call.query.new_zeros(*call.query.shape[:2], call.value.shape[2])


@torch.inference_mode()
def _probe(module: PreTrainedModel, name: str) -> tuple[tuple[LayerShape, ...], int]:
    """Run two rows to see what every layer stores, and that every layer asks for attention."""
    probe = _Probe()
    token_ids = torch.zeros(1, 2, dtype=torch.int64, device=module.device)
    try:
        output = module.eval()(
            input_ids=token_ids,
            position_ids=torch.arange(2, device=module.device).unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.tensor([1], device=module.device),
            **{BATCH_KEYWORD: probe},
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}", hint=error.hint) from None
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"cannot score two tokens: {type(error).__name__}: {' '.join(str(error).split())}"
        raise _unsupported(module, name, reason) from error
    config = module.config.get_text_config(decoder=True)
    if probe.layers != list(range(config.num_hidden_layers)):
        reason = (
            f"has {config.num_hidden_layers} layers, which called the registered attention in the "
            f"order {probe.layers}; each has to, once and in order"
        )
        raise _unsupported(module, name, reason)
    if output.logits.shape[1] != 1:
        raise _unsupported(module, name, "does not compute the logits of chosen rows only")
    if _has_hidden_windows(config, probe.windows):
        raise _unsupported(module, name, "does not tell its attention the sliding window")
    return tuple(probe.shapes), output.logits.shape[-1]


def _unsupported(module: PreTrainedModel, name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: {module.config.model_type!r} {reason}", hint=DECODER_HINT
    )


def _has_hidden_windows(config: PreTrainedConfig, windows: Sequence[int | None]) -> bool:
    """Whether some layer has a window that only the masks made by transformers would know."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None) is not None and None in windows
    return any(
        layer_type == "sliding_attention" and window is None
        for layer_type, window in zip(layer_types, windows, strict=False)
    )
