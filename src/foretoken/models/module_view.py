"""Some layers of a transformers module, run in place by a shallow copy that shares all weights.

The copy's list of layers is as long as the original's, with stand-ins for what is left out. So
models that ask their configuration about the layer at a place in the list still get the right
answer, and no configuration is changed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foretoken.errors import UnsupportedModelError
from foretoken.models.adapter import ForwardOutput
from foretoken.models.attention import (
    BATCH_KEYWORD,
    AttentionBackend,
    AttentionCall,
    attention_for,
)
from foretoken.models.batch import RaggedBatch
from foretoken.models.partial import LayerSet

_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
LAYERS_HINT = "leave out whole layers, or use a drafter that does not run the target's layers"


class ModuleView:
    """Runs some layers of a transformers module.

    Args:
        module: A causal language model, loaded with `attn_implementation="foretoken"`.
        name: Path or hub id, for messages.
        layers: What runs.
        own_cache: Whether caches have these layers only, or all of the model.

    Raises:
        UnsupportedModelError: The layers are no list, or their parts cannot be told apart.
    """

    def __init__(
        self, module: PreTrainedModel, name: str, layers: LayerSet, *, own_cache: bool
    ) -> None:
        self._name = name
        path = _path_of_layers(module, name)
        originals: Any = module.get_submodule(".".join(path))
        stand_ins = [
            _StandIn(_with_parts(layer, index, layers, name), index, index in _running(layers))
            for index, layer in enumerate(originals)
        ]
        self._module = _copy_down(module, path, nn.ModuleList(stand_ins))
        self._stack: Any = self._module.get_submodule(".".join(path[:-1]))
        for hooks in _HOOKS:  # its own, not the original's
            setattr(self._stack, hooks, OrderedDict(getattr(self._stack, hooks)))
        self._stack.register_forward_hook(_note_last_states, with_kwargs=True)
        self._num_layers = len(originals)
        self._first = min(_running(layers), default=self._num_layers)
        indices = layers.cache_indices(own_cache=own_cache)
        self._cache_index = dict(zip(layers.attention, indices, strict=True))

    @torch.inference_mode()
    def check(self, attention: AttentionBackend) -> None:
        """Run two rows, to see that what is left out is not missed.

        Args:
            attention: Its output does not matter.

        Raises:
            UnsupportedModelError: The pass fails.
        """
        call = _ViewCall(attention, self._cache_index, (), self._num_layers)
        token_ids = torch.zeros(1, 2, dtype=torch.int64, device=self._module.device)
        inputs = {"input_ids": token_ids, "position_ids": torch.arange(2).to(token_ids)[None]}
        try:
            self._stack(**inputs, use_cache=False, **{BATCH_KEYWORD: call})
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{self._name}: parts of its layers cannot be left out: "
                f"{type(error).__name__}: {' '.join(str(error).split())}",
                hint=LAYERS_HINT,
            ) from error

    @torch.inference_mode()
    def forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        hidden_layers: Sequence[int],
        states: Tensor | None = None,
    ) -> ForwardOutput:
        """Run one pass; logits and hidden states have the module's dtype."""
        call = _ViewCall(attention_for(batch), self._cache_index, hidden_layers, self._num_layers)
        if states is not None:
            call.initial = {self._first: states.to(self._module.dtype).unsqueeze(0)}
        inputs: dict[str, Any] = {
            "input_ids": batch.token_ids.unsqueeze(0),
            "position_ids": batch.positions.unsqueeze(0),
            "use_cache": False,
            BATCH_KEYWORD: call,
        }
        if not len(rows):  # then the head has nothing to do
            last: Tensor = self._stack(**inputs).last_hidden_state
            return ForwardOutput(logits=last.new_empty(0, 0), hidden=call.hidden)
        kept = torch.tensor(rows, dtype=torch.int64, device=self._module.device)
        output = self._module(**inputs, logits_to_keep=kept)
        return ForwardOutput(logits=output.logits[0], hidden=call.hidden)


class _ViewCall(AttentionBackend):
    """What travels through a view's pass: its attention, and states on their way in and out.

    Args:
        attention: Of the batch.
        cache_index: Layer to its place in the cache.
        wanted: Layers whose states are wanted.
        num_layers: Of the whole model.
    """

    def __init__(
        self,
        attention: AttentionBackend,
        cache_index: dict[int, int],
        wanted: Sequence[int],
        num_layers: int,
    ) -> None:
        self.initial: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}
        self._attention = attention
        self._cache_index = cache_index
        self._wanted = frozenset(wanted)
        self._num_layers = num_layers

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute a layer's attention with its own place in the cache."""
        return self._attention.attend(replace(call, layer=self._cache_index[call.layer]))

    def enter(self, layer: int, states: Tensor) -> Tensor:
        """Return what a layer is to take as its input; note it where it is wanted."""
        states = self.initial.get(layer, states)
        if layer in self._wanted:
            self.hidden[layer] = states[0]
        return states

    def leave(self, states: Tensor) -> None:
        """Note what comes after the last layer, normalized."""
        if self._num_layers in self._wanted:
            self.hidden[self._num_layers] = states[0]


class _StandIn(nn.Module):
    """Stands in for a layer: runs it or passes its input on, and tells the pass where it is.

    Args:
        layer: The layer.
        index: Its place.
        runs: Whether anything of it runs.
    """

    def __init__(self, layer: nn.Module, index: int, runs: bool) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.runs = runs

    def __getattr__(self, name: str) -> Any:
        """Return the layer's attribute: some models read its kind before they call it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the states after the layer, [1, R, D]."""
        call: _ViewCall = kwargs[BATCH_KEYWORD]
        hidden_states = call.enter(self.index, hidden_states)
        if not self.runs:
            return hidden_states
        states: Tensor = self.layer(hidden_states, *args, **kwargs)
        if not isinstance(states, Tensor):
            raise UnsupportedModelError(
                f"a layer of kind {type(self.layer).__name__} gives {type(states).__name__} and "
                "not its states alone, so layers cannot be left out",
                hint=LAYERS_HINT,
            )
        return states


class _NoAttention(nn.Module):
    """Adds nothing to the residual stream in place of an attention."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zeros, and no attention weights."""
        return torch.zeros_like(args[0] if args else kwargs["hidden_states"]), None


class _NoMlp(nn.Module):
    """Adds nothing to the residual stream in place of a feed-forward part."""

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden_states)


def _running(layers: LayerSet) -> frozenset[int]:
    return frozenset((*layers.attention, *layers.mlp))


def _note_last_states(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
    kwargs[BATCH_KEYWORD].leave(output.last_hidden_state)


def _path_of_layers(module: PreTrainedModel, name: str) -> list[str]:
    """Return the names that lead to the list of decoder layers."""
    num_layers = module.config.get_text_config(decoder=True).num_hidden_layers
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return str(path).split(".")
    raise UnsupportedModelError(
        f"{name}: {module.config.model_type!r} keeps its {num_layers} layers in no list, so none "
        "can be left out",
        hint=LAYERS_HINT,
    )


def _copy_down(module: nn.Module, path: Sequence[str], replacement: nn.Module) -> Any:
    """Return a copy of a module in which the submodule at a path is another; weights are shared."""
    if not path:
        return replacement
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._modules[path[0]] = _copy_down(module.get_submodule(path[0]), path[1:], replacement)
    return clone


def _with_parts(layer: nn.Module, index: int, layers: LayerSet, name: str) -> nn.Module:
    """Return the layer, or a copy in which one of its two parts adds nothing."""
    has_attention, has_mlp = index in layers.attention, index in layers.mlp
    if has_attention == has_mlp:
        return layer
    names = [key for key, child in layer.named_children() if hasattr(child, "layer_idx")]
    mlp_names = [key for key, _ in layer.named_children() if key in _MLP_NAMES]
    if len(names) != 1 or len(mlp_names) != 1:
        raise UnsupportedModelError(
            f"{name}: layers of kind {type(layer).__name__} do not keep attention and feed-forward "
            "part apart, so only whole layers can be left out",
            hint=LAYERS_HINT,
        )
    if has_mlp:
        return _copy_down(layer, names, _NoAttention())  # type: ignore[no-any-return]
    return _copy_down(layer, mlp_names, _NoMlp())  # type: ignore[no-any-return]
