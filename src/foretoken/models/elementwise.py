"""Activations whose bits do not depend on how many rows share the pass.

Torch computes elementwise functions a few vectors at a time and the rest one by one, with another
approximation of exp that differs in the last bit. Where the rest begins depends on the number of
elements and on how threads share them. Filled up to whole vectors for every thread, there is none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, LinearActivation

# Two vectors of 64 bytes in the narrowest type: what torch's loops take at a time, at most.
ELEMENTS_AT_A_TIME = 64
# From this many elements on, torch shares some functions (gelu) among all threads.
ELEMENTS_FOR_ALL_THREADS = 16384
# The others are shared among as many threads as get so many elements each.
ELEMENTS_PER_THREAD = 32768
_OF_TRANSFORMERS = tuple(
    entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()
)
_OF_TORCH = (nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.Softplus, nn.ELU, nn.Hardswish)
_EXACT = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, LinearActivation)
ACTIVATIONS = tuple(
    kind for kind in (*_OF_TRANSFORMERS, *_OF_TORCH) if not issubclass(kind, _EXACT)
)


def whole(num_elements: int, *, multiple_of: int = 1, num_threads: int | None = None) -> int:
    """Return the next number of elements that leaves no thread a rest.

    Args:
        num_elements: How many there are.
        multiple_of: What the result has to be a multiple of besides, such as a row.
        num_threads: Threads of torch; those it has now if None.
    """
    num_threads = num_threads or torch.get_num_threads()
    filled = -(-num_elements // multiple_of) * multiple_of
    while filled % (ELEMENTS_AT_A_TIME * _num_shares(filled, num_threads)):
        filled += multiple_of
    return filled


def _num_shares(num_elements: int, num_threads: int) -> int:
    """Return a number that those divide among whom torch may share an elementwise operation."""
    if num_elements < ELEMENTS_FOR_ALL_THREADS:
        return 1
    return math.lcm(num_threads, min(num_threads, -(-num_elements // ELEMENTS_PER_THREAD)))


class InvariantActivation(nn.Module):
    """An elementwise function that gives an element the same bits wherever it stands.

    Args:
        function: One of `ACTIVATIONS`.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function of each element."""
        num_elements = x.numel()
        num_filled = whole(num_elements)
        if num_filled == num_elements:
            result: Tensor = self.function(x.contiguous())
            return result
        filled = x.new_zeros(num_filled)
        filled[:num_elements].view(x.shape).copy_(x)
        result = self.function(filled)
        return result[:num_elements].view(x.shape)
