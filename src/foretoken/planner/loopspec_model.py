"""The bound on LoopSpec's ticks per token, and the exits that make it least.

A row's guesses are issued after d1 and d2 of R loops. If the distribution after r loops is within
b r^-a of the final one in total variation, then

    E[ticks per token] <= d1 + b d1^-a d2 + 2 b d2^-a R

since the first guess is rejected with probability TV(p_d1, p_R) at most, and both are with
2 TV(p_d2, p_R), the 2 because the second is not offered where the first became likelier.

Source: LoopSpec, arXiv:2609.17184, Theorem 2.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """A bound on how far the distribution after r loops is from the final one: TV <= b r^-a.

    Args:
        scale: b > 0.
        exponent: a > 0.
    """

    scale: float
    exponent: float

    def at(self, depth: float) -> float:
        """Return the bound after so many loops."""
        return float(self.scale * depth**-self.exponent)


def ticks_bound(first: float, second: float, loops: int, law: PowerLaw) -> float:
    """Return the bound on the expected ticks per token.

    Args:
        first: d1.
        second: d2 >= d1.
        loops: R.
        law: Of the distances.
    """
    return first + law.at(first) * second + 2 * law.at(second) * loops


def optimal_exits(loops: int, law: PowerLaw) -> tuple[float, float]:
    """Return the d1 and d2 that make `ticks_bound` least, as real numbers.

    Setting both derivatives to zero gives d1^(a+1) = a b d2 and d2^(a+1) = 2 a R d1^a, hence

        d1 = (a b)^((a+1)/n) (2 a R)^(1/n),   d2 = (a b)^(a/n) (2 a R)^((a+1)/n),   n = a^2 + a + 1

    so that with more loops the exits grow as powers of R less than 1, and so does the bound. In
    the logarithms of d1 and d2 the bound is a sum of exponentials, so this is its only minimum.

    Args:
        loops: R.
        law: Of the distances.
    """
    a = law.exponent
    early, late = a * law.scale, 2 * a * loops
    n = a * a + a + 1
    return early ** ((a + 1) / n) * late ** (1 / n), early ** (a / n) * late ** ((a + 1) / n)


__all__ = ["PowerLaw", "optimal_exits", "ticks_bound"]
