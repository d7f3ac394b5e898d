"""The memory of a KV cache: keys and values of every slot, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foretoken.models.layout_kernels import move_slots


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per position."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_values(self) -> int:
        """Numbers stored per position."""
        return self.num_heads * (self.key_dim + self.value_dim)


class Pools:
    """Keys and values of all layers, one tensor each per distinct layer shape.

    So a commit moves all layers of a shape at once.

    Args:
        layers: Shape of each layer, in order.
        num_slots: Positions that each layer has room for.
        dtype: Of keys and values.
        device: Where they live.

    Attributes:
        keys: Of each layer, [slots, H, D].
        values: The same.
        flat: On CPU, flat views for compiled code, bfloat16 as uint16: keys and values of the
            layers of one shape, [L, slots, H, D] each, then those of the next shape.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._device = device
        grouped: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(layers):
            grouped.setdefault(shape, []).append(index)
        self._pools: list[Tensor] = []  # [L, slots, H, D] each
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for shape, indices in grouped.items():
            prefix = (len(indices), num_slots, shape.num_heads)
            key_pool = torch.empty(*prefix, shape.key_dim, dtype=dtype, device=device)
            value_pool = torch.empty(*prefix, shape.value_dim, dtype=dtype, device=device)
            self._pools += [key_pool, value_pool]
            keys.update(zip(indices, key_pool, strict=True))
            values.update(zip(indices, value_pool, strict=True))
        self.keys = [keys[index] for index in range(len(layers))]
        self.values = [values[index] for index in range(len(layers))]
        host_pools = self._pools if device.type == "cpu" else []
        self.flat = [as_array(pool).reshape(-1) for pool in host_pools]
        # As bytes, [L, slots, bytes]: what is moved needs no type.
        self._bytes = [pool.view(torch.uint8).flatten(2).numpy() for pool in host_pools]

    def move(self, moves: np.ndarray, num_moves: int) -> None:
        """Copy from slots to slots, [2, >= num_moves]; no source comes after it as a target."""
        for array in self._bytes:
            move_slots(array, moves, num_moves)
        if not self._bytes:
            sources, targets = torch.from_numpy(moves[:, :num_moves]).to(self._device)
            for pool in self._pools:
                pool.index_copy_(1, targets, pool.index_select(1, sources))


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a CPU tensor's memory as an array; bfloat16, which numpy lacks, as uint16."""
    array: np.ndarray = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    return array
