"""Statistics of the certificate: levels, powers and adjusted probabilities are what they say."""

import math

import numpy as np
import pytest

from foretoken.certify.goodness import (
    MIN_EXPECTED,
    POWER,
    ChiSquare,
    Tally,
    distance_from_uniform,
    distance_resolution,
    holm,
    pooled,
    uniform_counts,
)


def chi_square(tables):
    total = ChiSquare()
    for counts, probs in tables:
        total.add(np.asarray(counts, dtype=float), np.asarray(probs, dtype=float))
    return total.result("test")


def standard_errors(num_hits, num_trials, prob):
    return (num_hits - num_trials * prob) / math.sqrt(num_trials * prob * (1 - prob))


@pytest.mark.parametrize(("degrees", "critical"), [(1, 3.841459), (10, 18.307038), (60, 79.081944)])
def test_the_tail_is_that_of_tables_in_books(degrees, critical):
    """With large counts the adjusted tail is the ordinary one: 5 % critical values."""
    cells, total = degrees + 1, 1e9
    probs = np.full(cells, 1 / cells)
    shift = np.zeros(cells)
    shift[:2] = math.sqrt(critical * total / cells / 2) * np.array([1, -1])
    result = chi_square([(total * probs + shift, probs)])
    assert result.degrees == degrees
    assert result.statistic == pytest.approx(critical)
    assert result.p_value == pytest.approx(0.05, rel=1e-4)


def test_false_alarms_are_as_rare_as_the_p_value_says():
    """Many small tables with cells barely above the least expected count.

    Bounds are four standard errors: right code leaves them with probability 3e-4.
    """
    generator = np.random.default_rng(3)
    num_trials = 10_000
    shapes = [(40, [0.5, 0.3, 0.15, 0.05]), (25, [0.7, 0.2, 0.1]), (64, [1 / 12] * 12)]
    p_values = [
        chi_square([(generator.multinomial(n, probs), probs) for n, probs in shapes]).p_value
        for _ in range(num_trials)
    ]
    # The gamma tail matches two moments, not all: at 1/1000 it may be wrong by a third.
    for level, slack in ((0.05, 1.05), (0.001, 1.35)):
        num_alarms = sum(value < level for value in p_values)
        assert standard_errors(num_alarms, num_trials, level * slack) < 4
        assert standard_errors(num_alarms, num_trials, level / slack) > -4


def test_small_cells_make_the_tail_heavier():
    """Five cells of 5.5 expected spread more than a chi-square: p is larger than the books'."""
    probs = [0.9] + [0.02] * 5
    result = chi_square([([235, 5, 5, 5, 5, 20], probs)])
    [books] = chi2_tails(result.statistic, 5)
    assert result.p_value > 1.5 * books


def chi2_tails(statistic, degrees):
    """Return P(chi-square > statistic) by the series for odd degrees."""
    root = math.sqrt(statistic)
    tail = math.erfc(root / math.sqrt(2))
    density = math.sqrt(2 / math.pi) * math.exp(-statistic / 2)
    term, total = root, 0.0
    for step in range(1, (degrees - 1) // 2 + 1):
        total += term
        term *= statistic / (2 * step + 1)
    return [tail + density * total]


def test_rare_cells_are_pooled_by_probability_alone():
    counts, probs = np.array([50.0, 30, 9, 1, 0]), np.array([0.5, 0.3, 0.14, 0.03, 0.03])
    kept_counts, kept_probs = pooled(counts, probs)
    assert kept_counts.tolist() == [50, 30, 9, 1]
    assert kept_probs == pytest.approx([0.5, 0.3, 0.14, 0.06])
    swapped, _ = pooled(counts[::-1].copy(), probs)
    assert len(swapped) == len(kept_counts)
    few_counts, few_probs = pooled(np.array([6.0, 3, 1]), np.array([0.7, 0.2, 0.1]))
    assert few_counts.tolist() == [10]
    assert few_probs == pytest.approx([1.0])


def test_nothing_to_count_is_no_test():
    assert ChiSquare().result("") is None
    assert chi_square([([3, 1], [0.5, 0.5])]) is None
    assert Tally().result("") is None


def shifted_bins(num_bins, distance):
    """Return bin probabilities at a total variation distance from uniform, hardest to see."""
    probs = np.full(num_bins, 1 / num_bins)
    probs[: num_bins // 2] += 2 * distance / num_bins
    probs[num_bins // 2 :] -= 2 * distance / num_bins
    return probs


@pytest.mark.parametrize("level", [1e-2, 2e-5])
def test_the_detectable_distance_is_detected_as_often_as_stated(level):
    """Four standard errors of 1000 trials: right code fails with probability 1e-4 at most."""
    generator = np.random.default_rng(7)
    count, bins, trials = 5000, 16, 1000
    uniform = np.full(bins, 1 / bins)
    distance = chi_square([(count * uniform, uniform)]).detectable_distance(level)
    found = sum(
        chi_square([(generator.multinomial(count, shifted_bins(bins, distance)), uniform)]).p_value
        < level
        for _ in range(trials)
    )
    assert abs(standard_errors(found, trials, POWER)) < 4


def test_the_detectable_distance_of_a_sum_is_detected_as_often_as_stated():
    """As above, for indicators with different probabilities."""
    generator = np.random.default_rng(8)
    level, trials, count = 1e-4, 1000, 3000
    probs = generator.uniform(0.2, 0.8, count)
    tally = Tally()
    for prob in probs:
        tally.add(False, prob)
    distance = tally.result("").detectable_distance(level)
    found = 0
    for _ in range(trials):
        happened = generator.random(count) < probs + distance
        excess = float((happened - probs).sum())
        one = Tally(count, excess, float((probs * (1 - probs)).sum()))
        found += one.result("").p_value < level
    assert abs(standard_errors(found, trials, POWER)) < 4


def test_more_observations_see_smaller_distances():
    uniform = np.full(8, 1 / 8)
    few, many = (chi_square([(n * uniform, uniform)]).detectable_distance(1e-4) for n in (800, 8e4))
    assert few == pytest.approx(10 * many, rel=1e-6)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_distance_from_uniform():
    assert distance_from_uniform([]) == 0
    assert distance_from_uniform([0.1] * 10) == pytest.approx(0.9)
    even = (np.arange(1000) + 0.5) / 1000
    assert distance_from_uniform(even) == pytest.approx(0.0005)
    assert distance_from_uniform(even**2) == pytest.approx(0.25, abs=1e-3)


def test_chance_stays_below_the_resolution():
    """2000 trials at 1 %: more than 48 above it happen with probability 1e-8."""
    generator = np.random.default_rng(9)
    count = 400
    resolution = distance_resolution(count, 0.01)
    beyond = sum(distance_from_uniform(generator.random(count)) > resolution for _ in range(2000))
    assert 1 <= beyond < 48
    assert distance_resolution(0, 0.01) == 1


def test_values_at_the_edges_fall_into_bins():
    assert uniform_counts(np.array([0.0, 0.5, np.nextafter(1.0, 0.0)]), 2).tolist() == [1, 2]
    assert MIN_EXPECTED >= 5
