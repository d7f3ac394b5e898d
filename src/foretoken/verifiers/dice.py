"""What rules that compare probabilities need of chance, and of arithmetic.

Rules are written over arrays of probabilities and `Dice`. With float64 and the request's own
generator that is how they run; with fractions, and dice that go through every outcome, the same
code says exactly what its output's law is.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foretoken.core.residual import Probs, excess, residual


class Dice(Protocol):
    """The random choices of one verdict."""

    def accept(self, probability: float) -> bool:
        """Return True with this probability; it lies in [0, 1]."""
        ...

    def draw(self, weights: Probs) -> int:
        """Return an index with a probability in proportion to its weight."""
        ...


class GeneratorDice:
    """Dice over a generator.

    Args:
        generator: One uniform number is taken from it for each choice.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def accept(self, probability: float) -> bool:
        """Return True with this probability: never for 0, always for 1."""
        return self._generator.random() < probability

    def draw(self, weights: Probs) -> int:
        """Return an index by its weight; one of weight 0 never, unless none has any."""
        cumulative = np.cumsum(weights)
        point = self._generator.random() * cumulative[-1]
        index = int(np.searchsorted(cumulative, point, side="right"))
        # A product can round up to the total: that is the last index that weighs anything.
        return min(index, int(np.searchsorted(cumulative, cumulative[-1], side="left")))


def ratio(numerator: float, denominator: float) -> float:
    """Return min(1, numerator / denominator), neither of them negative; 1 for 0 / 0."""
    return 1 if numerator >= denominator else numerator / denominator


def without(probs: Probs, token_id: int) -> Probs:
    """Return the distribution of the next draw if this token was drawn and not put back.

    All zeros if nothing is left.
    """
    rest = probs.copy()
    rest[token_id] = 0
    total = rest.sum()
    return rest / total if total > 0 else rest


def point_mass(token_id: int, like: NDArray[Any]) -> Probs:
    """Return the distribution of a token that was not sampled but chosen."""
    probs = np.zeros_like(like)
    probs[token_id] = 1
    return probs


__all__ = [
    "Dice",
    "GeneratorDice",
    "Probs",
    "excess",
    "point_mass",
    "ratio",
    "residual",
    "without",
]
