"""A forward pass through the modules of transformers, for every architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from foretoken.errors import UnsupportedModelError
from foretoken.models.adapter import ForwardOutput, PartialPass
from foretoken.models.attention import (
    BATCH_KEYWORD,
    DECODER_HINT,
    AttentionBackend,
    AttentionCall,
    attention_for,
)
from foretoken.models.batch import RaggedBatch
from foretoken.models.module_view import ModuleView
from foretoken.models.partial import LayerSet
from foretoken.models.pools import LayerShape


class ModulePass:
    """Runs a transformers module with this package's attention.

    Args:
        module: A causal language model, loaded with `attn_implementation="foretoken"`.
        name: Path or hub id, for messages.

    Raises:
        UnsupportedModelError: A layer does not call the registered attention exactly once.

    Attributes:
        kv_layers: What each attention layer stores per position.
        vocab_size: Columns of the logits.
    """

    def __init__(self, module: PreTrainedModel, name: str) -> None:
        self._module = module.eval().requires_grad_(False)
        self._name = name
        self._has_parts = False  # whether parts of layers are known to be separable
        self.kv_layers, self.vocab_size = _probe(module, name)

    @property
    def module(self) -> PreTrainedModel:
        """The module that it runs."""
        return self._module

    def with_layers(self, layers: LayerSet, *, own_cache: bool) -> PartialPass:
        """Return what runs some of the layers; arguments and errors as for `ForwardPass`."""
        if not layers.is_whole_layers and not self._has_parts:
            everything = tuple(range(len(self.kv_layers)))
            for parts in (LayerSet(everything, ()), LayerSet((), everything)):
                ModuleView(self._module, self._name, parts, own_cache=True).check(ShapeProbe())
            self._has_parts = True
        return ModuleView(self._module, self._name, layers, own_cache=own_cache)

    @torch.inference_mode()
    def embed(self, batch: RaggedBatch) -> Tensor:
        """Return the embedding of all rows of a batch, [R, D]."""
        states: Tensor = self._module.get_input_embeddings()(batch.token_ids)
        return states

    @torch.inference_mode()
    def forward(
        self, batch: RaggedBatch, rows: Sequence[int], hidden_layers: Sequence[int]
    ) -> ForwardOutput:
        """Run one pass; logits and hidden states have the module's dtype."""
        output = self._module(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            output_hidden_states=bool(hidden_layers),
            logits_to_keep=self._rows_to_keep(batch, rows),
            **{BATCH_KEYWORD: attention_for(batch)},
        )
        return ForwardOutput(
            logits=output.logits[0],
            hidden={layer: output.hidden_states[layer][0] for layer in hidden_layers},
        )

    def _rows_to_keep(self, batch: RaggedBatch, rows: Sequence[int]) -> Tensor | int:
        """Return what transformers calls logits_to_keep; 0 means all rows and costs nothing."""
        if rows == range(batch.num_rows):
            return 0
        return torch.tensor(rows, dtype=torch.int64, device=self._module.device)


class ShapeProbe(AttentionBackend):
    """Records what each layer asks for; its output is never used."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: list[LayerShape] = []
        self.windows: list[int | None] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """Return zeros."""
        self.layers.append(call.layer)
        self.shapes.append(LayerShape(call.key.shape[1], call.key.shape[2], call.value.shape[2]))
        self.windows.append(call.window)
        return call.query.new_zeros(*call.query.shape[:2], call.value.shape[2])


@torch.inference_mode()
def _probe(module: PreTrainedModel, name: str) -> tuple[tuple[LayerShape, ...], int]:
    """Run two rows to see what every layer stores, and that every layer asks for attention."""
    probe = ShapeProbe()
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
