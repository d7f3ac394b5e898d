"""Grafts as they are served: a draft model, and what fills its cache from the target's states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import KVCache
from foretoken.models.heads.fusion import serve_fusion
from foretoken.models.partial import LayerSet
from foretoken.models.state_rows import join_columns

NO_TOKEN = 0  # of rows that read states; any would do


class ServedGraft:
    """A draft model whose keys and values can be made from the target's states.

    Args:
        model: Its layers, which also run over tokens, as those of any draft model.
        fc: From the target's states before its layers, joined, to what these layers read, joined.
        target_layers: Layers of the target whose states these are: `layer` is the output of so
            many, 0 the embedding.

    Attributes:
        model: As given.
        target_layers: As given.
    """

    def __init__(self, model: LanguageModel, fc: Tensor, target_layers: Sequence[int]) -> None:
        self.model = model
        self.target_layers = tuple(target_layers)
        self._fuse = serve_fusion(fc.to(model.info.device, model.info.dtype), None)
        self._attentions = [
            model.forward_pass.with_layers(LayerSet((layer,), ()), own_cache=False)
            for layer in range(model.info.num_layers)
        ]

    @torch.inference_mode()
    def fill(
        self, cache: KVCache, segments: Sequence[Segment], hidden: Mapping[int, Tensor]
    ) -> None:
        """Cache keys and values of positions that the target has run.

        Args:
            cache: Of the model.
            segments: The positions that follow those cached, as chains; of any tokens.
            hidden: The target's states there by layer, [R, D of the target] each.

        Raises:
            CapacityError: The cache has no room.
        """
        info = self.model.info
        fused = self._fuse(join_columns([hidden[layer] for layer in self.target_layers]))
        read = fused.to(info.dtype).chunk(info.num_layers, dim=-1)
        with cache.speculate([segment.sequence for segment in segments]):
            batch = self.model.batch(cache, segments)
            for attention, it in zip(self._attentions, read, strict=True):
                attention.forward(batch, [], [], it)
            cache.commit([(it.sequence, range(len(it.token_ids))) for it in segments])


__all__ = ["NO_TOKEN", "ServedGraft"]
