"""A Llama whose layers are run in loops, as a module of transformers.

Every layer that runs is a module with its own place in the key-value cache, so that whatever works
on a Llama's layers works here. The layers of later loops have no parameters of their own: their
linear layers and norms are the very modules of the first loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from foretoken.models.looped.config import LoopedLlamaConfig
from foretoken.models.loops import LoopShape


class LoopedLayers(nn.ModuleList):
    """All layers that run, in their order; a checkpoint has those alone that own their weights.

    A layer that owns its weights is named by its place among such layers, as in "2"; one that
    shares them has the name of their owner and its loop, as in "2_loop1".

    Args:
        layers: Llama's, one for each that runs; those of later loops give up their parameters.
        shape: Which of them share.
    """

    def __init__(self, layers: nn.ModuleList, shape: LoopShape) -> None:
        super().__init__()
        self._owner_of: dict[str, str] = {}
        for index, layer in enumerate(layers):
            name = str(shape.stored_of(index))
            if name not in self._modules:
                self.add_module(name, layer)
                continue
            _share(layer, self._modules[name])
            loop = (index - shape.prelude) // shape.group
            self._owner_of[f"{name}_loop{loop}"] = name
            self.add_module(f"{name}_loop{loop}", layer)

    def __getitem__(self, index: int | slice) -> Any:
        """Return the layer, or a list of the layers, at a place in the order that they run."""
        layers = list(self)
        return nn.ModuleList(layers[index]) if isinstance(index, slice) else layers[index]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors of the layers that own them."""
        owners = {name: it for name, it in self.named_children() if name not in self._owner_of}
        return nn.ModuleDict(owners).state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Find the owners' tensors for the others too, as torch asks every layer for its own."""
        for name, owner in self._owner_of.items():
            start = f"{prefix}{owner}."
            for key in [key for key in state_dict if key.startswith(start)]:
                state_dict[f"{prefix}{name}.{key.removeprefix(start)}"] = state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoopedLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]  # it has no types
    """A Llama with a group of layers that runs several times; see `LoopedLlamaConfig`.

    Args:
        config: How many layers there are, and how often the group runs.
    """

    config_class = LoopedLlamaConfig
    config: LoopedLlamaConfig

    def __init__(self, config: LoopedLlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = LoopedLayers(self.model.layers, config.loop_shape)

    def exit_states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Return what the head reads after each loop, [G, B, T, D]: the states behind the norm.

        Those of the last loop have been through the coda too, the others have not.

        Args:
            input_ids: [B, T].
            inputs: Further arguments of `forward`.
        """
        shape = self.config.loop_shape
        output = self.model(input_ids, output_hidden_states=True, use_cache=False, **inputs)
        early = [
            self.model.norm(output.hidden_states[shape.layers_of_loop(loop).stop])
            for loop in range(shape.loops - 1)
        ]
        return torch.stack([*early, output.last_hidden_state])

    def exit_logits(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Return the head's logits after each loop, [G, B, T, V]; the last are the model's own.

        Args:
            input_ids: [B, T].
            inputs: Further arguments of `forward`.
        """
        # One depth after the other, as in `forward`: rows that share a product may change bits.
        return torch.stack([self.lm_head(it) for it in self.exit_states(input_ids, **inputs)])


def _share(layer: nn.Module, owner: nn.Module) -> None:
    """Give a layer the parts of another, but for the attention, which knows its place."""
    parts = dict(owner.named_children())
    attention, shared_attention = layer.self_attn, parts.pop("self_attn")
    for name, part in parts.items():
        setattr(layer, name, part)
    for name, part in shared_attention.named_children():
        setattr(attention, name, part)


__all__ = ["LoopedLayers", "LoopedLlamaForCausalLM"]
