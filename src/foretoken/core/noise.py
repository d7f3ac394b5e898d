"""Keyed noise: randomness that is a pure function of (seed, position, token).

Drawing from p is an exponential race: the token with the smallest `E / p` wins, where E is a
standard exponential variate per token. Taking logarithms, it is the token with the largest
`log p + G`, where `G = -log E` is a Gumbel variate. E comes from a counter-based hash, so a draw
needs no generator state and does not depend on device, batch or on what was drawn before. That
is what lets drafters run the same race as the target and guess the same winner.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from foretoken.core.jit import jit

_CPU = torch.device("cpu")
_MASK_64 = (1 << 64) - 1
# Increment and multipliers of splitmix64 (Steele, Lea, Flood 2014; Stafford's variant 13).
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def _splitmix(state: int) -> int:
    """Return the splitmix64 output for one 64-bit state."""
    mixed = (state + _GOLDEN) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * _MULTIPLIER_1) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * _MULTIPLIER_2) & _MASK_64
    return mixed ^ (mixed >> 31)


def _signed(value: int) -> int:
    """Return the two's complement reading of 64 bits; torch has no full uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


def derive_seed(seed: int, index: int) -> int:
    """Return an independent seed for the `index`-th choice of a request."""
    return _splitmix(_splitmix(seed) ^ index) if index else seed


class Stream(enum.IntEnum):
    """What a request's random numbers are for; streams are independent of each other."""

    DRAFT = 1  # samples that drafters draw
    VERIFY = 2  # choices of rules that are not coupled


def keyed_generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Return a generator that depends on nothing but its keys.

    Args:
        seed: Key of the request, 0 <= seed < 2**64.
        stream: What the numbers are for.
        keys: Place in the request, such as the number of tokens so far; a step has its own, so
            that no number is used twice.
    """
    key = _splitmix(seed ^ _splitmix(stream))
    for part in keys:
        key = _splitmix(key ^ _splitmix(part))
    return np.random.Generator(np.random.Philox(key=key))


def _mix(values: Tensor) -> Tensor:
    """Mix int64 tensors like splitmix64 does; int64 products wrap, shifts must be made logical."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * _signed(_MULTIPLIER_1)
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * _signed(_MULTIPLIER_2)
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


@lru_cache(maxsize=8)
def _token_keys(vocab_size: int, device: torch.device) -> Tensor:
    """Return one fixed 64-bit key per token id, [V] int64; the same for every seed."""
    return _mix(torch.arange(1, vocab_size + 1, device=device) * _signed(_GOLDEN))


def gumbel_noise(
    seed: int,
    positions: Sequence[int],
    vocab_size: int,
    device: torch.device,
) -> Tensor:  # [P, V] float64
    """Return the Gumbel noise of every token for the choices made at some positions.

    Args:
        seed: Key of the request, 0 <= seed < 2**64.
        positions: Absolute indices in the request of the tokens to be chosen, prompt included.
        vocab_size: V; a smaller vocabulary gets a prefix of a larger one's noise.
        device: Where to compute; the uniform variates are the same everywhere, the logarithms up
            to the last bit: each device, and each processor that numpy tells apart, has its own.
    """
    request_key = _splitmix(seed)
    keys = [_splitmix(request_key ^ _splitmix(~p & _MASK_64)) for p in positions]
    token_keys = _token_keys(vocab_size, device)
    if device.type != "cpu":
        position_keys = torch.tensor([_signed(key) for key in keys], device=device)
        uniform = _uniform_by_torch(_mix(token_keys ^ position_keys.unsqueeze(1)))
        return uniform.log_().neg_().log_().neg_()
    noise = _uniform(token_keys.numpy().view(np.uint64), np.array(keys, dtype=np.uint64))
    for _ in range(2):  # by numpy, whose float64 logarithm is many times as fast as torch's
        np.negative(np.log(noise, out=noise), out=noise)
    return torch.from_numpy(noise)


# 52 bits and a half: exact in float64, never 0 or 1, so both logarithms are finite.


def _uniform_by_torch(bits: Tensor) -> Tensor:
    return (((bits >> 12) & 0xFFFFFFFFFFFFF).double() + 0.5) * 2.0**-52


@jit
def _uniform(token_keys: np.ndarray, position_keys: np.ndarray) -> np.ndarray:
    """Return the uniform variates of all positions and tokens, [P, V] float64, in one sweep."""
    uniform = np.empty((len(position_keys), len(token_keys)))
    for row in range(len(position_keys)):
        for token in range(len(token_keys)):
            bits = token_keys[token] ^ position_keys[row]
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
            bits = (bits ^ (bits >> np.uint64(31))) >> np.uint64(12)
            uniform[row, token] = (np.float64(bits) + 0.5) * 2.0**-52
    return uniform


class NoiseBlocks:
    """The noise of one request, computed once per position and `BLOCK` positions at a time.

    Target and drafters ask for the same rows; a request chooses a token at every position sooner
    or later, so computing ahead wastes nothing but the end.

    Args:
        seed: Key of the request.
    """

    BLOCK = 8

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._blocks: dict[tuple[int, int, torch.device], tuple[Tensor, ...]] = {}

    def row(self, position: int, vocab_size: int, device: torch.device) -> Tensor:
        """Return the noise at one position, [V] float64; not to be written to."""
        index, place = divmod(position, self.BLOCK)
        return self._block(index, vocab_size, device)[place]

    def rows(self, position: int, vocab_size: int, num_wanted: int) -> tuple[Tensor, ...]:
        """Return the noise at a position and after it, on CPU, [V] each; not to be written to.

        Args:
            position: The first.
            vocab_size: V.
            num_wanted: Most rows, at least 1. There may be fewer, but not fewer than half a block:
                those far ahead are left until somebody is near.
        """
        index, place = divmod(position, self.BLOCK)
        rows = self._block(index, vocab_size, _CPU)[place : place + num_wanted]
        if len(rows) < min(num_wanted, self.BLOCK // 2):
            rows += self._block(index + 1, vocab_size, _CPU)[: num_wanted - len(rows)]
        return rows

    def _block(self, index: int, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        key = (index, vocab_size, device)
        rows = self._blocks.get(key)
        if rows is None:
            first = index * self.BLOCK
            # Positions only grow; blocks long behind are never asked for again.
            self._blocks = {old: kept for old, kept in self._blocks.items() if old[0] >= index - 2}
            positions = range(first, first + self.BLOCK)
            rows = gumbel_noise(self._seed, positions, vocab_size, device).unbind()
            self._blocks[key] = rows
        return rows
