"""Tests of counts against known probabilities, and the deviations that they could have seen.

Nothing here needs more than the incomplete gamma function, which torch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

MIN_EXPECTED = 5.0  # of a cell; rarer ones are counted together
POWER = 0.9  # with which a deviation counts as one that a test detects
_MAX_NONCENTRALITY = 1e7
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class FitTest:
    """One test of one hypothesis.

    Args:
        name: What was tested.
        num_observations: Tokens, or pairs of them, that were counted.
        statistic: Pearson's chi-square, or a standardized sum.
        degrees: Degrees of freedom; 0 for a standardized sum.
        p_value: Probability of a statistic at least this extreme if the hypothesis holds.
        unit_distance: A total variation distance of d moves the statistic by (d / unit_distance)
            standard deviations of a sum, or adds (d / unit_distance)**2 to a chi-square's
            noncentrality, at least.
    """

    name: str
    num_observations: int
    statistic: float
    degrees: int
    p_value: float
    unit_distance: float

    def detectable_distance(self, level: float) -> float:
        """Return the total variation distance that this test finds with probability `POWER`.

        Args:
            level: Probability of a false alarm that the test is held to.
        """
        if self.degrees == 0:
            shift = _NORMAL.inv_cdf(1 - level / 2) + _NORMAL.inv_cdf(POWER)
        else:
            shift = math.sqrt(_needed_noncentrality(self.degrees, level))
        return min(1.0, shift * self.unit_distance)


@dataclass(slots=True)
class ChiSquare:
    """Pearson's statistic summed over tables of counts whose probabilities are known.

    Its tail is that of a gamma distribution with the statistic's own mean and variance, which are
    known exactly: with expected counts as low as `MIN_EXPECTED` the usual chi-square would be too
    light in the far tail.

    Source: the variance is that of Haldane 1937, Biometrika 29.
    """

    statistic: float = 0.0
    degrees: int = 0
    num_observations: int = 0
    _variance: float = field(default=0.0)

    def add(self, counts: NDArray[np.float64], probs: NDArray[np.float64]) -> None:
        """Count one table, independent of the others; cells too rare are pooled.

        Args:
            counts: Observed, [C].
            probs: Of each cell, [C]; they sum to 1.
        """
        total = float(counts.sum())
        counts, probs = pooled(counts, probs)
        num_cells = len(probs)
        if num_cells < 2:
            return
        self.statistic += float(((counts - total * probs) ** 2 / (total * probs)).sum())
        self.degrees += num_cells - 1
        self.num_observations += int(total)
        correction = float((1 / probs).sum()) - num_cells**2 - 2 * num_cells + 2
        self._variance += 2 * (num_cells - 1) + correction / total

    def result(self, name: str) -> FitTest | None:
        """Return the test, None if nothing could be counted."""
        if self.degrees == 0:
            return None
        scale = self._variance / self.degrees
        return FitTest(
            name=name,
            num_observations=self.num_observations,
            statistic=self.statistic,
            degrees=self.degrees,
            p_value=_gamma_tail(self.degrees / scale, self.statistic / scale),
            # The sum of (difference)**2 / probability is at least 4 * distance**2.
            unit_distance=1 / math.sqrt(4 * self.num_observations),
        )


@dataclass(slots=True)
class Tally:
    """A sum of indicators against their known probabilities, standardized."""

    num_observations: int = 0
    excess: float = 0.0
    variance: float = 0.0

    def add(self, happened: bool, prob: float) -> None:
        """Count one indicator.

        Args:
            happened: Whether it is 1.
            prob: That it is.
        """
        self.num_observations += 1
        self.excess += happened - prob
        self.variance += prob * (1 - prob)

    def result(self, name: str) -> FitTest | None:
        """Return the two-sided test, None if nothing was uncertain."""
        if self.variance < MIN_EXPECTED:
            return None
        score = self.excess / math.sqrt(self.variance)
        return FitTest(
            name=name,
            num_observations=self.num_observations,
            statistic=score,
            degrees=0,
            p_value=math.erfc(abs(score) / math.sqrt(2)),
            unit_distance=math.sqrt(self.variance) / self.num_observations,
        )


def pooled(
    counts: NDArray[np.float64], probs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the table with cells of less than `MIN_EXPECTED` expected counts put together.

    Which cells are pooled depends on the probabilities alone, never on what was observed.
    """
    total = float(counts.sum())
    is_rare = probs * total < MIN_EXPECTED
    kept_counts, kept_probs = counts[~is_rare], probs[~is_rare]
    rare_count, rare_prob = float(counts[is_rare].sum()), max(0.0, 1 - float(kept_probs.sum()))
    if rare_prob * total >= MIN_EXPECTED:
        return np.append(kept_counts, rare_count), np.append(kept_probs, rare_prob)
    if len(kept_probs):
        smallest = int(kept_probs.argmin())
        kept_counts[smallest] += rare_count
        kept_probs[smallest] += rare_prob
    return kept_counts, kept_probs


def uniform_counts(values: NDArray[np.float64], num_bins: int) -> NDArray[np.float64]:
    """Return how many values of [0, 1) fall into each of equal bins, [num_bins]."""
    bins = np.minimum((values * num_bins).astype(np.int64), num_bins - 1)
    return np.bincount(bins, minlength=num_bins).astype(np.float64)


def distance_from_uniform(values: Sequence[float]) -> float:
    """Return the largest gap between the values' distribution function and the uniform one.

    It is the deviation on one set of outcomes, so the total variation distance is not smaller,
    but for chance: see `distance_resolution`.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    if count == 0:
        return 0.0
    above = np.arange(1, count + 1) / count - ordered
    below = ordered - np.arange(count) / count
    return float(max(above.max(), below.max(), 0.0))


def distance_resolution(count: int, level: float) -> float:
    """Return what `distance_from_uniform` exceeds by chance with this probability at most.

    Source: Dvoretzky, Kiefer, Wolfowitz 1956 with the constant of Massart 1990.
    """
    return min(1.0, math.sqrt(math.log(2 / level) / (2 * count))) if count else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for each other: one below a level happens as rarely as that level.

    Holds whatever the dependence between the tests. Source: Holm 1979, Scand. J. Stat. 6.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _needed_noncentrality(degrees: int, level: float) -> float:
    """Return the noncentrality at which a chi-square test of this level has power `POWER`."""
    critical = _bisect(lambda value: _gamma_tail(degrees / 2, value / 2) > level, 0.0, 1e8)
    return _bisect(
        lambda value: _noncentral_tail(degrees, value, critical) < POWER, 0.0, _MAX_NONCENTRALITY
    )


def _noncentral_tail(degrees: int, noncentrality: float, value: float) -> float:
    """Return P(noncentral chi-square > value): a Poisson mixture of central ones."""
    mean = noncentrality / 2
    spread = 10 * math.sqrt(mean) + 20
    terms = torch.arange(max(0, int(mean - spread)), int(mean + spread) + 1, dtype=torch.float64)
    log_weights = torch.xlogy(terms, mean) - mean - torch.lgamma(terms + 1)
    tails = torch.special.gammaincc(
        degrees / 2 + terms, torch.tensor(value / 2, dtype=torch.float64)
    )
    return float((log_weights.exp() * tails).sum())


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds up to some value stops to hold."""
    for _ in range(80):
        middle = (low + high) / 2
        if is_below(middle):
            low = middle
        else:
            high = middle
    return high


def _gamma_tail(shape: float, value: float) -> float:
    return float(
        torch.special.gammaincc(
            torch.tensor(shape, dtype=torch.float64), torch.tensor(value, dtype=torch.float64)
        )
    )


__all__ = [
    "MIN_EXPECTED",
    "POWER",
    "ChiSquare",
    "FitTest",
    "Tally",
    "distance_from_uniform",
    "distance_resolution",
    "holm",
    "pooled",
    "uniform_counts",
]
