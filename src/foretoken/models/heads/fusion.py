"""What heads make of the target's states: one product, compiled where decoders are.

Torch would compute it as well, but with threads of its own, which are in the way of the target's
next pass; see `state_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from foretoken.models.decoder import BYTES_PER_THREAD
from foretoken.models.decoder_loading import DTYPES
from foretoken.models.heads.eagle_kernels import NUM_COUNTERS, fuse_rows
from foretoken.models.kernels import pack, packed_shape, padded
from foretoken.models.pools import as_array
from foretoken.models.products import PANEL
from foretoken.models.state_rows import as_rows
from foretoken.models.threads import entry_point, run_together


class Fusion(Protocol):
    """Multiplies the target's joined states by a head's matrix."""

    def __call__(self, states: Tensor) -> Tensor:
        """Return what the head reads, [R, out]: float32, or of the matrix's type.

        Args:
            states: [R, in], of any type of numbers and at any place.
        """
        ...


def serve_fusion(
    weight: Tensor, bias: Tensor | None, norm: Tensor | None = None, epsilon: float = 0.0
) -> Fusion:
    """Return a product that is ready to serve.

    Args:
        weight: [out, in], in the type and at the place that it is to have.
        bias: [out], or None.
        norm: Weight of an RMS norm of the states, [in], or None.
        epsilon: Of that norm.
    """
    if weight.device.type == "cpu" and weight.dtype in DTYPES:
        return CompiledFusion(weight, bias, norm, epsilon)
    return TorchFusion(weight, bias, norm, epsilon)


class TorchFusion:
    """The product in torch; arguments as for `serve_fusion`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, norm: Tensor | None, epsilon: float
    ) -> None:
        self._weight, self._epsilon = weight, epsilon
        self._bias, self._norm = (
            None if vector is None else vector.to(weight.device, weight.dtype)
            for vector in (bias, norm)
        )

    def __call__(self, states: Tensor) -> Tensor:
        """Return the product, of the matrix's type."""
        states = states.to(self._weight.device, self._weight.dtype)
        if self._norm is not None:
            states = functional.rms_norm(states, self._norm.shape, self._norm, self._epsilon)
        return functional.linear(states, self._weight, self._bias)


class CompiledFusion:
    """One compiled call; every row's result is the same whatever rows share it.

    Args:
        weight: float32 or bfloat16; copied, as all of them are.
        bias: As for `serve_fusion`.
        norm: Likewise.
        epsilon: Likewise.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, norm: Tensor | None, epsilon: float
    ) -> None:
        self._num_columns, depth = weight.shape
        matrix = as_array(weight.detach().contiguous())
        packed = np.zeros(packed_shape(self._num_columns, depth), matrix.dtype)
        pack(matrix, packed)
        self._weight = packed.reshape(-1)
        self._num_panels = len(packed)
        self._bias, self._norm, self._epsilon = _vector(bias, PANEL), _vector(norm), epsilon
        self._fuse: Callable[..., None] | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Return the product in float32."""
        out = np.empty((len(states), self._num_panels * PANEL), np.float32)
        arguments = (
            as_rows(states),
            self._norm,
            self._epsilon,
            self._weight,
            self._bias,
            self._num_panels,
            out.reshape(-1),
            np.zeros(NUM_COUNTERS, np.int64),
        )
        if self._fuse is None:
            self._fuse = entry_point(fuse_rows, arguments)
        run_together(self._fuse, arguments, self._num_threads(len(states)))
        return torch.from_numpy(out[:, : self._num_columns])

    def _num_threads(self, num_rows: int) -> int:
        wanted = self._weight.nbytes * max(1, num_rows // 8) // BYTES_PER_THREAD
        return max(1, min(torch.get_num_threads(), wanted))


def _vector(vector: Tensor | None, multiple: int = 1) -> np.ndarray:
    """Return a vector as float32, filled up with zeros to a multiple; nothing for None."""
    if vector is None:
        return np.zeros(0, np.float32)
    room = np.zeros(padded(len(vector), multiple), np.float32)
    room[: len(vector)] = vector.detach().float().cpu().numpy()
    return room
