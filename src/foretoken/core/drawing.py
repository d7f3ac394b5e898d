"""Samples for drafts: how many each node gets, and which tokens come out.

Which draws a draft makes, and which of them stand under a bound, may not depend on what those
draws turn out to be; see `Draws` for why and how that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def share_draws(wanted: Sequence[int], available: int) -> list[int]:
    """Return how many draws each of several places gets: one each in turn, as long as they last.

    The first draw of a place is worth more than its second, so a short supply goes around before
    anybody gets more. The answer depends on counts alone, not on anything drawn.

    Args:
        wanted: Draws that each place asks for.
        available: Draws in all; each may become a node of its own.
    """
    shares = [0] * len(wanted)
    while available > 0:
        hungry = [place for place, count in enumerate(wanted) if shares[place] < count]
        if not hungry:
            break
        for place in hungry[:available]:
            shares[place] += 1
        available -= len(hungry)
    return shares


def draw_iid(
    probs: NDArray[np.float64],  # [V]
    count: int,
    generator: np.random.Generator,
) -> list[int]:
    """Return independent samples in the order of their drawing; a token may repeat.

    Args:
        probs: Weights; tokens of weight 0 are never drawn.
        count: How many, K.
        generator: Gives K uniform numbers.
    """
    cumulative = np.cumsum(probs)
    points = generator.random(count) * cumulative[-1]
    drawn = np.searchsorted(cumulative, points, side="right")
    # A product can round up to the total: that is the last token that weighs anything.
    last = np.searchsorted(cumulative, cumulative[-1], side="left")
    chosen: list[int] = np.minimum(drawn, last).tolist()
    return chosen


def draw_without_replacement(
    probs: NDArray[np.float64],  # [V]
    count: int,
    generator: np.random.Generator,
) -> list[int]:
    """Return samples in the order of their drawing, each from what those before it left.

    All tokens race, token x for the time E / p(x) with E standard exponential; the first to
    arrive is a sample, the next one a sample of the rest, and so on (Gumbel-top-k: Kool et al.
    2019, arXiv:1903.06059). There are fewer than `count` if fewer have any weight.

    Args:
        probs: Weights; tokens of weight 0 are never drawn.
        count: Most samples wanted.
        generator: Gives one exponential number per token that weighs anything.
    """
    support = np.flatnonzero(probs > 0)
    arrivals = generator.standard_exponential(len(support)) / probs[support]
    if count < len(support):
        first = np.argpartition(arrivals, count)[:count]
        support, arrivals = support[first], arrivals[first]
    drawn: list[int] = support[np.argsort(arrivals, kind="stable")].tolist()
    return drawn
