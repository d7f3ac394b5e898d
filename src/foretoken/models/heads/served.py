"""Heads without attention, ready to serve: compiled where decoders are, else as torch modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from foretoken.models.decoder import BYTES_PER_THREAD
from foretoken.models.decoder_loading import DTYPES
from foretoken.models.heads.head_kernels import HeadShape, HeadWeights, run_heads
from foretoken.models.heads.linear import MixingBlock, ResidualBlock, SharedLinear, StateHeads
from foretoken.models.kernels import pack, packed_shape, padded
from foretoken.models.pools import as_array
from foretoken.models.products import PANEL
from foretoken.models.state_rows import as_rows
from foretoken.models.threads import entry_point, run_together


class ServedHeads(Protocol):
    """Runs heads that see one row of vectors each."""

    def logits(self, seen: Tensor, first: int, num_heads: int) -> Tensor:
        """Return what some heads say, [num_heads, R, V] float32 or float64.

        Args:
            seen: What they see, [R, D]; of heads that mix, vectors one after the other.
            first: The first of these heads.
            num_heads: How many.
        """
        ...


def serve_heads(heads: StateHeads, dtype: torch.dtype, device: torch.device) -> ServedHeads:
    """Return heads ready to serve; a module that is not compiled is converted in place.

    Args:
        heads: As they were trained.
        dtype: Of the matrices.
        device: Where they run.
    """
    if device.type == "cpu" and dtype in DTYPES:
        return CompiledHeads(heads, dtype)
    return ModuleHeads(heads.to(device=device, dtype=dtype).eval().requires_grad_(False))


class ModuleHeads:
    """The modules themselves.

    Args:
        heads: Where and in the type in which they are to run.
    """

    def __init__(self, heads: StateHeads) -> None:
        self._heads = heads
        self._dtype = next(heads.parameters()).dtype

    def logits(self, seen: Tensor, first: int, num_heads: int) -> Tensor:
        """Return what some heads say."""
        with torch.inference_mode():
            seen = seen.to(self._dtype)
            rows = [self._heads.say(head, seen) for head in range(first, first + num_heads)]
            logits = torch.stack(rows)
            return logits if logits.dtype == torch.float64 else logits.float()


class CompiledHeads:
    """One compiled call; every row's result is the same whatever rows share it.

    Args:
        heads: As they were trained; their tensors are copied.
        dtype: float32 or bfloat16, of the matrices.
    """

    def __init__(self, heads: StateHeads, dtype: torch.dtype) -> None:
        blocks = [list(cast(nn.Sequential, block)) for block in heads.blocks]
        mixing = [block[0] for block in blocks if block and isinstance(block[0], MixingBlock)]
        layers = [layer for block in blocks for layer in block if isinstance(layer, ResidualBlock)]
        lm_heads = cast(list[nn.Linear | SharedLinear], list(heads.lm_heads))
        is_shared = isinstance(lm_heads[0], SharedLinear)
        vocab_size, hidden_size = lm_heads[0].weight.shape
        self._shape = HeadShape(
            hidden=hidden_size,
            vocab=vocab_size,
            num_layers=len(layers) // len(blocks),
            is_mixing=int(bool(mixing)),
            has_shared_lm_head=int(is_shared),
        )
        mixed = [_packed(_halves(block.linear.weight), dtype) for block in mixing]
        self._weights = HeadWeights(
            mixing=_joined(mixed, dtype),
            mixing_starts=np.cumsum([0, *map(len, mixed)]),
            mixing_bias=_joined([_bias(_halves(it.linear.bias)) for it in mixing], torch.float32),
            layers=_joined([_packed(layer.linear.weight, dtype) for layer in layers], dtype),
            layers_bias=_joined([_bias(layer.linear.bias) for layer in layers], torch.float32),
            lm=_joined(
                [_packed(it.weight, dtype) for it in lm_heads[: 1 if is_shared else None]], dtype
            ),
        )
        self._bytes_per_head: int = sum(array.nbytes for array in self._weights) // len(blocks)
        self._run: Callable[..., None] | None = None

    def logits(self, seen: Tensor, first: int, num_heads: int) -> Tensor:
        """Return what some heads say."""
        shape, num_rows = self._shape, len(seen)
        num_layers = shape.num_layers + 2 * shape.is_mixing  # of products; a mixing one is double
        num_products = num_heads * num_rows * num_layers * padded(shape.hidden, PANEL)
        num_columns = padded(shape.vocab, PANEL)
        logits = np.empty((num_heads, num_rows, num_columns), np.float32)
        arguments = (
            shape,
            self._weights,
            as_rows(seen),
            first,
            num_heads,
            np.empty(num_products, np.float32),
            logits.reshape(-1),
            np.zeros(1 + num_heads * (num_layers + 1), np.int64),
        )
        if self._run is None:
            self._run = entry_point(run_heads, arguments)
        run_together(self._run, arguments, self._num_threads(num_heads))
        return torch.from_numpy(logits[:, :, : shape.vocab])

    def _num_threads(self, num_heads: int) -> int:
        wanted = self._bytes_per_head * num_heads // BYTES_PER_THREAD
        return max(1, min(torch.get_num_threads(), wanted))


def _packed(weight: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a matrix as `run_heads` reads it, flat."""
    array = as_array(weight.detach().to(dtype).contiguous())
    packed = np.zeros(packed_shape(*array.shape), array.dtype)
    pack(array, packed)
    return packed.reshape(-1)


def _halves(tensor: Tensor) -> Tensor:
    """Return the two halves of a mixing block's rows, each filled up to whole panels."""
    halves = tensor.detach().chunk(2)
    size = len(halves[0])
    room = tensor.new_zeros(2, padded(size, PANEL), *tensor.shape[1:])
    room[0, :size], room[1, :size] = halves
    return room.flatten(0, 1)


def _bias(bias: Tensor) -> np.ndarray:
    """Return a bias filled up to whole panels."""
    room = np.zeros(padded(len(bias), PANEL), np.float32)
    room[: len(bias)] = bias.detach().float().numpy()
    return room


def _joined(arrays: list[np.ndarray], dtype: torch.dtype) -> np.ndarray:
    empty = np.zeros(0, np.uint16 if dtype == torch.bfloat16 else np.float32)
    return np.concatenate([empty, *arrays])


__all__ = ["CompiledHeads", "ModuleHeads", "ServedHeads", "serve_heads"]
