"""What one distribution has more than another: where rejected samples are made up for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Probs = NDArray[np.float64]
"""Probabilities of all tokens, [V]."""


def excess(probs: Probs, other: Probs) -> Probs:
    """Return max(0, probs - other) for each token, not normalised."""
    positive: Probs = np.maximum(probs - other, 0)
    return positive


def residual(probs: Probs, other: Probs) -> Probs:
    """Return what `probs` has more than `other`, as a distribution.

    If it has nothing more, the two are equal and nothing sampled from `other` is ever rejected;
    only rounding leads here. `probs` then stands, so that a choice is still one of the target's.
    """
    rest = excess(probs, other)
    total = rest.sum()
    return rest / total if total > 0 else probs
